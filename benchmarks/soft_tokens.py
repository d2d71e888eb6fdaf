"""Depth decoded from the codes a policy predicts: the most likely code of each token against the expected code.

  python benchmarks/soft_tokens.py --tokenizer=runs/demo/tokenizer --policy=runs/demo/policy [--batches=8]

The expected code, sum_k p_k c_k, is AiT's soft token (Ning et al. 2023). A policy's probabilities may be too sharp or
too flat for that, so its logits are divided by several numbers first. Over held-out frames of the policy's data; the
last line of stdout is JSON: RMSE and AbsRel of the true tokens, of the predicted ones, and of the expected codes.
"""

import json
import pathlib
import sys

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this tree's qdepth_jax before an installed one

from qdepth_jax import command  # noqa: E402

_TOKENIZER = flags.DEFINE_string("tokenizer", None, "workdir of the depth tokenizer", required=True)
_POLICY = flags.DEFINE_string("policy", None, "workdir of a policy trained with it", required=True)
_BATCHES = flags.DEFINE_integer("batches", 8, "batches of 32 held-out frames", lower_bound=1)

SHARPNESS = (0.5, 1.0, 2.0, 4.0, 8.0)


def main(argv: list[str]) -> None:
    import jax
    import jax.numpy as jnp
    import ml_collections
    import numpy as np

    from qdepth_jax import depth, earlier_stages, errors, experiment
    from qdepth_jax.data import loader, normalise, sidecar
    from qdepth_jax.eval import depth_metrics
    from qdepth_jax.models import sampling, tokenizer

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; see --help")
    coder, coder_variables, _ = earlier_stages.load_tokenizer(_TOKENIZER.value)
    _, model, variables, meta = earlier_stages.load_model(_POLICY.value)
    identity = tokenizer.identity(coder, coder_variables["params"], coder_variables["state"])
    if meta["tokenizer"] != identity:
        raise errors.UserError(f"the policy was trained with tokenizer {meta['tokenizer']}, --tokenizer is {identity}")
    config = ml_collections.ConfigDict(meta["config"])
    data = experiment.held_out_section(config, experiment.data_section(config))
    data = earlier_stages.with_tokens(data, _TOKENIZER.value)
    normalisers = {
        name: {key: normalise.Normaliser.from_json(text) for key, text in pair.items()}
        for name, pair in meta["data"]["normalisation"].items()
    }
    features = [f"image_{v}" for v in model.views] + ["text", "proprio", "position", "depth_tokens"]
    features += ["depth_tokens_mask", "depth", "depth_scale", "depth_offset"]
    reader = loader.Loader(data, features, 32, normalisers=normalisers)

    @jax.jit
    def maps(batch):
        params, state = coder_variables["params"], coder_variables["state"]
        x, valid = tokenizer.preprocess(coder, batch["depth"], batch["depth_scale"], batch["depth_offset"])
        logits = sampling.predict_depth(model, variables["params"], variables["state"], batch)
        out = {
            "true tokens": tokenizer.decode(coder, params, state, batch["depth_tokens"]),
            "most likely code": tokenizer.decode(coder, params, state, jnp.argmax(logits, axis=-1)),
        }
        for sharpness in SHARPNESS:
            p = jax.nn.softmax(logits * sharpness, axis=-1)
            out[f"expected code, logits x {sharpness:g}"] = tokenizer.decode_expected(coder, params, state, p)
        return out, x, valid

    sums: dict[str, depth_metrics.DepthSums] = {}
    for number in range(min(_BATCHES.value, max(1, reader.frames // 32))):
        batch = reader.batch(number)
        decoded, x, valid = jax.device_get(maps(batch))
        valid = valid & sidecar.token_pixels(np.asarray(batch["depth_tokens_mask"], bool), valid.shape[1])
        truth = np.asarray(depth.denormalise(x, coder.range))
        decoded["constant per token"] = None
        for name, value in decoded.items():
            if value is None:
                value = depth_metrics.constant_per_token(truth, valid, coder.grid)
            else:
                value = np.asarray(depth.denormalise(value, coder.range))
            sums.setdefault(name, depth_metrics.DepthSums()).add(value, truth, valid)
    reader.close()
    print(json.dumps({name: {k: one.result()[k] for k in ("rmse", "abs_rel")} for name, one in sums.items()}))


if __name__ == "__main__":
    command.run(main)

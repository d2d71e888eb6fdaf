"""A training run on the episodes that it held out: which they are, and its figures on them (offline.py).

Depth of every kind of policy is compared in one unit: decoded codes and regressed pixels against the truth on the
tokenizer's grid of pixels. Beside it stand the mean depth map of the training frames, which looks at nothing, and the
true tokens decoded: what the tokenizer loses by itself, which no policy with codes can undo.
"""

from typing import Any

import jax
import ml_collections
import numpy as np

from qdepth_jax import depth, earlier_stages, errors, experiment
from qdepth_jax.data import data_config, loader, normalise, sidecar
from qdepth_jax.eval import depth_metrics, offline
from qdepth_jax.models import depth_expert, policy, tokenizer

MEAN_MAP_FRAMES = 512


def data_of(meta: dict[str, Any]) -> data_config.DataConfig:
    """DataConfig of the held-out episodes of a run.

    Raises:
      UserError: it held none out.
    """
    config = ml_collections.ConfigDict(meta["config"])
    data = experiment.held_out_section(config, experiment.data_section(config))
    if data is None:
        raise errors.UserError(
            "this run held no episodes out (eval_split, data.held_out_every): nothing honest to report"
        )
    return data


def normalisers(meta: dict[str, Any]) -> dict[str, dict[str, normalise.Normaliser]]:
    """Data set -> {"action", "proprio"} normalisers of a run."""
    return {
        name: {key: normalise.Normaliser.from_json(text) for key, text in pair.items()}
        for name, pair in meta["data"]["normalisation"].items()
    }


def policy_result(workdir: str, batches: int) -> tuple[policy.PolicyConfig, offline.Result, dict[str, Any], int]:
    """(model config, result on held-out frames, meta, parameter count) of a policy's run."""
    kind, model, variables, meta = earlier_stages.load_model(workdir)
    if kind != "policy":
        raise errors.UserError(f"{workdir!r} holds a {kind}, not a policy")
    data = data_of(meta)
    if meta["tokenizer"]:
        data = earlier_stages.with_tokens(data, meta["config"]["tokenizer"])
    result = offline.evaluate(model, variables, data, normalisers(meta), batches)
    return model, result, meta, sum(x.size for x in jax.tree.leaves(variables["params"]))


def figures(workdir: str, batches: int, tokenizer_workdir: str = "") -> dict[str, Any]:
    """What a policy does on held-out frames, as JSON.

    Args:
      tokenizer_workdir: decodes codes; "" = no figures of depth in its unit.

    Returns:
      offline.Result.figures and {"step", "parameters", "depth_offset"}, the last in frames; with a tokenizer and a
      policy that was trained to say depth, "depth": {"unit", "policy", "mean_map", and for codes "tokenizer"}, each as
      depth_metrics.DepthSums.result.

    Raises:
      UserError: the policy was trained with the codes of another tokenizer.
    """
    model, result, meta, parameters = policy_result(workdir, batches)
    ahead = data_of(meta).depth_offset
    out = {"step": meta["step"], "parameters": parameters, "depth_offset": ahead, **result.figures}
    if tokenizer_workdir and result.raw_depth is not None:
        config, variables, _ = earlier_stages.load_tokenizer(tokenizer_workdir)
        identity = tokenizer.identity(config, variables["params"], variables["state"])
        if meta["tokenizer"] not in ("", identity):
            raise errors.UserError(
                f"the policy in {workdir!r} was trained with depth tokenizer {meta['tokenizer']}, "
                f"{tokenizer_workdir!r} is {identity}: name the one it was trained with"
            )
        out["depth"] = _depth_figures(model, result, config, variables, _mean_map(meta, config))
    return out


def _depth_figures(
    model: policy.PolicyConfig,
    result: offline.Result,
    config: tokenizer.TokenizerConfig,
    variables: dict[str, Any],
    mean_map: np.ndarray,
) -> dict[str, Any]:
    x, seen = tokenizer.preprocess(config, result.raw_depth, result.scale, result.offset)
    truth, valid = np.asarray(depth.denormalise(x, config.range)), np.array(seen)
    # Judged where a token stands for depth, by the same rule for codes and pixels.
    kept = sidecar.token_validity(valid, config.grid)
    valid &= sidecar.token_pixels(kept, config.depth_size)
    guesses = {"mean_map": np.broadcast_to(mean_map, truth.shape)}
    if result.codes is not None:
        decode = jax.jit(lambda v, codes: tokenizer.decode(config, v["params"], v["state"], codes))
        # Not the stored tokens: those that stand for no depth are only marked there, and what the tokenizer has in
        # their place reaches their neighbours' pixels.
        own = jax.jit(lambda v, x, seen: tokenizer.encode(config, v["params"], v["state"], x, seen))(variables, x, seen)
        for name, codes in (("policy", result.codes), ("tokenizer", own)):
            guesses[name] = np.asarray(depth.denormalise(decode(variables, codes), config.range))
    else:
        x = depth_expert.pixel_map(result.pixels, model.depth)
        guesses["policy"] = _nearest(np.asarray(depth.denormalise(np.clip(x, -1, 1), model.depth.range)), truth)
    out: dict[str, Any] = {"unit": "m" if config.range.kind == "metric" else "relative inverse depth"}
    for name, guess in guesses.items():
        sums = depth_metrics.DepthSums()
        sums.add(guess, truth, valid)
        out[name] = sums.result()
    return out


def _nearest(maps: np.ndarray, like: np.ndarray) -> np.ndarray:
    """f32 [N, S, S] sampled at the places of [N, R, R]."""
    rows = (np.arange(like.shape[1]) * 2 + 1) * maps.shape[1] // (2 * like.shape[1])
    return maps[:, rows][:, :, rows]


def _mean_map(meta: dict[str, Any], config: tokenizer.TokenizerConfig) -> np.ndarray:
    """Mean of every pixel over training frames, f32 [R, R]; the middle of the range where none was valid."""
    data = experiment.data_section(ml_collections.ConfigDict(meta["config"]))
    reader = loader.Loader(data, ("depth", "depth_scale", "depth_offset"), 32, normalisers=normalisers(meta))
    total, count = 0.0, 0
    for i in range(max(1, min(MEAN_MAP_FRAMES, reader.frames) // 32)):
        batch = reader.batch(i)
        x, seen = tokenizer.preprocess(config, batch["depth"], batch["depth_scale"], batch["depth_offset"])
        truth, valid = np.asarray(depth.denormalise(x, config.range)), np.asarray(seen)
        total, count = total + np.where(valid, truth, 0.0).sum(axis=0), count + valid.sum(axis=0)
    reader.close()
    middle = (config.range.near + config.range.far) / 2
    return np.where(count > 0, total / np.maximum(count, 1), middle).astype(np.float32)

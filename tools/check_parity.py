"""Checks our model against golden vectors of another code base: foreign weights in, our outputs against theirs.

  python tools/check_parity.py FIXTURE.npz

The file says everything itself: sizes and conventions in its `config`, weights, inputs and reference outputs.
Layout known so far: open-pi-zero (arrays `w/<state-dict key>`; `grad_norm/<key>` may be absent, all else is needed).
Exit code 0: within tolerance; 1: not; 2: the file cannot be used. The last line of stdout is JSON.
"""

import json
import pathlib
import re
import sys

from absl import app, flags

_ABSOLUTE = flags.DEFINE_float("absolute", 2e-5, "Largest absolute error of features, velocities and actions.")
_RELATIVE = flags.DEFINE_float("relative", 1e-4, "Largest relative error of the loss and of gradient norms.")

INPUTS = ("input_ids", "pixel_values", "proprio", "actions", "t", "noise", "infer_noise")
OUTPUTS = ("vision_features", "velocity", "loss", "infer_actions")


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    import jax

    from qdepth_jax import errors

    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        if len(argv) != 2:
            raise errors.UserError(f"usage: check_parity.py FIXTURE.npz (got {len(argv) - 1} arguments)")
        arrays = read(pathlib.Path(argv[1]))
        rows = compare_open_pi_zero(arrays, _ABSOLUTE.value, _RELATIVE.value)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return 2
    return report(rows)


def read(path: pathlib.Path) -> dict:
    """All arrays of a golden file, checked to have the open-pi-zero layout."""
    import zipfile

    import numpy as np

    from qdepth_jax import errors

    if not path.is_file():
        raise errors.UserError(f"{path} is no file: give the path of a golden .npz")
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise errors.UserError(f"{path} cannot be read as .npz: {error}") from error
    if "config" not in arrays or not any(name.startswith("w/") for name in arrays):
        raise errors.UserError(
            f"{path} has an unknown layout: this tool reads open-pi-zero files with `config` and `w/...`; "
            f"found {sorted(arrays)[:4]}..."
        )
    if missing := [name for name in (*INPUTS, *OUTPUTS) if name not in arrays]:
        raise errors.UserError(f"{path} lacks {missing}")
    return arrays


def policy_from(arrays: dict):
    """The PolicyConfig that the file's JSON describes."""
    from qdepth_jax import errors
    from qdepth_jax.models import flow, gemma, policy, siglip

    try:
        c = json.loads(str(arrays["config"]))
        tokens = arrays["input_ids"].shape[1]
        if c.get("adaptive") is not None:
            raise errors.UserError(f"adaptive mode {c['adaptive']!r} of open-pi-zero is not supported: only null")
        return policy.PolicyConfig(
            siglip=siglip.SiglipConfig(
                image_size=c["image_size"],
                patch=c["patch_size"],
                width=c["vision_width"],
                depth=c["vision_depth"],
                heads=c["vision_heads"],
                mlp=c["vision_mlp"],
            ),
            vlm=gemma.ExpertConfig(c["vlm_width"], c["vlm_mlp"], c["vlm_rope_theta"]),
            action=gemma.ExpertConfig(c["expert_width"], c["expert_mlp"], c["expert_rope_theta"]),
            depth=None,
            layers=c["depth"],
            heads=c["num_heads"],
            kv_heads=c["num_kv_heads"],
            head_dim=c["head_dim"],
            text_length=tokens - c["num_image_tokens"],
            vocabulary=c["vocab_size"],
            proprio_dim=c["proprio_dim"],
            proprio_steps=c["cond_steps"],
            action_dim=c["action_dim"],
            horizon=c["horizon"],
            flow=flow.FlowConfig(
                sigma_min=c["flow_sig_min"],
                time_period=c["time_max_period"],
                steps=c["num_inference_steps"],
                clip=c["final_action_clip"],
            ),
            softcap=c["attn_softclamp"],
            norm_eps=c["rms_norm_eps"],
            freeze_embedding=False,
            faithful=True,
        ), c
    except json.JSONDecodeError as error:
        raise errors.UserError(f"the file's config is no JSON: {error}") from error
    except KeyError as error:
        raise errors.UserError(f"the file's config lacks {error}") from error


def text_from(arrays: dict, c: dict):
    """input_ids [B, T] -> text i32 [B, L], after checking that the layout is image tokens, text, padding."""
    import numpy as np

    from qdepth_jax import errors

    ids, images = arrays["input_ids"], c["num_image_tokens"]
    text = ids[:, images:]
    real = text != c["pad_token_id"]
    if not (ids[:, :images] == c["image_token_id"]).all() or (text == c["image_token_id"]).any():
        raise errors.UserError(f"input_ids must be {images} image tokens ({c['image_token_id']}), then text")
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise errors.UserError("input_ids must be padded on the right")
    return np.where(real, text, 0).astype(np.int32)


def compare_open_pi_zero(arrays: dict, absolute: float, relative: float) -> list[dict]:
    """Runs our model on the file's inputs. One row for each output: name, error, tolerance, kind."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qdepth_jax import errors
    from qdepth_jax.models import flow, policy
    from qdepth_jax.weights import open_pi_zero

    config, c = policy_from(arrays)
    shapes = jax.eval_shape(lambda: policy.init(config, jax.random.key(0)))["params"]
    weights = {name.removeprefix("w/"): array for name, array in arrays.items() if name.startswith("w/")}
    params = jax.tree.map(jnp.asarray, open_pi_zero.load(weights, shapes).params)
    batch = {
        "image_main": arrays["pixel_values"],
        "text": text_from(arrays, c),
        "proprio": arrays["proprio"],
        "action": arrays["actions"],
    }
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    noise, t = jnp.asarray(arrays["noise"]), jnp.asarray(arrays["t"])

    def forward(p):
        x_t = flow.interpolate(noise, batch["action"], t, config.flow)
        images = policy.prepare_images(config, batch)
        return policy.Policy(config).apply({"params": p}, images, batch["text"], batch["proprio"], x_t, t)

    def loss(p):
        return policy.loss_at(config, p, {}, batch, noise, t, 0).loss

    def sample(p, cached):
        return policy.sample_actions(config, p, {}, batch, jnp.asarray(arrays["infer_noise"]), cached=cached)

    out = jax.jit(forward)(params)
    with_gradients = any(name.startswith("grad_norm/") for name in arrays)
    if with_gradients:
        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    else:
        print("the file has no gradient norms: gradients are not compared")
        value = jax.jit(loss)(params)
    results = {
        "vision_features": (out.vision_features, arrays["vision_features"]),
        "velocity": (out.velocity, arrays["velocity"]),
        "infer_actions": (jax.jit(sample, static_argnums=1)(params, True), arrays["infer_actions"]),
        "infer_actions_uncached": (jax.jit(sample, static_argnums=1)(params, False), arrays["infer_actions"]),
    }
    rows = []
    for name, (ours, theirs) in results.items():
        if ours.shape != theirs.shape:
            raise errors.UserError(f"{name}: the file's shape {theirs.shape} is not the model's {ours.shape}")
        error = float(np.max(np.abs(np.asarray(ours) - theirs)))
        rows.append({"name": name, "error": error, "tolerance": absolute, "kind": "absolute"})
    error = abs(float(value) - float(arrays["loss"])) / abs(float(arrays["loss"]))
    rows.append({"name": "loss", "error": error, "tolerance": relative, "kind": "relative"})
    if with_gradients:
        rows += gradient_rows(config, arrays, open_pi_zero.save(gradient), relative)
    return rows


def gradient_rows(config, arrays: dict, gradient: dict, relative: float) -> list[dict]:
    """Compares the L2 norm of d loss / d weight for every source key.

    A key that the file lacks got no gradient there, so ours must be exactly zero. The two exceptions have a gradient in
    the maths and none in the original where a file was made with its frozen set: the text embedding and v_proj of the
    vlm's last layer; for those an absent key says nothing. A reference of exactly 0 (q_proj of that layer) must be 0 in
    ours.
    """
    import numpy as np

    last = f"joint_model.mixtures.vlm.layers.{config.layers - 1}.self_attn.v_proj.weight"
    vision_key_bias = re.compile(r"vision_tower\..*\.self_attn\.k_proj\.bias")
    frozen = {"embed_tokens.weight", last}
    reference = {
        name.removeprefix("grad_norm/"): float(array) for name, array in arrays.items() if name.startswith("grad_norm/")
    }
    shared = "joint_model.mixtures."
    total = float(np.sqrt(sum(norm**2 for norm in reference.values())))
    rows = []
    for key in sorted(set(gradient) | set(reference)):
        name = f"grad_norm/{key}"
        if key not in gradient:
            rows.append({"name": name, "error": float("inf"), "tolerance": 0.0, "kind": "unknown key"})
            continue
        norm = float(np.sqrt(np.sum(np.square(gradient[key].astype(np.float64)))))
        twin = key.replace(shared + "proprio.", shared + "action.")
        if twin == key:
            twin = key.replace(shared + "action.", shared + "proprio.")
        if key in reference and vision_key_bias.fullmatch(key):
            # Softmax ignores a constant added to all logits: zero in the maths, rounding on both sides.
            error = max(norm, reference[key]) / total
            rows.append({"name": name, "error": error, "tolerance": 1e-6, "kind": "rounding of zero, of total"})
        elif key in reference and reference[key] != 0:
            error = abs(norm - reference[key]) / reference[key]
            rows.append({"name": name, "error": error, "tolerance": relative, "kind": "relative"})
        elif key in reference or not (twin in reference or key in frozen):
            # The shared expert is listed under one of its two names; under the other it is absent by design.
            rows.append({"name": name, "error": norm, "tolerance": 0.0, "kind": "exactly zero"})
    return rows


def report(rows: list[dict]) -> int:
    """Prints the table and the JSON line; the exit code."""
    import math

    failed = [row for row in rows if not row["error"] <= row["tolerance"]]
    print(f"{'output':<88} {'error':>10} {'tolerance':>10}  kind")
    for row in rows:
        mark = "  <-- FAIL" if row in failed else ""
        print(f"{row['name']:<88} {row['error']:>10.2e} {row['tolerance']:>10.1e}  {row['kind']}{mark}")
    groups: dict[str, float] = {}
    for row in rows:
        group = row["name"].split("/")[0]
        if "zero" in row["kind"]:
            group += "_zero"
        error = row["error"] if math.isfinite(row["error"]) else float("inf")
        groups[group] = max(groups.get(group, 0.0), error)
    text = {name: value if math.isfinite(value) else str(value) for name, value in groups.items()}
    print(json.dumps({"ok": not failed, "failed": len(failed), "compared": len(rows), **text}))
    return 1 if failed else 0


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))

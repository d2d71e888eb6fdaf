"""Golden vectors of open-pi-zero: its state dict in, features, velocity, loss, gradient norms and actions compared.

Arrays: `w/<state-dict key>`, inputs and outputs as named below, `config` (JSON: sizes and conventions), and optionally
`grad_norm/<key>`, the L2 norm of d loss / d weight.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from qdepth_jax import errors
from qdepth_jax.models import flow, gemma, policy, sampling, siglip
from qdepth_jax.weights import open_pi_zero, parity

NEEDED = (
    "config", "input_ids", "pixel_values", "proprio", "actions", "t", "noise", "infer_noise", "vision_features",
    "velocity", "loss", "infer_actions",
)  # fmt: skip


def compare(arrays: dict[str, np.ndarray], absolute: float, relative: float) -> list[parity.Row]:
    """Runs our policy on the file's inputs; one row for each output and each gradient norm."""
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
        return sampling.sample_actions(config, p, {}, batch, jnp.asarray(arrays["infer_noise"]), cached=cached)

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
    rows = [parity.absolute(name, ours, theirs, absolute) for name, (ours, theirs) in results.items()]
    rows.append(parity.relative("loss", float(value), float(arrays["loss"]), relative))
    if with_gradients:
        rows += gradient_rows(config, arrays, open_pi_zero.save(gradient), relative)
    return rows


def policy_from(arrays: dict[str, np.ndarray]) -> tuple[policy.PolicyConfig, dict]:
    """The PolicyConfig that the file's JSON describes, and the JSON."""
    try:
        c = parity.description(arrays, "config")
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
    except KeyError as error:
        raise errors.UserError(f"the file's config lacks {error}") from error


def text_from(arrays: dict[str, np.ndarray], c: dict) -> np.ndarray:
    """input_ids [B, T] -> text i32 [B, L], after checking that the layout is image tokens, text, padding."""
    ids, images = arrays["input_ids"], c["num_image_tokens"]
    text = ids[:, images:]
    real = text != c["pad_token_id"]
    if not (ids[:, :images] == c["image_token_id"]).all() or (text == c["image_token_id"]).any():
        raise errors.UserError(f"input_ids must be {images} image tokens ({c['image_token_id']}), then text")
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise errors.UserError("input_ids must be padded on the right")
    return np.where(real, text, 0).astype(np.int32)


def gradient_rows(
    config: policy.PolicyConfig, arrays: dict[str, np.ndarray], gradient: dict[str, np.ndarray], relative: float
) -> list[parity.Row]:
    """Compares the L2 norm of d loss / d weight for every source key.

    A key that the file lacks got no gradient there, so ours must be exactly zero. The two exceptions have a gradient in
    the maths and none in the original where a file was made with its frozen set: the text embedding and v_proj of the
    vlm's last layer; for those an absent key says nothing. A reference of exactly 0 (q_proj of that layer) must be 0 in
    ours.
    """
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
            rows.append(parity.Row(name, float("inf"), 0.0, "unknown key"))
            continue
        norm = float(np.sqrt(np.sum(np.square(gradient[key].astype(np.float64)))))
        twin = key.replace(shared + "proprio.", shared + "action.")
        if twin == key:
            twin = key.replace(shared + "action.", shared + "proprio.")
        if key in reference and vision_key_bias.fullmatch(key):
            # Softmax ignores a constant added to all logits: zero in the maths, rounding on both sides.
            error = max(norm, reference[key]) / total
            rows.append(parity.Row(name, error, 1e-6, "rounding of zero, of total"))
        elif key in reference and reference[key] != 0:
            error = abs(norm - reference[key]) / reference[key]
            rows.append(parity.Row(name, error, relative, "relative"))
        elif key in reference or not (twin in reference or key in frozen):
            # The shared expert is listed under one of its two names; under the other it is absent by design.
            rows.append(parity.Row(name, norm, 0.0, "exactly zero"))
    return rows

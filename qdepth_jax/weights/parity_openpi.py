"""Golden vectors of openpi, pi0 and pi0.5: its parameters in, velocity, loss and sampled actions compared.

Arrays: `params/...` as in its checkpoints; `ref/image/CAMERA` f32 [B, S, S, 3] and `ref/image_mask/CAMERA` bool [B] of
any number of cameras, `ref/tokens`, `ref/token_mask`, `ref/state` [B, A], `ref/actions`, `ref/noise`, `ref/time`, the
outputs `ref/velocity` and `ref/sample_actions`, and `ref/config` (JSON: horizon, periods of the time embedding).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qdepth_jax import errors
from qdepth_jax.models import flow, policy, sampling
from qdepth_jax.weights import openpi, parity, table

NEEDED = tuple(
    f"ref/{name}"
    for name in ("config", "tokens", "token_mask", "state", "actions", "noise", "time", "velocity", "sample_actions")
)
# The order of tokens where a file has these cameras (openpi, models/model.py); others follow as the file has them.
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def compare(arrays: dict[str, np.ndarray], absolute: float, relative: float) -> list[parity.Row]:
    """Runs our policy on the file's inputs, sampling with and without the cache; one row for each output."""
    config, params = policy_from(arrays)
    batch = batch_from(config, arrays)
    noise, t = jnp.asarray(arrays["ref/noise"]), jnp.asarray(arrays["ref/time"])

    def forward(p):
        x_t = flow.interpolate(noise, batch["action"], t, config.flow)
        inputs = policy.prepare_images(config, batch), batch["text"], batch.get("proprio"), x_t, t, batch["view_mask"]
        velocity = policy.Policy(config).apply({"params": p}, *inputs).velocity
        return velocity, policy.loss_at(config, p, {}, batch, noise, t, 0).loss

    def sample(p, cached):
        return sampling.sample_actions(config, p, {}, batch, noise, cached=cached)

    velocity, loss = jax.jit(forward)(params)
    target = arrays["ref/noise"] - arrays["ref/actions"]
    expected = float(np.mean(np.square(arrays["ref/velocity"].astype(np.float64) - target)))
    return [
        parity.absolute("velocity", velocity, arrays["ref/velocity"], absolute),
        parity.relative("loss", float(loss), expected, relative),
        *(
            parity.absolute(
                "sample_actions" if cached else "sample_actions_uncached",
                jax.jit(sample, static_argnums=1)(params, cached),
                arrays["ref/sample_actions"],
                absolute,
            )
            for cached in (True, False)
        ),
    ]


def policy_from(arrays: dict[str, np.ndarray]) -> tuple[policy.PolicyConfig, dict]:
    """The PolicyConfig of the file, and its parameters as ours.

    The text embedding gets a row in front, and token ids are shifted by one: our padding is token 0, while openpi marks
    padding by a mask, so that a file may use token 0 as a word.
    """
    c = parity.description(arrays, "ref/config")
    weights = {name: array for name, array in arrays.items() if name.startswith("params/")}
    horizon = arrays["ref/actions"].shape[1]
    changes = {"views": cameras(arrays), "missing_views": True, "faithful": True}
    config = openpi.config_of(weights, text_length=arrays["ref/tokens"].shape[1], horizon=horizon, **changes)
    shortest = c.get("posemb_min_period", config.flow.time_shortest)
    longest = c.get("posemb_max_period", shortest * config.flow.time_period)
    times = dataclasses.replace(
        config.flow, time_shortest=shortest, time_period=longest / shortest, steps=c.get("num_steps", config.flow.steps)
    )
    if c.get("pi05", config.action_time == "adaptive") != (config.action_time == "adaptive"):
        raise errors.UserError(f"the file's config says pi05={c['pi05']}, its weights have {config.action_time} time")
    shapes = jax.eval_shape(lambda: policy.init(config, jax.random.key(0)))["params"]
    params = table.load(weights, openpi.rows(config), shapes, openpi.TITLE, openpi.clean).params
    embedder = params["llm"]["embedder"]
    embedder["input_embedding"] = np.pad(embedder["input_embedding"], ((1, 0), (0, 0)))
    config = dataclasses.replace(config, flow=times, vocabulary=config.vocabulary + 1)
    return config, jax.tree.map(jnp.asarray, params)


def cameras(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The file's cameras in the order of their tokens."""
    found = [name.removeprefix("ref/image/") for name in arrays if name.startswith("ref/image/")]
    if not found or (lacking := [name for name in found if f"ref/image_mask/{name}" not in arrays]):
        raise errors.UserError(f"the file lacks ref/image/CAMERA, or ref/image_mask of {lacking if found else 'it'}")
    return (*(name for name in CAMERAS if name in found), *(name for name in found if name not in CAMERAS))


def batch_from(config: policy.PolicyConfig, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The file's inputs as one batch of the policy."""
    tokens = arrays["ref/tokens"].astype(np.int32)
    if tokens.min() < 0 or tokens.max() + 1 >= config.vocabulary:
        raise errors.UserError(f"ref/tokens has ids outside the vocabulary of {config.vocabulary - 1}")
    batch = {f"image_{view}": arrays[f"ref/image/{view}"] for view in config.views}
    batch["view_mask"] = np.stack([arrays[f"ref/image_mask/{view}"] for view in config.views], axis=1)
    batch["text"] = np.where(arrays["ref/token_mask"], tokens + 1, 0)
    batch["action"] = arrays["ref/actions"]
    if config.proprio_steps:
        batch["proprio"] = arrays["ref/state"][:, None]
    return {name: jnp.asarray(array) for name, array in batch.items()}

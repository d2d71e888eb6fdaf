"""A trained policy as one function from a robot's observation to actions in the robot's own units."""

import re
from collections.abc import Callable

import jax
import numpy as np

from qdepth_jax import errors, exported
from qdepth_jax.data import normalise, text
from qdepth_jax.models import flow, sampling

Observation = dict[str, np.ndarray | str]


def libero_policy(workdir: str, suite: str, seed: int = 0) -> Callable[[Observation], np.ndarray]:
    """The policy of a training run for one LIBERO suite, with that suite's normalisation.

    Args:
      workdir: of the training run, or an export of it.
      suite: data set whose statistics are used; LIBERO-PRO variants use those of their base suite.
      seed: of the flow noise; every call draws anew.

    Returns:
      observation {image, wrist_image u8 [H, W, 3], state f32 [8], instruction str} -> f32 [Z, 7], gripper -1 open, +1
      close.

    Raises:
      UserError: no policy there, or none that was trained on this suite.
    """
    found = exported.load(workdir)
    config, variables, stored = found.model, found.variables, found.statistics
    if found.kind != "policy":
        raise errors.UserError(f"{workdir!r} holds a {found.kind}, not a policy")
    if config.proprio_steps > 1 or config.image_steps > 1:
        raise errors.UserError(
            f"the policy in {workdir!r} observes {config.proprio_steps} steps of proprioception and "
            f"{config.image_steps} images; closed loop keeps no history yet: train with one of each"
        )
    base = next((name for name in stored if re.fullmatch(f"{name}(_.*)?", suite)), None)
    if base is None:
        raise errors.UserError(f"the policy in {workdir!r} was trained on {sorted(stored)}, not on {suite!r}")
    action, proprio = (stored[base][key] for key in ("action", "proprio"))
    tokenizer = text.TextTokenizer(found.text_tokenizer)
    cameras = {"main": "image", "wrist": "wrist_image"}

    @jax.jit
    def predict(variables, batch, key):
        noise = flow.sample_noise(jax.random.split(key, 1), (config.horizon, config.action_dim))
        return sampling.sample_actions(config, variables["params"], variables["state"], batch, noise)

    calls = iter(range(2**31))

    def act(observation: Observation) -> np.ndarray:
        state = normalise.normalise(np.asarray(observation["state"], np.float32)[None], proprio)
        ids, _ = tokenizer.encode_table([observation["instruction"]], found.max_text_tokens, found.text_rule, state)
        batch = {f"image_{view}": np.asarray(observation[cameras[view]])[None] for view in config.views}
        filled = np.pad(state, ((0, 0), (0, max(0, found.proprio_dim - state.shape[1]))))
        batch |= {"text": ids, "proprio": filled[:, None]}
        key = jax.random.fold_in(jax.random.key(seed), next(calls))
        chunk = np.asarray(predict(variables, batch, key))[0]
        return to_libero(normalise.unnormalise(chunk, action))

    return act


def to_libero(actions: np.ndarray) -> np.ndarray:
    """Standardised actions f32 [Z, 7] (gripper 1 open, 0 closed) to LIBERO's (gripper -1 open, +1 close)."""
    gripper = np.where(actions[:, 6:] > 0.5, -1.0, 1.0)
    return np.concatenate([np.clip(actions[:, :6], -1.0, 1.0), gripper], axis=1).astype(np.float32)

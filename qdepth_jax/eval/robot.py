"""A trained policy as one function from a robot's observation to actions in the robot's own units."""

from collections.abc import Callable

import numpy as np

from qdepth_jax import errors, planner
from qdepth_jax.models import inference
from qdepth_jax.sim import actions

Observation = dict[str, np.ndarray | str]
CAMERAS = {"main": "image", "wrist": "wrist_image"}


def libero_policy(
    workdir: str, suite: str, seed: int = 0, options: inference.Inference | None = None
) -> Callable[[Observation], np.ndarray]:
    """The policy of a training run for one LIBERO suite, with that suite's normalisation.

    Args:
      workdir: of the training run, or an export of it.
      suite: data set whose statistics are used; LIBERO-PRO variants use those of their base suite.
      seed: of the flow noise; every call draws anew.
      options: steps and solver of the flow, and how weights are held.

    Returns:
      observation {image, wrist_image u8 [H, W, 3], state f32 [8], instruction str} -> f32 [Z, 7], gripper -1 open, +1
      close.

    Raises:
      UserError: no policy there, or none for this suite, its cameras or its states.
    """
    loaded = planner.load(workdir, suite, options=options)
    if unknown := sorted(set(loaded.config.views) - set(CAMERAS)):
        raise errors.UserError(
            f"the policy in {workdir!r} sees the cameras {loaded.config.views}; LIBERO has {sorted(CAMERAS)}, not "
            f"{unknown}"
        )
    calls = iter(range(2**31))

    def act(observation: Observation) -> np.ndarray:
        pictures = {view: np.asarray(observation[CAMERAS[view]]) for view in loaded.config.views}
        row = planner.make_row(
            loaded, pictures, observation["state"], observation["instruction"], seed, next(calls)
        )  # fmt: skip
        return actions.to_libero(planner.plan(loaded, [row])[0])

    return act

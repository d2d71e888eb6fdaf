"""SIMPLER's WidowX tasks (Bridge data) for closed-loop evaluation: an adapter as simulator.py describes it.

Published protocol (open-pi-zero): 24 placements of the objects, ten episodes each, all 4 actions of a chunk executed
(--execute=4).
"""

from qdepth_jax import errors
from qdepth_jax.sim import simpler, simulator

ROBOT = simulator.Robot(
    "simpler_widowx", ("main",), 7, simpler.ACTION_DIM, 5.0, simpler.to_widowx, dataset="bridge_dataset"
)
KIND = simpler.Kind(simpler.widowx_state, sticky=False)
STARTS = 240
# name in simpler_env.ENVIRONMENTS, instruction, steps of an episode (mani_skill2_real2sim, put_on_in_scene.py)
TASKS = (
    ("widowx_carrot_on_plate", "put carrot on plate", 60),
    ("widowx_put_eggplant_in_basket", "put eggplant into yellow basket", 120),
    ("widowx_spoon_on_towel", "put the spoon on the towel", 60),
    ("widowx_stack_cube", "stack the green block on the yellow block", 60),
)


def list_tasks(suite: str) -> list[simulator.Task]:
    if suite != ROBOT.name:
        raise errors.UserError(f"unknown SIMPLER suite {suite!r}: simpler_widowx, simpler_google")
    simpler.import_simpler()
    return simpler.listed(suite, TASKS, STARTS, __name__)


def make_env(task: simulator.Task, image_size: int, supersample: int) -> simpler.Env:
    """image_size and supersample change nothing: SIMPLER's cameras have sizes of their own."""
    return simpler.Env(task, KIND)


def versions() -> dict[str, str]:
    return simpler.versions()

"""SIMPLER's Google robot tasks (Fractal data) for closed-loop evaluation: an adapter as simulator.py describes it.

Published protocol (open-pi-zero): 2 of the 4 actions of a chunk are executed (--execute=2), the gripper is sticky. The
published rates average over looks of the scene (urdf_version) and places of the robot that simpler_env.make does not
vary: a rate from here is that of its default look, not comparable with the published averages.
"""

from qdepth_jax import errors
from qdepth_jax.sim import simpler, simulator

ROBOT = simulator.Robot(
    "simpler_google", ("main",), 8, simpler.ACTION_DIM, 3.0, simpler.to_google, dataset="fractal20220817_data"
)
KIND = simpler.Kind(simpler.google_state, sticky=True)
STARTS = 240
# name in simpler_env.ENVIRONMENTS, instruction (an episode's own is read from it), steps of an episode
TASKS = (
    ("google_robot_pick_horizontal_coke_can", "pick coke can", 80),
    ("google_robot_pick_vertical_coke_can", "pick coke can", 80),
    ("google_robot_pick_standing_coke_can", "pick coke can", 80),
    ("google_robot_move_near", "move the object near the other", 80),
    ("google_robot_open_top_drawer", "open top drawer", 113),
    ("google_robot_open_middle_drawer", "open middle drawer", 113),
    ("google_robot_open_bottom_drawer", "open bottom drawer", 113),
    ("google_robot_close_top_drawer", "close top drawer", 113),
    ("google_robot_close_middle_drawer", "close middle drawer", 113),
    ("google_robot_close_bottom_drawer", "close bottom drawer", 113),
    ("google_robot_place_apple_in_closed_top_drawer", "open top drawer", 200),
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

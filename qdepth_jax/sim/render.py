"""RGB and true metric depth of a MuJoCo scene from one GL pass.

Three things make the depth buffer lie, and all are switched off here:
  * multisampling: a resolved depth sample at an object's edge lies between the two surfaces, up to metres away from
    either; so `offsamples = 0`, and smooth RGB comes from rendering larger and averaging blocks (depth takes the
    nearest sample);
  * sites (transparent markers such as the gripper axis) and collision geoms, which are drawn into depth: both hidden.
"""

import logging
import os
import sys
from pathlib import Path

import numpy as np

from qdepth_jax import errors

GL_PACKAGES = "libosmesa6 libegl1 libegl-mesa0 libgl1-mesa-dri libgles2 libopengl0"


def _gl_fix(backend: str | None) -> str:
    if backend in ("osmesa", "egl"):
        return f"On Debian or Ubuntu: apt-get install -y --no-install-recommends {GL_PACKAGES}"
    return "Set MUJOCO_GL=osmesa (CPU) or egl (GPU): what else MuJoCo knows needs a display"


def choose_gl_backend() -> str:
    """Sets MUJOCO_GL before MuJoCo is imported: the user's choice, else egl beside a GPU, else osmesa. Returns it."""
    if "mujoco" in sys.modules and "MUJOCO_GL" not in os.environ:
        raise errors.UserError(
            "mujoco was imported before its GL backend was chosen: set MUJOCO_GL=osmesa (CPU) or egl (GPU), "
            "or import mujoco after qdepth_jax.sim"
        )
    default = "egl" if Path("/dev/nvidia0").exists() else "osmesa"
    backend = os.environ.setdefault("MUJOCO_GL", default)
    os.environ.setdefault("PYOPENGL_PLATFORM", backend)
    return backend


def import_mujoco():
    """The mujoco module with a working GL backend. Raises UserError with the fix when either is missing."""
    backend = choose_gl_backend()
    logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it tells at every start that it has no accelerator
    try:
        import mujoco

        mujoco.GLContext  # noqa: B018  absent when the backend's library could not be loaded
    except ModuleNotFoundError as error:
        raise errors.UserError(
            f"the simulator needs the Python package {error.name!r}: pip install -e '.[sim]'"
        ) from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # RuntimeError: a backend it does not know
        raise errors.UserError(
            f"MuJoCo cannot load an off-screen GL library for MUJOCO_GL={backend} ({error}). {_gl_fix(backend)}"
        ) from error
    return mujoco


class SceneRenderer:
    """Renders fixed cameras of one compiled model.

    A context belongs to one model and one thread; make a new one after a hard reset of the environment.
    """

    def __init__(self, model, height: int, width: int, supersample: int = 2, hidden_groups: tuple[int, ...] = (0,)):
        """model: mujoco.MjModel. RGB is averaged over supersample x supersample samples per pixel.

        hidden_groups: geom groups of the scene that hold collision geometry; 0 in robosuite and so in LIBERO.
        """
        if min(height, width, supersample) < 1:
            raise ValueError(f"render size {height}x{width}, supersample {supersample}: all must be >= 1")
        mujoco = self._mujoco = import_mujoco()
        self._model, self._height, self._width, self._factor = model, height, width, supersample
        rows, columns = height * supersample, width * supersample
        model.vis.quality.offsamples = 0
        model.vis.global_.offheight = max(model.vis.global_.offheight, rows)
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, columns)
        try:
            self._gl = mujoco.GLContext(columns, rows)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
        except Exception as error:  # each GL backend raises its own kinds
            raise errors.UserError(
                f"no off-screen GL context with MUJOCO_GL={(backend := os.environ.get('MUJOCO_GL'))} ({error}). "
                f"{_gl_fix(backend)}"
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        self._option = visible_geometry(mujoco, hidden_groups)
        self._option_with_sites = visible_geometry(mujoco, hidden_groups, sites=True)
        self._rect = mujoco.MjrRect(0, 0, columns, rows)
        self._rgb = np.empty((rows, columns, 3), np.uint8)
        self._z = np.empty((rows, columns), np.float32)

    def sample(self, data, camera: str, sites: bool = False, effects: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """All samples of one view, upright as the camera sees it, before averaging.

        With sites=True the depth holds them too: take it from another call, with
        effects=False (no shadows or reflections, which depth does not show) several times faster.

        Returns rgb u8 [h, w, 3] and depth f32 [h, w] in metres along the optical axis; h, w = size times supersample.
        """
        mujoco, model = self._mujoco, self._model
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if view.fixedcamid < 0:
            known = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_CAMERA, k) for k in range(model.ncam)]
            raise ValueError(f"the scene has no camera {camera!r}; it has {known}")
        option = self._option_with_sites if sites else self._option
        mujoco.mjv_updateScene(model, data, option, None, view, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = effects
        self._gl.make_current()
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(self._rgb, self._z, self._rect, self._context)
        # GL rows run bottom-up. The buffer holds 1 at the near plane and 0 at the far plane.
        near = model.vis.map.znear * model.stat.extent
        far = model.vis.map.zfar * model.stat.extent
        depth = near / (1.0 - (1.0 - self._z[::-1]) * (1.0 - near / far))
        return self._rgb[::-1].copy(), depth.astype(np.float32)

    def render(self, data, camera: str, sites: bool = False, effects: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """One view, upright. Returns rgb u8 [H, W, 3] and depth f32 [H, W] in metres.

        Depth of a pixel is that of its nearest sample: always a real surface, never a mean of two.
        """
        rgb, depth = self.sample(data, camera, sites, effects)
        h, w, k = self._height, self._width, self._factor
        rgb = rgb.reshape(h, k, w, k, 3).mean(axis=(1, 3), dtype=np.float32)
        depth = depth.reshape(h, k, w, k).min(axis=(1, 3))
        return np.rint(rgb).astype(np.uint8), depth

    def close(self) -> None:
        self._context.free()
        self._gl.free()


def visible_geometry(mujoco, hidden_groups: tuple[int, ...] = (0,), sites: bool = False):
    """MjvOption that hides the given geom groups and, unless asked for, every site."""
    option = mujoco.MjvOption()
    for group in hidden_groups:
        option.geomgroup[group] = 0
    if not sites:
        option.sitegroup[:] = 0
    return option


def millimetres(depth: np.ndarray) -> np.ndarray:
    """Metres f32 to millimetres u16; 0 (invalid) where not finite, below half a millimetre or above 65.535 m."""
    scaled = np.rint(np.nan_to_num(depth.astype(np.float64) * 1000.0, nan=0.0, posinf=0.0, neginf=0.0))
    return np.where((scaled >= 1) & (scaled <= 65535), scaled, 0).astype(np.uint16)

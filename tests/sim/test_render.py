"""The GL backend: whatever MUJOCO_GL is, what is wrong with it is said with the fix."""

import sys
import types

import pytest

from qdepth_jax import errors
from qdepth_jax.sim import render

# As MuJoCo's gl_context does it.
REFUSES = "raise RuntimeError('invalid value for environment variable MUJOCO_GL: foo')"


@pytest.fixture
def backend(monkeypatch):
    """Sets the environment as a user would."""
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    return lambda name: monkeypatch.setenv("MUJOCO_GL", name)


def test_a_backend_that_mujoco_does_not_know(backend, monkeypatch, tmp_path):
    backend("foo")
    (tmp_path / "mujoco.py").write_text(REFUSES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    with pytest.raises(errors.UserError, match=r"MUJOCO_GL=foo .*Set MUJOCO_GL=osmesa \(CPU\) or egl \(GPU\)"):
        render.import_mujoco()


@pytest.mark.parametrize(
    ("name", "fix"), [("glfw", "Set MUJOCO_GL=osmesa .CPU. or egl"), ("osmesa", "apt-get install")]
)
def test_a_backend_without_a_context(backend, monkeypatch, name, fix):
    """glfw loads without a display, and then has no context; a package would not help."""

    def context(width, height):
        raise RuntimeError("an OpenGL platform library has not been loaded into this process")

    backend(name)
    monkeypatch.setitem(sys.modules, "mujoco", types.SimpleNamespace(GLContext=context))
    quality, size = types.SimpleNamespace(offsamples=4), types.SimpleNamespace(offheight=8, offwidth=8)
    model = types.SimpleNamespace(vis=types.SimpleNamespace(quality=quality, global_=size))
    with pytest.raises(errors.UserError, match=f"no off-screen GL context with MUJOCO_GL={name} .*{fix}"):
        render.SceneRenderer(model, 16, 16)

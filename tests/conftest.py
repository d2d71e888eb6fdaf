"""Test set-up: eight simulated CPU devices, strict rank promotion, full float32 products; the real Bridge sample."""

import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tiny models spend their time in the compiler: without optimisation passes a third of it. What must hold of optimised
# programs (bit-equal resume, the demo) runs in processes of its own, without this.
jax.config.update("jax_disable_most_optimizations", True)

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # experiments/ and tools/ are not part of the installed package
SHARED = pathlib.Path(os.environ.get("QDEPTH_SHARED", ROOT / ".." / "shared"))


@pytest.fixture(scope="session")
def bridge_dir() -> str:
    """The real BridgeData sample in RLDS, where it is there."""
    path = SHARED / "data" / "bridge_dataset" / "1.0.0"
    if not path.is_dir():
        pytest.skip(f"no Bridge sample at {path}; QDEPTH_SHARED names the folder that holds data/")
    return str(path)


@pytest.fixture
def libero_dir(tmp_path) -> str:
    """A small data set written on the spot."""
    import libero_writer

    return libero_writer.make_libero(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of one module serve no other; kept, they slow every later test and fill gigabytes."""
    yield
    jax.clear_caches()

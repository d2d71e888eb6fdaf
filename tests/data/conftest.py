"""Fixtures of the data tests: the real Bridge sample where it is there, and a small data set written on the spot."""

import os
import pathlib

import libero_writer
import pytest

SHARED = pathlib.Path(os.environ.get("QDEPTH_SHARED", pathlib.Path(__file__).parents[2] / ".." / "shared"))


@pytest.fixture(scope="session")
def bridge_dir() -> str:
    path = SHARED / "data" / "bridge_dataset" / "1.0.0"
    if not path.is_dir():
        pytest.skip(f"no Bridge sample at {path}; QDEPTH_SHARED names the folder that holds data/")
    return str(path)


@pytest.fixture
def libero_dir(tmp_path) -> str:
    return libero_writer.make_libero(tmp_path)

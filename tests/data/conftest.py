"""Fixture of the data tests: a small data set written on the spot."""

import libero_writer
import pytest


@pytest.fixture
def libero_dir(tmp_path) -> str:
    return libero_writer.make_libero(tmp_path)

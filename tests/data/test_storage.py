"""Storage: gs:// by TensorStore's real driver against a fake server on the loopback device (see fake_gcs.py)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from qdepth_jax.data import storage

HERE = pathlib.Path(__file__).parent


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sequential", "changed")]


@pytest.mark.parametrize("name", ["index_and_frames", "unreadable", "batches", "converted", *_SLOW])
def test_objects_of_a_fake_gcs(name, tmp_path):
    # In a process of its own: TensorStore reads the address of the server once.
    command = [sys.executable, str(HERE / "gcs_checks.py"), name, str(tmp_path)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"passed": name}


def test_local_files(tmp_path):
    data = bytes(range(256)) * 40
    (tmp_path / "file").write_bytes(data)
    path = str(tmp_path / "file")
    assert storage.read(path) == data and storage.names(str(tmp_path)) == ["file"]
    (found, gone), size = storage.stats([path, path + ".gone"]), len(data)
    assert found.size == size and found.version == str(os.stat(path).st_mtime_ns) and gone is None
    file, parts = storage.open_sequential(path), []
    while part := file.read(999):
        parts.append(part)
    file.close()
    assert b"".join(parts) == data and file.size == size and {len(part) for part in parts[:-1]} == {999}
    assert storage.absolute("~") == os.path.expanduser("~")

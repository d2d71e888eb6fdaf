"""Workdirs: local or bucket, never a mangled URL; room on the disk."""

import collections
import errno
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from qdepth_jax import config as config_lib
from qdepth_jax import earlier_stages, errors, workdirs

STATE = {"x": jax.ShapeDtypeStruct((2**20,), np.float32)}  # 4 MiB, and 4 MiB of allowance


def test_a_url_stays_a_url_and_a_local_folder_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs.importlib.util, "find_spec", lambda name: name == "gcsfs")
    for url in ("gs://bucket/runs/a", "gs://bucket/runs/a/", "gs://bucket"):
        folder = workdirs.folder(url)
        assert str(folder) == url.rstrip("/") and str(folder / "checkpoints") == f"{url.rstrip('/')}/checkpoints"
        assert workdirs.is_remote(url) and workdirs.free_bytes(url) is None
    assert earlier_stages.token_dir("gs://bucket/runs/a/", "libero") == "gs://bucket/runs/a/tokens/libero"
    with pytest.raises(errors.UserError, match="names no bucket: write gs://BUCKET/FOLDER"):
        workdirs.folder("gs://")
    with pytest.raises(errors.UserError, match="a local folder or one of gs, s3://"):
        workdirs.folder("ftp://bucket/a")
    with pytest.raises(errors.UserError, match="needs a client for s3://: pip install s3fs"):
        workdirs.folder("s3://bucket/a")
    monkeypatch.chdir(tmp_path)
    assert str(workdirs.folder("runs/a")) == str(tmp_path / "runs" / "a")
    assert not workdirs.is_remote("runs/a")


LOCAL_ONLY = [
    "return epath.Path(os.path.abspath(os.path.expanduser(workdir)))",
    'file = open(path / "lock", "a+", encoding="utf-8")  # noqa: SIM115',
    'file.write(f"process {os.getpid()} on {socket.gethostname()}\\n")',
    'temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"',
]


@pytest.mark.parametrize("module", ["checkpoint", "checkpoint_read", "same_experiment", "workdirs", "earlier_stages"])
def test_no_url_can_meet_pathlib_or_os_path(module):
    text = (pathlib.Path(workdirs.__file__).parent / f"{module}.py").read_text()
    assert "import pathlib" not in text
    found = [line.strip() for line in text.splitlines() if re.search(r"\bos\.|open\(", line) and "manager" not in line]
    # Three places, behind the question whether the workdir is a URL.
    assert found == LOCAL_ONLY if module == "workdirs" else not found


def disk_of(monkeypatch, free):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(workdirs.shutil, "disk_usage", lambda _: usage(10**9, 0, free))


def test_room_for_what_will_stay_is_asked_before_anything_is_written(tmp_path, monkeypatch):
    def check(free_mib, existing=0, **train):
        disk_of(monkeypatch, free_mib * 2**20)
        config = config_lib.TrainConfig(**{"total_steps": 10_000, "keep_checkpoints": 2} | train)
        workdirs.check_room(str(tmp_path), STATE, config, existing)

    check(24)
    with pytest.raises(errors.UserError, match=r"23 MiB free, but 2 checkpoints and one being written need 24 MiB"):
        check(23)
    check(8, existing=2)
    with pytest.raises(errors.UserError, match="7 MiB free"):
        check(7, existing=2)
    with pytest.raises(errors.UserError, match="9 checkpoints and one being written need 80 MiB"):
        check(79, keep_every=2000, keep_best=2, eval_every=1)
    check(16, total_steps=500, keep_checkpoints=99)  # one checkpoint is all there will ever be
    assert not list(tmp_path.iterdir())
    workdirs.check_room("gs://bucket/a", STATE, config_lib.TrainConfig())


def test_a_full_disk_is_a_message_wherever_the_cause_stands():
    for inner in (
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        ValueError("... No space left on device ..."),
    ):
        with pytest.raises(errors.UserError, match="the disk of 'runs/a' is full"), workdirs.full_disk("runs/a"):
            try:
                raise inner
            except Exception as error:
                raise RuntimeError("save failed") from error
    with pytest.raises(RuntimeError, match="other"), workdirs.full_disk("runs/a"):
        raise RuntimeError("other")


HOLDS = """
import sys, time
from etils import epath
from qdepth_jax import workdirs
with workdirs.only_one(epath.Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_start_on_a_workdir_is_refused_until_the_first_is_gone(tmp_path):
    path = workdirs.folder(str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        said = f"in use by another start .process {first.pid} on .*choose another --workdir"
        with pytest.raises(errors.UserError, match=said), workdirs.only_one(path, print):
            raise AssertionError("two starts at once")
        first.kill()
    for _ in range(2):  # released by the kill, and by leaving
        with workdirs.only_one(path, print):
            pass


def test_a_workdir_that_cannot_be_written_is_a_message(tmp_path):
    (tmp_path / "lock").mkdir()  # as for a read-only disk, the lock cannot be opened; root may write anywhere
    path = workdirs.folder(str(tmp_path))
    with pytest.raises(errors.UserError, match=r"cannot be written .*choose another"), workdirs.only_one(path, print):
        raise AssertionError("not locked")


def test_a_disk_without_locks_is_said_and_a_bucket_has_none(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(workdirs.fcntl, "flock", unsupported)
    said = []
    with workdirs.only_one(workdirs.folder(str(tmp_path)), said.append):
        assert "cannot be locked" in said[0]
    with workdirs.only_one("gs://bucket/run", said.append):
        assert len(said) == 1

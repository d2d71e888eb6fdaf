"""Workdirs: local or bucket, never a mangled URL; room on the disk."""

import collections
import errno
import pathlib
import re

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


@pytest.mark.parametrize("module", ["checkpoint", "checkpoint_read", "same_experiment", "workdirs", "earlier_stages"])
def test_no_url_can_meet_pathlib_or_os_path(module):
    text = (pathlib.Path(workdirs.__file__).parent / f"{module}.py").read_text()
    assert "import pathlib" not in text
    found = [line.strip() for line in text.splitlines() if re.search(r"\bos\.|open\(", line) and "manager" not in line]
    # The one place, behind the question whether the workdir is a URL.
    assert found == (
        ["return epath.Path(os.path.abspath(os.path.expanduser(workdir)))"] if module == "workdirs" else []
    )


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

import os

import pytest

from qdepth_jax import files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "figures.json"
    files.write_whole(path, "ä")
    files.write_whole(str(path), b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01" and os.listdir(tmp_path) == ["figures.json"]


def test_what_was_there_survives_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    files.write_whole(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["figures.json"]


def test_killed_before_the_rename(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    files.write_whole(path, "old")
    monkeypatch.setattr(os, "replace", lambda partial, target: os._exit(9))
    if (pid := os.fork()) == 0:
        files.write_whole(path, "new")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert path.read_text() == "old"

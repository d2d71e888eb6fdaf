"""Commands that write and check sidecars: flags that would be ignored, notices told once, damage."""

import json
import pathlib

import pytest
import stored_runs

from qdepth_jax import errors


def test_what_is_no_depth_says_so_once_and_its_bytes_are_checked(libero_dir, tmp_path, capsys):
    with stored_runs.command("annotate_depth") as run:
        run(libero_dir, f"--output={tmp_path}/depth", "--estimator=stand_in")
    out, err = capsys.readouterr()
    summary = json.loads(out.splitlines()[-1])
    assert "NO depth" in summary["notice"] and (out + err).count(summary["notice"]) == 2  # stderr, and in the JSON
    with stored_runs.command("check_sidecar") as run:
        run(libero_dir, f"{tmp_path}/depth")
        (found,) = json.loads(capsys.readouterr()[0].splitlines()[-1]).values()
        assert [found[split]["frames"] for split in ("train", "val")] == [24, 5]
        assert all(row["checked"] and row["kind"] == "depth" for row in found.values())
        path = pathlib.Path(tmp_path, "depth", "val", "values.npy")
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
        with pytest.raises(errors.UserError, match=r"val is damaged: the bytes of episode 0 \(frames 0 to 4\)"):
            run(libero_dir, f"{tmp_path}/depth")
        with pytest.raises(errors.UserError, match="holds no finished sidecar of libero_object: no train, val"):
            run(libero_dir, str(tmp_path))


@pytest.mark.parametrize("flag", ["--depth_kind=metric", "--dtype=float16", "--input_size=140", "--device_batch=2"])
def test_flags_that_an_estimator_would_ignore_are_refused(flag, libero_dir, tmp_path):
    refused = pytest.raises(errors.UserError, match=f"--estimator=stand_in takes no {flag}: it gives relative depth")
    with stored_runs.command("annotate_depth") as run, refused:
        run(libero_dir, f"--output={tmp_path}/depth", "--estimator=stand_in", flag)
    assert not (tmp_path / "depth").exists()

"""Damaged data: the first problem is an error that names it; on request everything bad is set aside and counted."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from libero_writer import make_libero

from qdepth_jax import errors
from qdepth_jax.data import example, finite_check, index, quarantine, shard_scan, spec, tfrecord

ROOT = pathlib.Path(__file__).parents[2]
ACTION = ("steps/action",)


def _shard(directory, split, number):
    return sorted(pathlib.Path(directory).glob(f"*-{split}.tfrecord-*"))[number]


def _payloads(path):
    return [record.payload for record in tfrecord.scan_records(path)]


def _write(path, payloads):
    with open(path, "wb") as file:
        for payload in payloads:
            tfrecord.write_record(file, payload)


def _changed(payload: bytes, **changes) -> bytes:
    """An episode with other values; a value is a function of the old one, None drops the feature."""
    features = {}
    for name, (kind, value, _) in example.scan(payload).items():
        old = [payload[a : a + n] for a, n in value.tolist()] if kind == "bytes" else np.array(value)
        change = changes.get(name.rsplit("/", 1)[-1], lambda x: x)
        if change is not None:
            features[name] = change(old)
    return example.encode(features)


def _nan_at_2(values):
    values.reshape(-1, 7)[2, 3] = np.nan
    return values


def _broken_image(data):
    return [*data[:1], data[1][: len(data[1]) // 2], *data[2:]]


def _empty(payload):
    nothing = b""
    for name, (kind, _, _) in example.scan(payload).items():
        if name.startswith("steps/"):
            field = {"bytes": 1, "float": 2, "int": 3}[kind]
            feature = bytes([field << 3 | 2, 0])
            entry = example._delimited(1, name.encode()) + example._delimited(2, feature)
            nothing += example._delimited(1, entry)
    return example._delimited(1, nothing)


def _damaged(tmp_path, with_nan=True):
    """Two shards of three episodes with every kind of damage, and a broken image in the third."""
    directory = make_libero(tmp_path, (7, 3, 9, 5, 4, 6))
    first, second, val = _shard(directory, "train", 0), _shard(directory, "train", 1), _shard(directory, "val", 0)
    data = bytearray(first.read_bytes())
    records = list(tfrecord.scan_records(first))
    data[records[1].offset + 700] ^= 8
    first.write_bytes(data)
    nan, plain, cut = _payloads(second)
    nan = _changed(nan, action=_nan_at_2) if with_nan else nan
    _write(second, [nan, _empty(plain), _changed(plain, action=None), plain, cut])
    with open(second, "r+b") as file:
        file.truncate(second.stat().st_size - 100)
    _write(val, [_changed(payload, image=_broken_image) for payload in _payloads(val)])
    return directory


def _open(directory, root, **checks):
    return index.open_index(directory, str(root), checks=shard_scan.Checks(**checks))


def test_everything_bad_is_set_aside_and_counted(tmp_path):
    damaged = _damaged(tmp_path)
    opened = _open(damaged, tmp_path / "a", tolerate=True, finite=ACTION)
    train, val = opened.split("train"), opened.split("val")
    assert train.episodes["length"].tolist() == [7, 9, 5, 4]  # one damaged, one empty, one misfit, one cut off
    assert train.episodes["record"].tolist() == [0, 2, 0, 3] and train.episodes["start"].tolist() == [0, 7, 16, 21]
    rows = [(row.shard[-14:], row.record, row.episode, row.step, row.reason) for row in train.quarantine]
    assert rows == [
        ("00000-of-00002", 1, None, None, quarantine.DAMAGED),
        ("00001-of-00002", 0, 2, None, quarantine.NON_FINITE),
        ("00001-of-00002", 1, None, None, quarantine.EMPTY),
        ("00001-of-00002", 2, None, None, quarantine.MISFIT),
        ("00001-of-00002", 4, None, None, quarantine.LOST),
    ]
    details = [row.detail for row in train.quarantine]
    assert "checksum" in details[0] and "step 2" in details[1] and "steps/action" in details[3]
    assert "truncated" in details[4] and str(tmp_path) not in " ".join(details)
    assert train.quarantined.tolist() == list(range(16, 21)) and not len(val.quarantined)
    assert {reason: len(ids) for reason, ids in train.quarantined_by_reason.items()} == {quarantine.NON_FINITE: 5}
    assert any("1 x damaged record" in warning for warning in opened.warnings)
    assert any("steps/action holds 1 values that are NaN" in warning for warning in opened.warnings)
    # Images are looked at on request only: equal content, other rows, so another identity of what is set aside.
    images = _open(damaged, tmp_path / "b", tolerate=True, finite=ACTION, images=True)
    assert images.fingerprint == opened.fingerprint
    assert len({images.quarantine_digest, opened.quarantine_digest, ""}) == 3
    assert images.split("val").quarantined.tolist() == [1]
    row = images.split("val").quarantine[0]
    assert (row.episode, row.step, row.reason) == (0, 1, quarantine.IMAGE) and "observation/image" in row.detail
    again = _open(damaged, tmp_path / "c", tolerate=True, finite=ACTION, images=True)
    assert again.quarantine_digest == images.quarantine_digest


def test_without_the_wish_the_first_problem_is_an_error_with_place_and_fix(tmp_path):
    def damage(name, change, split="train", number=1):
        directory = make_libero(tmp_path / name, (7, 3, 9, 5, 4, 6))
        path = _shard(directory, split, number)
        first, *rest = _payloads(path)
        _write(path, [first, *map(change, rest)] if split == "train" else [change(first)])
        return directory

    for name, change, message in (
        ("nan", lambda p: _changed(p, action=_nan_at_2), "record 1, step 2 .*'steps/action' holds .*nan"),
        ("empty", _empty, "record 1 .*no steps"),
        ("misfit", lambda p: _changed(p, state=None), "record 1 .*'steps/observation/state' is missing"),
        ("dtype", lambda p: _changed(p, state=lambda x: x.astype(int)), "record 1 .*stored as int, float expected"),
        ("noise", lambda p: p[:50] + b"\xff" * 9 + p[59:], "record 1 .*not a valid tf.train.Example"),
    ):
        directory = damage(name, change)
        pattern = f"data set libero_object, split train, .*00001-of-00002: {message}.*index_rlds.py .*--quarantine"
        with pytest.raises(errors.UserError, match=pattern):
            _open(directory, tmp_path / name / "index", finite=ACTION)
    directory = damage("image", lambda p: _changed(p, image=_broken_image), "val", 0)
    with pytest.raises(errors.UserError, match=r"val-00000|record 0, step 1 .*observation/image"):
        _open(directory, tmp_path / "image" / "index", images=True)
    index.open_index(directory)  # an index looks at images only when it is asked to


@pytest.mark.parametrize("kept", [0, 1])
def test_a_shard_that_ends_too_early_is_no_whole_shard(tmp_path, kept):
    """Emptied, or cut at the border of a record: nothing in the file itself is damaged."""
    directory = make_libero(tmp_path)
    path = _shard(directory, "train", 1)
    _write(path, _payloads(path)[:kept])
    pattern = rf"00001-of-00002: record {kept} is missing: the file ends after {kept} of the 2 records .*--quarantine"
    with pytest.raises(errors.UserError, match=pattern):
        index.open_index(directory, str(tmp_path / "index"))
    opened = _open(directory, tmp_path / "index", tolerate=True)
    found = [(row.record, row.episode, row.reason) for row in opened.split("train").quarantine]
    assert found == [(kept, None, quarantine.LOST)] and len(opened.split("train").episodes) == 2 + kept


def test_damage_changes_the_fingerprint(tmp_path):
    """Also where the payload is good and its stored checksum is not: what is set aside differs."""
    directory = make_libero(tmp_path)
    prints = {index.open_index(directory, str(tmp_path / "whole")).fingerprint}
    path = _shard(directory, "train", 0)
    good = path.read_bytes()
    last = list(tfrecord.scan_records(path))[-1]
    for at in (len(good) - 1, len(good) - 2, last.offset + 5, last.offset - 1):
        bad = bytearray(good)
        bad[at] ^= 1
        path.write_bytes(bad)
        opened = _open(directory, tmp_path / str(at), tolerate=True)
        assert len(opened.split("train").episodes) == 3
        prints.add(opened.fingerprint)
    assert len(prints) == 5


def test_nothing_left_is_an_error(tmp_path):
    directory = make_libero(tmp_path)
    path = _shard(directory, "val", 0)
    _write(path, [_changed(payload, state=None) for payload in _payloads(path)])
    with pytest.raises(
        errors.UserError, match=r"none of the records of split val .*'steps/observation/state' is missing"
    ):
        _open(directory, tmp_path / "index", tolerate=True)


def test_rows_in_any_order_have_one_digest_and_details_do_not_count():
    rows = [
        quarantine.Row("train", "a", 1, None, None, quarantine.DAMAGED, "x"),
        quarantine.Row("train", "a", 2, 1, 3, quarantine.IMAGE, "y"),
        quarantine.Row("train", "b", 0, 2, None, quarantine.NON_FINITE, "z"),
    ]
    assert quarantine.digest(rows) == quarantine.digest([row._replace(detail="") for row in rows[::-1]])
    assert len({quarantine.digest(rows[:n]) for n in range(4)}) == 4 and quarantine.digest([]) == ""
    assert quarantine.from_json(json.loads(json.dumps(quarantine.to_json(rows)))) == tuple(rows)
    ids = quarantine.frames(rows, np.array([0, 10, 15]), np.array([10, 5, 2]))
    assert {reason: found.tolist() for reason, found in ids.items()} == {
        quarantine.IMAGE: [13],
        quarantine.NON_FINITE: [15, 16],
    }


def test_the_command(tmp_path):
    damaged = _damaged(tmp_path, with_nan=False)

    def run(*flags):
        command = [sys.executable, str(ROOT / "tools" / "index_rlds.py"), damaged, f"--index_dir={tmp_path}", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    refused = run()
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "00000-of-00002: record 1 at byte" in refused.stderr and "--quarantine" in refused.stderr
    done = run("--quarantine", "--check_images")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["quarantine"]["rows"] == 5 and len(summary["quarantine"]["digest"]) == 16
    assert summary["splits"]["val"] == {
        "episodes": 1, "frames": 6, "declared": 1, "quarantine": {quarantine.IMAGE: 1}, "quarantined_frames": 1,
    }  # fmt: skip
    assert "set aside (quarantine.json): 1 x damaged record" in done.stderr
    assert spec.read_spec(damaged).splits["train"].declared == (3, 3)


# ---- checks that an index gets later ----

BOTH = ("steps/action", "steps/observation/state")


def _with_nan(directory):
    """Three of six episodes have a value that is not finite, one of them in both columns."""
    for split, number, at, changes in (
        ("train", 0, 1, {"action": _nan_at_2}),
        ("train", 1, 0, {"action": _nan_at_2, "state": lambda x: np.where(np.arange(len(x)) == 3, np.inf, x)}),
        ("val", 0, 0, {"state": lambda x: np.where(np.arange(len(x)) > 20, -np.inf, x)}),
    ):
        path = _shard(directory, split, number)
        payloads = _payloads(path)
        payloads[at] = _changed(payloads[at], **changes)
        _write(path, payloads)
    return directory


def _files(opened):
    root = pathlib.Path(opened.directory)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _hide_damage(directory):
    """Damages every shard behind its old time: a command that reads one again fails."""
    for path in pathlib.Path(directory).glob("*.tfrecord-*"):
        stat, data = path.stat(), bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 1 << 20])
def test_a_check_added_later_writes_the_files_of_a_scan_with_it(tmp_path, monkeypatch, images, rows):
    monkeypatch.setattr(finite_check, "_ROWS", rows)
    directory = _with_nan(make_libero(tmp_path, (7, 4, 9, 5, 4, 6)))
    if images:
        path = _shard(directory, "train", 1)
        _write(path, [_changed(payload, image=_broken_image) for payload in _payloads(path)])
    tolerate = {"tolerate": True, "images": True} if images else {}
    whole = _open(directory, tmp_path / "whole", finite=BOTH, **{**tolerate, "tolerate": True})
    later = _open(directory, tmp_path / "later", **tolerate)
    assert len(whole.split("train").quarantine) == (6 if images else 3) and len(whole.split("val").quarantine) == 1
    before = _files(later)
    assert before != _files(whole)
    if images:
        # One column after the other.
        finite_check.add(later, BOTH[1:], tolerate=True)
        later = index.open_index(directory, str(tmp_path / "later"))
        finite_check.add(later, BOTH[:1], tolerate=True)
        assert later.quarantine_digest != index.open_index(directory, str(tmp_path / "later")).quarantine_digest
    else:
        with pytest.raises(errors.UserError, match=r"split train, .*00000-of.*: record 1 .*'steps/action' holds .*nan"):
            finite_check.add(later, BOTH, tolerate=False)
        assert _files(later) == before
        # Killed between its two files, and given again.
        replace = finite_check._replace
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            names = iter(("quarantine.json", KeyboardInterrupt))

            def killed(directory, name, content):
                if next(names) is KeyboardInterrupt:
                    raise KeyboardInterrupt
                return replace(directory, name, content)

            patch.setattr(finite_check, "_replace", killed)
            finite_check.add(later, BOTH, tolerate=True)
        later = index.open_index(directory, str(tmp_path / "later"))
        assert later.checks.finite == () and later.quarantine_digest == whole.quarantine_digest
        finite_check.add(later, BOTH, tolerate=True)
    later = index.open_index(directory, str(tmp_path / "later"))
    assert _sorted(_files(later)) == _sorted(_files(whole))
    assert images or _files(later) == _files(whole)
    assert later.checks == whole.checks and later.quarantine_digest == whole.quarantine_digest
    index.verify(later)


def _sorted(files):
    """With the rows of one record in one order: two columns checked one after the other are noted in that order."""
    content = json.loads(files["quarantine.json"])
    content["rows"] = sorted(content["rows"], key=json.dumps)
    about = json.loads(files["index.json"])
    about["files"].pop("quarantine.json")
    return files | {"quarantine.json": content, "index.json": about}


def test_good_data_needs_no_shard_for_the_check(tmp_path):
    directory = make_libero(tmp_path)
    opened, whole = index.open_index(directory), _open(directory, tmp_path / "whole", finite=BOTH)
    _hide_damage(directory)
    finite_check.add(opened, BOTH, tolerate=False)
    assert _files(index.open_index(directory)) == _files(whole)
    with pytest.raises(errors.UserError, match="cannot write the index"):
        shutil.rmtree(opened.directory + "/val")
        finite_check._replace(opened.directory + "/val", "index.json", {})


def test_the_command_completes_an_index_that_training_built(tmp_path):
    directory = _with_nan(make_libero(tmp_path))
    opened = index.open_index(directory)
    _hide_damage(directory)
    command = [sys.executable, str(ROOT / "tools" / "index_rlds.py"), directory]

    def run(*flags):
        return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)

    refused = run()
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "record 1 (payload at byte" in refused.stderr and "--quarantine" in refused.stderr
    assert index.open_index(directory).checks == opened.checks
    for action in ("checked", "opened"):
        done = run("--quarantine")
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout.splitlines()[-1])
        assert summary["action"] == action and summary["quarantine"]["rows"] == 4
        assert summary["splits"]["train"]["quarantine"] == {quarantine.NON_FINITE: 3}
    wanted = run("--check_images")  # needs the shards, and so meets the damage
    assert wanted.returncode == 2 and "checksum" in wanted.stderr

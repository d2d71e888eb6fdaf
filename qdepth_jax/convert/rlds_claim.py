"""The output folder of a long conversion: claimed by one command, continued by the next.

    FOLDER/convert_state/plan.json     what is being made; a restart with other options is refused
    FOLDER/convert_state/done/*.json   one per finished file
    FOLDER/<last>                      written last of all, then convert_state goes

A folder that has its last file is complete.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qdepth_jax import errors
from qdepth_jax.data import storage, write_rlds

STATE = "convert_state"
PROVENANCE = "qdepth_convert"  # key in the notes


@dataclasses.dataclass(frozen=True)
class Target:
    """What a conversion makes.

    Attributes:
      folder: of the output.
      provenance: source, options: json-able; digest: its identity.
      files: paths of the large files.
      size: bytes of all of them, about.
      last, notes: names of the file written last, and of the json file that keeps the provenance and counts.
    """

    folder: str
    provenance: dict[str, Any]
    digest: str
    files: tuple[str, ...]
    size: int
    last: str = "dataset_info.json"
    notes: str = "metadata.json"


def done_path(folder: str, file: str) -> str:
    return os.path.join(folder, STATE, "done", os.path.basename(file) + ".json")


@contextlib.contextmanager
def claimed(target: Target) -> Iterator[bool]:
    """Holds the output folder for one command; True if the conversion is finished already.

    Raises:
      UserError: the folder holds something else, another command writes it, or the disk is too small.
    """
    if _finished(target):
        shutil.rmtree(os.path.join(target.folder, STATE), ignore_errors=True)
        yield True
        return
    state = Path(target.folder, STATE)
    strange = sorted(set(os.listdir(target.folder)) - {STATE}) if os.path.isdir(target.folder) else []
    if strange and not state.is_dir():
        raise errors.UserError(
            f"--output={target.folder} holds other things ({', '.join(strange[:5])}): choose another folder"
        )
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = open(state / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise cannot_write(target.folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.UserError(f"another command is writing {target.folder}: wait for it or stop it") from None
        if (state / "plan.json").exists():
            _check_same(json.loads((state / "plan.json").read_text()), target)
        for partial in Path(target.folder).rglob("*.partial.*"):  # of a run that was killed
            partial.unlink(missing_ok=True)
        _check_space(target)
        try:
            write_rlds.write_json(state / "plan.json", {"digest": target.digest, **target.provenance})
        except OSError as error:
            raise cannot_write(target.folder, error) from error
        yield False


def read_done(done: str, output: str, digest: str) -> dict | None:
    """What an earlier run wrote about the file `output`; None if it is not finished.

    Raises:
      UserError: the done file is damaged or of another conversion, or the file is not what it says.
    """
    try:
        with open(done, encoding="utf-8") as file:
            content = json.load(file)
        found, size = content["digest"], content["file_bytes"]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise errors.UserError(f"{done} is damaged ({error!r}): delete it, its file is then made again") from error
    if found != digest:
        raise errors.UserError(f"{done} belongs to a conversion with other options: use another --output")
    # A done file is written after its file is on the disk, so a difference means that somebody changed the file.
    if not os.path.exists(output) or os.path.getsize(output) != size:
        raise errors.UserError(
            f"{output} is not what an earlier run finished ({size} bytes): delete {done}, the file is then made again"
        )
    return content


def make_file(task: Any, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Makes one file unless an earlier run did; returns its done file, and "kept": it was there already.

    Args:
      task: with `output` (the file), `done` (path of the done file), `digest` (identity of the conversion).
      write: writes `task.output`; what it returns goes into the done file.
    """
    finished = read_done(task.done, task.output, task.digest)
    if finished is not None:
        return {**finished, "kept": True}
    try:
        for path in (task.done, task.output):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        content = {"shard": os.path.basename(task.output), "digest": task.digest, **write()}
        content["file_bytes"] = os.path.getsize(task.output)
        write_rlds.write_json(task.done, content)
    except OSError as error:
        raise cannot_write(task.output, error) from error
    return {**content, "kept": False}


def splits(names: Sequence[str], results: Sequence[dict]) -> list[write_rlds.Split]:
    """The splits of an RLDS data set from the done files of its shards, in order."""
    return [
        write_rlds.Split(
            name,
            tuple(result["episodes"] for result in results if result["split"] == name),
            sum(result["bytes_out"] for result in results if result["split"] == name),
        )
        for name in names
    ]


def in_order(target: Target, results: list[dict]) -> list[dict]:
    """The results in the order of `target.files`; each file must be there as its result says."""
    by_name = {result["shard"]: result for result in results}
    ordered = []
    for path in target.files:
        result = by_name.get(os.path.basename(path))
        there = os.path.getsize(path) if os.path.exists(path) else None
        if result is None or (result["digest"], result["file_bytes"]) != (target.digest, there):
            raise ValueError(f"{path} is not finished (result {result}, size on disk {there}): run again")
        ordered.append(result)
    return ordered


def write_notes(target: Target, counts: dict[str, Any]) -> None:
    """Writes provenance and counts."""
    content = {PROVENANCE: {"digest": target.digest, **target.provenance, "counts": counts}}
    write_rlds.write_json(os.path.join(target.folder, target.notes), content)


def read_notes(folder: str, notes: str) -> dict[str, Any] | None:
    """What `write_notes` left in a folder; None if the folder was not made by a conversion."""
    try:
        return json.loads(Path(folder, notes).read_text(encoding="utf-8"))[PROVENANCE]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def close(target: Target) -> None:
    """Removes the state of a conversion whose last file is written."""
    shutil.rmtree(os.path.join(target.folder, STATE), ignore_errors=True)


def cannot_write(path: str, error: OSError) -> errors.UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free space and run the same command again" if full else "choose another --output"
    return errors.UserError(f"cannot write {path}: {error.strerror}; {fix} (finished files are kept)")


def place(source: str, output: str) -> str:
    """The absolute path of an output folder.

    Raises:
      UserError: it is, holds or lies in the source, or is no local folder.
    """
    if storage.is_remote(output):
        raise errors.UserError(f"--output={output}: only local folders are written; copy the finished data set there")
    output = os.path.abspath(os.path.expanduser(output))
    if storage.is_remote(source):
        return output
    inside, outside = os.path.realpath(output), os.path.realpath(source)
    if inside == outside or inside.startswith(outside + os.sep) or outside.startswith(inside + os.sep):
        raise errors.UserError(f"--output={output} and the data set {source} contain one another: choose another")
    return output


def _finished(target: Target) -> bool:
    """True if the output is this conversion, complete."""
    if not os.path.exists(os.path.join(target.folder, target.last)):
        return False
    found = read_notes(target.folder, target.notes)
    if found is None:
        raise errors.UserError(
            f"--output={target.folder} holds a data set that was not made by this command: choose another folder"
        )
    _check_same(found, target)
    missing = [path for path in target.files if not os.path.exists(path)]
    if missing:
        raise errors.UserError(f"{target.folder} is finished but {missing[0]} is missing: delete it and run again")
    return True


def _check_same(found: dict[str, Any], target: Target) -> None:
    if found.get("digest") == target.digest:
        return
    odd = [
        f"{key} was {json.dumps(found.get(key))}, is {json.dumps(value)}"
        for key, value in target.provenance.items()
        if found.get(key) != value
    ]
    raise errors.UserError(
        f"{target.folder} holds a conversion with other options ({'; '.join(odd)}): choose another --output"
    )


def _check_space(target: Target) -> None:
    needed = target.size - sum(os.path.getsize(path) for path in target.files if os.path.exists(path))
    free = shutil.disk_usage(target.folder).free
    if needed > free:
        raise errors.UserError(
            f"--output={target.folder}: about {needed / 1e9:.3f} GB are needed (by a sample), {free / 1e9:.3f} GB are "
            "free: free space or choose another disk"
        )

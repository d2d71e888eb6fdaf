"""Whether a workdir holds this experiment: config.json of its last start, data and position of its checkpoint.

Local folders and buckets alike.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from qdepth_jax import config as config_lib
from qdepth_jax import errors, workdirs

# Config keys that change no value of the run.
_MAY_CHANGE = re.compile(
    r"train\.(log_every|eval_every|eval_batches|checkpoint_every|keep_checkpoints|keep_every|keep_best|best_metric"
    r"|best_mode|max_skipped|total_steps|prefetch)|mesh\..*|model\.(remat|scan)"
    r"|model\.flow\.clip|eval_split|data\.(threads|index_dir|text_tokenizer)|datasets\.[^.]+\.(path|depth|depth_tokens)|tokenizer"
)


def _may_change(key: str, config: dict[str, Any]) -> bool:
    # A tokenizer's codebook moves once per micro-batch: there their number is part of the experiment.
    return bool(_MAY_CHANGE.fullmatch(key)) or (key == "train.micro_batches" and config["model_kind"] != "tokenizer")


def check_same_experiment(workdir: str, config: dict[str, Any]) -> None:
    """Refuse a workdir that holds another experiment; writes nothing.

    Run lengths, intervals, the split that is held out, which checkpoints stay, the mesh, how memory is traded for time
    (micro-batches, remat, scan), what clips sampled actions and where things lie may change between starts, everything
    else may not. What lies there is compared by content: see Loader.identity.

    Raises:
      UserError: listing the keys that differ.
    """
    before = read_config(workdir)
    if before is not None:
        _check_config(before, config, workdir)


def _check_config(before: dict[str, Any], config: dict[str, Any], workdir: str) -> None:
    found = [d for d in config_lib.differences(before, config) if not _may_change(d.partition(":")[0], config)]
    if found:
        raise errors.UserError(
            f"{workdir!r} belongs to another experiment; choose another --workdir. Differences:\n  "
            + "\n  ".join(found)
        )


def read_config(workdir: str) -> dict[str, Any] | None:
    """config.json of a run, None where there is none.

    Raises:
      UserError: it is no JSON.
    """
    path = workdirs.folder(workdir) / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise errors.UserError(f"{path} is damaged ({error}): restore it, or choose another --workdir") from error


def write_config(workdir: str, config: dict[str, Any]) -> None:
    """config.json of a run, atomically (an object of a bucket appears whole by itself)."""
    workdirs.write_whole(workdirs.folder(workdir) / "config.json", json.dumps(config, indent=1))


def say_changed_length(workdir: str, total_steps: int, say: Callable[[str], None]) -> None:
    """A longer or shorter run also stretches a cosine schedule: say it."""
    saved = read_config(workdir)
    if saved is not None and (before := saved["train"]["total_steps"]) != total_steps:
        say(
            f"train.total_steps changed from {before} to {total_steps}: a cosine schedule without optim.cycle_steps "
            "changes with it"
        )


def check_checkpoint(
    saved: dict[str, Any], config: dict[str, Any], meta: dict[str, Any], workdir: str, batch_size: int
) -> None:
    """Refuses to go on from a checkpoint of another experiment (its config.json may be gone) or with other data.

    Args:
      saved: what stands beside the checkpoint. config: the experiment of this start; `meta`: see `check_data`.
    """
    _check_config(saved["config"], config, workdir)
    check_data(saved, meta, workdir, saved["step"] * batch_size)


def check_data(saved: dict[str, Any], meta: dict[str, Any], workdir: str, position: int) -> None:
    """Refuses to go on with other samples than those the run would have seen.

    Args:
      saved: what stands beside the checkpoint; `meta`: the same of this start, without a position.
      position: samples that this start takes as seen: step times batch size.
    """
    before = dict(saved["data"])
    seen = before.pop("position")
    found = config_lib.differences(_by_data_set(before), _by_data_set(meta["data"]))
    # Runs of older versions kept the names of their sidecars alone; a sidecar that came anew differs by name too.
    found = [line for line in found if "depth_digest: '<absent>' there" not in line]
    found = [line for line in found if "depth_tokens_digest: '<absent>' there" not in line]
    if found:
        raise errors.UserError(
            f"the data changed since {workdir!r} was trained, so its position means nothing now; restore the data or "
            "start a new --workdir:\n  " + "\n  ".join(_short(line) for line in found)
        )
    if seen != position:
        raise errors.UserError(
            f"{workdir!r} had seen {seen} samples at its last checkpoint, with this train.batch_size the same step "
            f"stands for {position}: restore train.batch_size or start a new --workdir"
        )


def _short(line: str) -> str:
    """Statistics of a data set fill pages; that they differ is enough beside the fingerprint."""
    return line if len(line) < 300 else f"{line.partition(':')[0]}: other values there than here"


def _by_data_set(data: dict[str, Any]) -> dict[str, Any]:
    """The list of data sets as a table, so that a difference is told by data set and field."""
    return data | {"datasets": {f"{n} {item['name']}": item for n, item in enumerate(data["datasets"])}}

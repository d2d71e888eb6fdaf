"""config.json of a run: written at its start, compared at the next one. Local folders and buckets alike."""

import json
import re
from typing import Any

from qdepth_jax import config as config_lib
from qdepth_jax import errors, workdirs

# Config keys that change no value of the run.
_MAY_CHANGE = re.compile(
    r"train\.(log_every|eval_every|eval_batches|checkpoint_every|keep_checkpoints|keep_every|keep_best|best_metric"
    r"|best_mode|max_skipped|total_steps|prefetch)|mesh\..*"
    r"|data\.(threads|index_dir|text_tokenizer)|datasets\.[^.]+\.(path|depth|depth_tokens)|tokenizer"
)


def check_same_experiment(workdir: str, config: dict[str, Any]) -> None:
    """Refuse a workdir that holds another experiment; writes nothing.

    Run lengths, intervals, which checkpoints stay, the mesh and where things lie may change between starts, everything
    else may not. What lies there is compared by content: see Loader.identity.

    Raises:
      UserError: listing the keys that differ.
    """
    before = read_config(workdir)
    if before is None:
        return
    found = [d for d in config_lib.differences(before, config) if not _MAY_CHANGE.fullmatch(d.split(":")[0])]
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
    folder, text = workdirs.folder(workdir), json.dumps(config, indent=1)
    if workdirs.is_remote(workdir):
        (folder / "config.json").write_text(text)
    else:
        (folder / "config.json.tmp").write_text(text)
        (folder / "config.json.tmp").replace(folder / "config.json")

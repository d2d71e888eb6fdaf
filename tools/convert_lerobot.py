"""LeRobot v3 data sets in and out.

  python tools/convert_lerobot.py import LEROBOT_DIR --output=DIR --name=NAME       LeRobot -> RLDS
  python tools/convert_lerobot.py export DATASET_DIR --output=DIR --fps=5           RLDS -> LeRobot

Needs the extra `lerobot` (pyarrow and av; not the lerobot package). A killed command continues with its finished files
when it is given again. Import: images in parquet keep their bytes, video frames are stored as JPEG (--images=png: as
decoded). Export: images keep their bytes, no video is made, one split per data set; episodes with a frame that the
index has set aside (tools/index_rlds.py --quarantine) are dropped and counted by reason. The last line of
stdout is JSON; `left_out` says what had no place and why.
"""

import json
import os
import sys
import time

from absl import flags

from qdepth_jax import command

_OUTPUT = flags.DEFINE_string("output", None, "folder of the new data set", required=True)
_NAME = flags.DEFINE_string("name", "", "import: name of the RLDS data set")
_VERSION = flags.DEFINE_string("version", "1.0.0", "import: version of the RLDS data set")
_LANGUAGE = flags.DEFINE_list("language", [], "import: where the task goes below steps/; export: instruction features")
_IMAGES = flags.DEFINE_enum("images", "jpeg", ["jpeg", "png"], "import: how decoded video frames are stored")
_QUALITY = flags.DEFINE_integer("jpeg_quality", 95, "import: of decoded video frames", 1, 100)
_PER_SHARD = flags.DEFINE_integer("episodes_per_shard", 50, "import: episodes per shard")
_FPS = flags.DEFINE_float("fps", 0.0, "export: control rate; default: the definition's")
_SPLIT = flags.DEFINE_string("split", "train", "export: split or range, train[:95%]")
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "export: root for indexes; default: inside the data set")
_LEAVE_OUT = flags.DEFINE_list("leave_out", [], "features to leave out")
_WORKERS = flags.DEFINE_integer("workers", 0, "local processes; 0 = one per CPU core")


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors

    try:
        if len(argv) != 3 or argv[1] not in ("import", "export"):
            raise errors.UserError(f"usage: convert_lerobot.py import|export DIR --output=DIR (got {argv[1:]})")
        print(json.dumps(convert(argv[1], argv[2])))
    except errors.UserError:
        raise  # command.run: its exit code says whether it may work later
    except ValueError as error:  # a damaged record
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(direction: str, directory: str) -> dict:
    """Plans, runs and finishes; returns the summary."""
    from qdepth_jax import errors, progress
    from qdepth_jax.convert import lerobot_export, lerobot_import, lerobot_read, rlds_claim, rlds_run

    started = time.monotonic()
    lerobot_read.check_installed()
    if direction == "import":
        if not _NAME.value:
            raise errors.UserError("import needs --name, the name of the RLDS data set (and of its definition)")
        plan = lerobot_import.plan(
            directory,
            _OUTPUT.value,
            _NAME.value,
            version=_VERSION.value,
            language=_LANGUAGE.value[0] if _LANGUAGE.value else "language_instruction",
            leave_out=tuple(_LEAVE_OUT.value),
            images=_IMAGES.value,
            jpeg_quality=_QUALITY.value,
            episodes_per_shard=_PER_SHARD.value,
        )
        function, finish, unit = lerobot_import.convert_shard, lerobot_import.finish, "episode"
        total = sum(len(task.episodes) for task in plan.tasks)
    else:
        plan = lerobot_export.plan(
            directory,
            _OUTPUT.value,
            fps=_FPS.value,
            split=_SPLIT.value,
            language=tuple(_LANGUAGE.value),
            leave_out=tuple(_LEAVE_OUT.value),
            index_dir=_INDEX_DIR.value,
        )
        function, finish, unit = lerobot_export.convert_file, lerobot_export.finish, "B"
        total = sum(int(task.rows["size"].sum()) for task in plan.tasks)
    kept = 0
    with rlds_claim.claimed(plan.target) as finished:
        if finished:
            counts = rlds_claim.read_notes(plan.target.folder, plan.target.notes)["counts"]
        else:
            bar = progress.Progress(total, direction, unit=unit)
            results = rlds_run.run_tasks(function, plan.tasks, _WORKERS.value or os.cpu_count() or 1, bar.update)
            bar.close()
            kept = sum(result["kept"] for result in results)
            counts = finish(plan, results)
    for name, reason in plan.left_out.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return {
        "output": plan.target.folder,
        "action": "opened" if finished else "continued" if kept else "converted",
        **counts,
        "left_out": plan.left_out,
        "float64_stored_as_float32": plan.target.provenance.get("float64_stored_as_float32", []),
        "files_of_earlier_runs": kept,
        "digest": plan.target.digest,
        "seconds": round(time.monotonic() - started, 3),
    }


if __name__ == "__main__":
    command.run(main)

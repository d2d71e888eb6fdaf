"""Writes a new version of an RLDS data set: with depth and depth tokens, smaller images, or fewer episodes.

  python tools/convert_rlds.py DATASET_DIR --output=DIR [--depth=SIDECAR] [--depth_tokens=SIDECAR] [--resize=H,W]
      [--split=train[:95%],val] [--episodes=0-9,12] [--keep_labelled] [--workers=N]
  python tools/convert_rlds.py DATASET_DIR --output=DIR ... --runner=DirectRunner [--beam_arg=--NAME=VALUE ...]

The result opens with plain `tfds.builder_from_directory(DIR)`. What is not changed keeps its bytes: JPEGs are not
encoded again unless they are resized. Episodes with a frame that the index has set aside (tools/index_rlds.py
--quarantine) are dropped and counted by reason. DATASET_DIR may be gs:// (with --index_dir). Local processes are the
default; a killed command continues with its finished shards when it is given again, and ends with the same files.
--runner makes it an Apache Beam pipeline (extra `convert`), of the same function per shard. The last line of stdout is
JSON: counts of everything.
"""

import json
import os
import sys
import time

from absl import flags

from qdepth_jax import command

_OUTPUT = flags.DEFINE_string(
    "output", None, "folder of the new version; a name like 1.1.0 is its version", required=True
)
_SPLIT = flags.DEFINE_list("split", [], "splits with optional range of episodes: train[:95%],val; default: all")
_EPISODES = flags.DEFINE_string("episodes", "", "episode numbers within the one chosen split: 0-9,12")
_LABELLED = flags.DEFINE_bool("keep_labelled", False, "drop episodes without any instruction")
_LANGUAGE = flags.DEFINE_list("language", [], "instruction features, for --keep_labelled; default: the definition's")
_DEPTH = flags.DEFINE_multi_string("depth", [], "root of a depth sidecar, or NAME=ROOT; may be repeated")
_TOKENS = flags.DEFINE_multi_string("depth_tokens", [], "root of a depth-token sidecar, or NAME=ROOT; may be repeated")
_ENCODING = flags.DEFINE_enum(
    "token_encoding", "none", ["none", "bytes"], "tokens as int64 lists or as raw uint16 bytes"
)
_RESIZE = flags.DEFINE_list("resize", [], "height,width of all images: colour by Lanczos, depth by nearest pixel")
_QUALITY = flags.DEFINE_integer("jpeg_quality", 95, "of resized JPEG images")
_VERSION = flags.DEFINE_string("version", "", "version of the result, MAJOR.MINOR.PATCH")
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: inside the data set")
_WORKERS = flags.DEFINE_integer("workers", 0, "local processes; 0 = one per CPU core")
_RUNNER = flags.DEFINE_string("runner", "", "run as a Beam pipeline: DirectRunner, DataflowRunner, FlinkRunner, ...")
_BEAM_ARG = flags.DEFINE_multi_string(
    "beam_arg", [], "option of the Beam pipeline, for instance --beam_arg=--region=..."
)


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors

    try:
        if len(argv) != 2:
            raise errors.UserError(f"usage: convert_rlds.py DATASET_DIR --output=DIR (got {argv[1:]})")
        print(json.dumps(convert(argv[1])))
    except errors.UserError:
        raise  # command.run: its exit code says whether it may work later
    except ValueError as error:  # a damaged record
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(directory: str) -> dict:
    """Plans, runs and finishes; returns the summary."""
    from qdepth_jax import errors, progress
    from qdepth_jax.convert import rlds, rlds_beam, rlds_claim, rlds_run

    started = time.monotonic()
    if _BEAM_ARG.value and not _RUNNER.value:
        raise errors.UserError("--beam_arg needs --runner")
    plan = rlds.plan(directory, _OUTPUT.value, _options(), _INDEX_DIR.value)
    if _RUNNER.value:
        rlds_beam.check_installed()
    kept = 0
    with rlds_claim.claimed(plan.target) as finished:
        if finished:
            action, counts = "opened", rlds_claim.read_notes(plan.output, plan.target.notes)["counts"]
        elif _RUNNER.value:
            action, counts = "converted", rlds_beam.run(plan, _RUNNER.value, _BEAM_ARG.value)
        else:
            bar = progress.Progress(plan.bytes_in, "bytes", unit="B")
            results = rlds_run.run_local(plan, _WORKERS.value or os.cpu_count() or 1, bar.update)
            bar.close()
            kept = sum(result["kept"] for result in results)
            action, counts = "continued" if kept else "converted", rlds_run.finish(plan, results)
    return {
        "output": plan.output,
        "action": action,
        "shards_of_earlier_runs": kept,
        **counts,
        "not_resized": plan.provenance["not_resized"],
        "source_fingerprint": plan.provenance["source"]["fingerprint"],
        "digest": plan.digest,
        "seconds": round(time.monotonic() - started, 3),
    }


def _options():
    from qdepth_jax import errors
    from qdepth_jax.convert import rlds

    try:
        resize = tuple(int(size) for size in _RESIZE.value)
    except ValueError:
        raise errors.UserError(f"--resize={','.join(_RESIZE.value)}: give height,width, for instance 224,224") from None
    return rlds.Options(
        splits=tuple(_SPLIT.value),
        episodes=_EPISODES.value,
        keep_labelled=_LABELLED.value,
        language=tuple(_LANGUAGE.value),
        depth=tuple(_DEPTH.value),
        depth_tokens=tuple(_TOKENS.value),
        token_encoding=_ENCODING.value,
        resize=resize or None,
        jpeg_quality=_QUALITY.value,
        version=_VERSION.value,
    )


if __name__ == "__main__":
    command.run(main)

"""Writes depth maps for a data set without depth, as a sidecar that the loader reads.

  python tools/annotate_depth.py DATASET_DIR --output=DIR --estimator=video_depth_anything --weights=FILE.pth
  python tools/annotate_depth.py DATASET_DIR --output=DIR --estimator=depth_anything_v2 --weights=FOLDER
  python tools/annotate_depth.py DATASET_DIR --output=DIR --estimator=transformers:MODEL_OR_FOLDER
  python tools/annotate_depth.py DATASET_DIR --output=DIR --estimator=dataset

Estimators: `video_depth_anything` and `depth_anything_v2`, our networks with the authors' weights (size S, B, L or g is
found in the file; --weights=random:SIZE, with SIZE one of tiny, vits, vitb, vitl, and for images vitg, tries the
plumbing without; there is no giant video network);
`transformers:...` (extra `transformers`); `dataset` = `simulator`, the depth that the data set carries; `stand_in`, a
map of image row and brightness. What is no depth (stand_in, random weights) says so, here, in the sidecar and in the
report of its tokens. A flag that an estimator does not take is refused: `stand_in`, `dataset` and `simulator` take none
of --dtype, --input_size, --device_batch, `transformers:...` no --input_size (the model brings its own).

Frames keep their aspect: the network sees them with the short side at --input_size, both sides multiples of 14, and
the map comes back at the size of the image. Kinds of depth: `metric`, in metres, and `relative`, relative inverse depth
(relative_inverse in papers: larger is nearer, up to scale and shift), scaled per episode by its robust range.
Counted, never silent: pixels without depth, episodes of constant depth (all invalid), episodes shorter than a window
(their last frame is repeated, as published), frames that the index has set aside (tools/index_rlds.py --quarantine).

Several processes, on one host or many, share the episodes: start each with --num_processes=N --process_id=I (or under
SLURM or Open MPI). Each uses all its devices. Interrupt, kill and run again, with any N: finished episodes are kept,
and the bytes are the same. Without --views the main view goes to OUTPUT/SPLIT; --views=main,wrist to OUTPUT/VIEW/SPLIT.
The last line of stdout is JSON.
"""

import json
import os
import sys

from absl import flags

from qdepth_jax import command

_OUTPUT = flags.DEFINE_string("output", None, "root of the sidecar: OUTPUT/SPLIT/ is written", required=True)
_ESTIMATOR = flags.DEFINE_string("estimator", None, "see above; stand_in is no depth estimate", required=True)
_WEIGHTS = flags.DEFINE_string("weights", "", "of a network: .pth, .safetensors, a folder, or random:SIZE[:SEED]")
_KIND = flags.DEFINE_string("depth_kind", "", "metric or relative, where the weights do not say it")
_DTYPE = flags.DEFINE_string("dtype", "", "of a network's activations: float32 (default) or bfloat16")
_INPUT_SIZE = flags.DEFINE_integer(
    "input_size", 0, "pixels of the short side that our networks see, a multiple of 14; 0: 518", lower_bound=0
)
_DEVICE_BATCH = flags.DEFINE_integer(
    "device_batch", 0, "windows (of 32 frames) or frames that a device computes together; 0: 1 window, 8 frames"
)
_SPLITS = flags.DEFINE_list("splits", [], "splits to annotate; default: all")
_VIEWS = flags.DEFINE_list("views", [], "views to annotate (main, wrist, secondary); default: the main view")
_NAME = flags.DEFINE_string("name", "", "definition of the data set; default: the name in dataset_info.json")
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: inside the data set")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes that share the work", lower_bound=1)


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors

    if len(argv) != 2:
        raise errors.UserError(f"usage: annotate_depth.py DATASET_DIR --output=DIR (got {argv[1:]})")
    try:
        print(json.dumps(annotate(argv[1])))
    except ValueError as error:  # a frame that cannot be decoded
        raise errors.UserError(str(error)) from error


def annotate(directory: str) -> dict:
    """Annotates the chosen views of every chosen split; returns the summary."""
    from qdepth_jax import annotation, process_share
    from qdepth_jax.data import definitions, index

    share = process_share.find(_PROCESS_ID.value, _NUM_PROCESSES.value)
    opened = index.open_index(directory, _INDEX_DIR.value)
    index.say_warnings(opened)
    definition = definitions.find(_NAME.value or opened.dataset.name)
    views, fills = _views(definition), []
    splits = [opened.split(name) for name in _SPLITS.value or list(opened.splits)]
    estimator = _estimator(fills.append)
    done = {
        view: {
            split.name: annotation.annotate_split(
                opened, definition, split, view, os.path.join(_OUTPUT.value, folder), estimator, *share
            )
            for split in splits
        }
        for view, folder in views.items()
    }
    for view, rows in done.items():
        for split, row in rows.items():
            if row.get("pixels") and row["invalid_pixels"] == row["pixels"]:
                print(f"{split} {view}: NO pixel of {row['frames']} frames has depth", file=sys.stderr)
    summary = {
        "estimator": estimator.name,
        "depth_kind": estimator.kind,
        "licence": estimator.licence,
        "notice": estimator.notice,
        "source_warnings": list(opened.warnings),
        "process_id": share[0],
        "num_processes": share[1],
        "groups_computed_to_fill_devices": sum(fills),
    }
    if _VIEWS.value:
        return summary | {"views": done}
    (view,) = done
    return summary | {"camera": f"steps/{definition.views[view]}", "splits": done[view]}


def _views(definition) -> dict[str, str]:
    """View -> folder below the output."""
    from qdepth_jax import errors

    if not _VIEWS.value:
        return {next(view for view, feature in definition.views.items() if feature == definition.main_view): ""}
    if odd := [view for view in _VIEWS.value if view not in definition.views]:
        there = ", ".join(definition.views)
        raise errors.UserError(f"--views: {definition.name} has {there}, and not {', '.join(odd)}")
    return {view: view for view in _VIEWS.value}


def _estimator(on_fill):
    """The estimator that the flags name; says what it is."""
    from qdepth_jax.data import depth_labels

    if _ESTIMATOR.value in depth_labels.ESTIMATORS and not _WEIGHTS.value:
        # Without JAX, which takes seconds to start.
        flags_given = {flag.name: flag.value for flag in (_KIND, _DTYPE, _INPUT_SIZE, _DEVICE_BATCH)}
        estimator = depth_labels.find(_ESTIMATOR.value, flags_given)
    else:
        from qdepth_jax import estimators, process_share

        options = estimators.Options(
            kind=_KIND.value,
            dtype=_DTYPE.value,
            input_size=_INPUT_SIZE.value,
            device_batch=_DEVICE_BATCH.value,
            devices=process_share.local_devices() if _ESTIMATOR.value in estimators.NETWORKS else None,
        )
        estimator = estimators.make(_ESTIMATOR.value, _WEIGHTS.value, options, on_fill)
    print(f"{estimator.name}: {estimator.kind} depth; licence of the weights: {estimator.licence}", flush=True)
    if estimator.notice:
        print(estimator.notice, file=sys.stderr, flush=True)  # stdout has it in its last line
    return estimator


if __name__ == "__main__":
    command.run(main)

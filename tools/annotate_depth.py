"""Writes depth maps for a data set without depth, as a sidecar that the loader reads.

  python tools/annotate_depth.py DATASET_DIR --output=DIR --estimator=stand_in

The only estimator so far is `stand_in`: a map of image row and brightness in the form of a relative depth estimate, to
run the whole pipeline without a depth network. It is NOT depth, and its name is stored with the maps.
Interrupt and run again: finished episodes are kept. The last line of stdout is JSON.
"""

import json
import os
import sys

from absl import app, flags

_OUTPUT = flags.DEFINE_string("output", None, "root of the sidecar: OUTPUT/SPLIT/ is written", required=True)
_ESTIMATOR = flags.DEFINE_string("estimator", "stand_in", "stand_in (named so because it is no depth estimate)")
_SPLITS = flags.DEFINE_list("splits", [], "splits to annotate; default: all")
_NAME = flags.DEFINE_string("name", "", "definition of the data set; default: the name in dataset_info.json")
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: inside the data set")


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors

    try:
        if len(argv) != 2:
            raise errors.UserError(f"usage: annotate_depth.py DATASET_DIR --output=DIR (got {argv[1:]})")
        print(json.dumps(annotate(argv[1])))
    except (errors.UserError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def annotate(directory: str) -> dict:
    """Annotates the main view of every chosen split; returns the summary."""
    from qdepth_jax import progress
    from qdepth_jax.data import definitions, depth_labels, episode_reader, index, sidecar

    estimator = depth_labels.find(_ESTIMATOR.value)
    opened = index.open_index(directory, _INDEX_DIR.value)
    definition = definitions.find(_NAME.value or opened.dataset.name)
    camera = f"steps/{definition.main_view}"
    summary = {"estimator": estimator.name, "depth_kind": estimator.kind, "camera": camera, "splits": {}}
    if _ESTIMATOR.value == "stand_in":
        print("stand_in: these maps are NO depth; use them to test the pipeline only", file=sys.stderr)
    for name in _SPLITS.value or list(opened.splits):
        split = opened.split(name)
        reader = episode_reader.EpisodeReader(split)
        shape = reader.images(camera, 0).shape[1:3]
        metadata = sidecar.Metadata(
            kind="depth",
            fingerprint=opened.fingerprint,
            split=name,
            camera=camera,
            identity=estimator.name,
            row_shape=shape,
            frames=split.frames,
            episodes=len(split.episodes),
            details={"depth_kind": estimator.kind},
        )
        writer = sidecar.Writer(os.path.abspath(_OUTPUT.value), metadata)
        pending = writer.pending()
        for episode in progress.track(pending, len(pending), f"{name} episodes", "episode"):
            values = estimator.estimate(reader.images(camera, episode, shape))
            raw, scale, offset = depth_labels.to_uint16(values, estimator.kind)
            writer.write(episode, int(split.episodes["start"][episode]), raw, scale=scale, offset=offset)
        summary["splits"][name] = {
            "directory": writer.finish(),
            "episodes": len(split.episodes),
            "frames": split.frames,
            "annotated_now": len(pending),
        }
        reader.close()
    return summary


if __name__ == "__main__":
    app.run(main)

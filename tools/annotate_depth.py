"""Writes depth maps for a data set without depth, as a sidecar that the loader reads.

  python tools/annotate_depth.py DATASET_DIR --output=DIR --estimator=stand_in

The only estimator so far is `stand_in`: a map of image row and brightness in the form of a relative depth estimate, to
run the whole pipeline without a depth network. It is NOT depth, and its name is stored with the maps.
Frames that the index has set aside (tools/index_rlds.py --quarantine) are not read: their maps are all invalid.
Interrupt and run again: finished episodes are kept. The last line of stdout is JSON.
"""

import json
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
        shape = reader.image_size(camera)
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
        writer = sidecar.Writer(_OUTPUT.value, metadata)
        pending = writer.pending()
        for episode in progress.track(pending, len(pending), f"{name} episodes", "episode"):
            raw, scale, offset = annotate_episode(reader, estimator, camera, episode, shape)
            writer.write(episode, int(split.episodes["start"][episode]), raw, scale=scale, offset=offset)
        summary["splits"][name] = {
            "directory": writer.finish(),
            "episodes": len(split.episodes),
            "frames": split.frames,
            "quarantined_frames": len(split.quarantined),
            "annotated_now": len(pending),
        }
        reader.close()
    return summary


def annotate_episode(reader, estimator, camera: str, episode: int, shape: tuple[int, int]):
    """(raw u16 [T, H, W], scale, offset) of one episode; the estimator does not see what was set aside (it is 0)."""
    import numpy as np

    from qdepth_jax.data import depth_labels

    steps = reader.good_steps(episode)
    raw, scale, offset = np.zeros((reader.length(episode), *shape), np.uint16), 1.0, 0.0
    if len(steps):
        values = estimator.estimate(reader.images(camera, episode, shape, steps))
        raw[steps], scale, offset = depth_labels.to_uint16(values, estimator.kind)
    return raw, scale, offset


if __name__ == "__main__":
    app.run(main)

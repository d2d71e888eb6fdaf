"""Reads sidecars of depth maps or depth tokens whole and compares them with the sums kept when they were written.

  python tools/check_sidecar.py DATASET_DIR SIDECAR_ROOT [SIDECAR_ROOT ...] [--index_dir=DIR]

SIDECAR_ROOT is the --output of tools/annotate_depth.py (of one view) or OUTPUT/NAME of tools/tokenize_depth.py.
Training does this at its start for sidecars of up to 4 GiB, tools/tokenize_depth.py for every episode that it reads.
The first damaged episode is an error. The last line of stdout is JSON: per root and split its frames, bytes, digest,
and whether it was checked (sidecars of older versions carry no sums).
"""

import json
import os

from absl import flags

from qdepth_jax import command

_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: inside the data set")


def main(argv: list[str]) -> None:
    # Heavy imports only now: --help answers at once.
    from qdepth_jax import errors
    from qdepth_jax.data import index

    if len(argv) < 3:
        raise errors.UserError(f"usage: check_sidecar.py DATASET_DIR SIDECAR_ROOT [SIDECAR_ROOT ...] (got {argv[1:]})")
    opened = index.open_index(argv[1], _INDEX_DIR.value)
    print(json.dumps({root: check(opened, root) for root in argv[2:]}))


def check(opened, root: str) -> dict:
    """Checks all splits of a sidecar; returns what was found by split."""
    from qdepth_jax import errors
    from qdepth_jax.data import sidecar, sidecar_sums

    found = {}
    for name, split in opened.splits.items():
        if not os.path.isdir(os.path.join(root, name)):
            continue  # a sidecar may be of some splits: those that were checked are in the summary
        made = sidecar.open_sidecar(root, name)
        sidecar.check(made, kind=made.metadata.kind, fingerprint=opened.fingerprint, camera=made.metadata.camera)
        sidecar_sums.check(made, split.episodes, shown=True)
        found[name] = {
            "kind": made.metadata.kind,
            "identity": made.metadata.identity,
            "frames": made.metadata.frames,
            "bytes": made.values.nbytes,
            "digest": sidecar_sums.digest(made),
            "checked": made.sums is not None,
        }
    if not found:
        raise errors.UserError(
            f"{root} holds no finished sidecar of {opened.dataset.name}: no {', '.join(opened.splits)}"
        )
    return found


if __name__ == "__main__":
    command.run(main)

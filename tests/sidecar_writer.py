"""Writes sidecars whose every value is known, for the tests of the converter."""

import numpy as np

from qdepth_jax.data import sidecar


def make_sidecar(
    root, opened, kind, camera="steps/observation/image", shape=None, seed=0, splits=None, **changed
) -> str:
    """A finished sidecar of all splits with random values; returns its root."""
    shape = shape or ((6, 8) if kind == "depth" else (16,))
    details = {"depth_kind": "relative"} if kind == "depth" else {"grid": 4, "codes": 256}
    for name in splits or opened.splits:
        split = opened.split(name)
        rng = np.random.default_rng([seed, len(name)])
        metadata = sidecar.Metadata(
            **{
                "kind": kind,
                "fingerprint": opened.fingerprint,
                "split": name,
                "camera": camera,
                "identity": f"made for tests, seed {seed}",
                "row_shape": shape,
                "frames": split.frames,
                "episodes": len(split.episodes),
                "details": details,
                **changed,
            }
        )
        writer = sidecar.Writer(str(root), metadata)
        for episode in writer.pending():
            row = split.episodes[episode]
            values = rng.integers(0, 65536 if kind == "depth" else 256, (row["length"], *shape)).astype(np.uint16)
            writer.write(episode, int(row["start"]), values, scale=0.5 + episode, offset=-float(episode))
        writer.finish()
    return str(root)

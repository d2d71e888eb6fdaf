"""Checks our models against golden vectors of other code bases: foreign weights in, our outputs against theirs.

  python tools/check_parity.py FIXTURE.npz

The file says everything itself: sizes and conventions in its config (JSON), weights, inputs and reference outputs. The
layout is recognised by the names of its arrays:
  open_pi_zero   `w/<state-dict key>` and `input_ids`      (qdepth_jax/weights/parity_open_pi_zero.py)
  openpi         `params/PaliGemma/...`, pi0 and pi0.5     (qdepth_jax/weights/parity_openpi.py)
  paligemma      `params/img/...` and `params/llm/...`     (qdepth_jax/weights/parity_paligemma.py)
  video_depth_anything  `w/<state-dict key>`, `ref/frames` (qdepth_jax/weights/parity_video_depth_anything.py)
Exit code 0: within tolerance; 1: not; 2: the file cannot be used. The last line of stdout is JSON.
"""

import json
import pathlib

from absl import flags

from qdepth_jax import command

_ABSOLUTE = flags.DEFINE_float("absolute", 2e-5, "Largest absolute error of features, logits, velocities and actions.")
_RELATIVE = flags.DEFINE_float("relative", 1e-4, "Largest relative error of the loss and of gradient norms.")


def main(argv: list[str]) -> int:
    # Heavy imports only now: --help answers at once.
    import jax

    from qdepth_jax import errors

    jax.config.update("jax_default_matmul_precision", "highest")
    if len(argv) != 2:
        raise errors.UserError(f"usage: check_parity.py FIXTURE.npz (got {len(argv) - 1} arguments)")
    path = pathlib.Path(argv[1])
    arrays = read(path)
    layout = recognise(path, arrays)
    try:
        rows = compare(layout, arrays, _ABSOLUTE.value, _RELATIVE.value)
    except errors.UserError:
        raise
    except (TypeError, ValueError, IndexError, KeyError) as error:  # from inside the model: shapes that do not meet
        shapes = {name: array.shape for name, array in arrays.items() if not name.startswith(("w/", "params/"))}
        raise errors.UserError(
            f"{path}: its arrays do not fit each other ({type(error).__name__}: {str(error).splitlines()[0]}); inputs "
            f"and outputs are {shapes}"
        ) from error
    return report(layout, rows)


def read(path: pathlib.Path) -> dict:
    """All arrays of a golden file, in its order."""
    import zipfile

    import numpy as np

    from qdepth_jax import errors

    if not path.is_file():
        raise errors.UserError(f"{path} is no file: give the path of a golden .npz")
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise errors.UserError(f"{path} cannot be read as .npz: {error}") from error


def recognise(path: pathlib.Path, arrays: dict) -> str:
    """The layout: `open_pi_zero`, `openpi`, `paligemma` or `video_depth_anything`.

    Raises:
      UserError: none of them, or arrays that it needs are missing.
    """
    from qdepth_jax import errors

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in arrays)

    if has("w/pretrained.") and "ref/frames" in arrays:
        layout = "video_depth_anything"
    elif has("params/PaliGemma/"):
        layout = "openpi"
    elif has("params/llm/") and has("params/img/"):
        layout = "paligemma"
    elif has("w/") and "config" in arrays:
        layout = "open_pi_zero"
    else:
        raise errors.UserError(
            f"{path} has an unknown layout: this tool reads open-pi-zero (`config`, `w/...`), openpi "
            f"(`params/PaliGemma/...`), PaliGemma (`params/img/...`, `params/llm/...`) and Video-Depth-Anything "
            f"(`w/pretrained...`, `ref/frames`); found {sorted(arrays)[:4]}..."
        )
    if missing := [name for name in _module(layout).NEEDED if name not in arrays]:
        raise errors.UserError(f"{path} lacks {missing}")
    return layout


def compare(layout: str, arrays: dict, absolute: float, relative: float) -> list:
    """Runs our model on the file's inputs: parity.Rows."""
    return _module(layout).compare(arrays, absolute, relative)


def _module(layout: str):
    import importlib

    return importlib.import_module(f"qdepth_jax.weights.parity_{layout}")


def report(layout: str, rows: list) -> int:
    """Prints the table and the JSON line; the exit code."""
    import math

    failed = [row for row in rows if not row.ok]
    print(f"{'output':<88} {'error':>10} {'tolerance':>10}  kind")
    for row in rows:
        mark = "  <-- FAIL" if row in failed else ""
        print(f"{row.name:<88} {row.error:>10.2e} {row.tolerance:>10.1e}  {row.kind}{mark}")
    groups: dict[str, float] = {}
    for row in rows:
        group = row.name.split("/")[0]
        if "zero" in row.kind:
            group += "_zero"
        error = row.error if math.isfinite(row.error) else float("inf")
        groups[group] = max(groups.get(group, 0.0), error)
    text = {name: value if math.isfinite(value) else str(value) for name, value in groups.items()}
    print(json.dumps({"ok": not failed, "layout": layout, "failed": len(failed), "compared": len(rows), **text}))
    return 1 if failed else 0


if __name__ == "__main__":
    command.run(main)

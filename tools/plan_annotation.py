"""Plans the labelling of a data set with Video-Depth-Anything on chips one does not have: chip-hours and memory.

  python tools/plan_annotation.py                                            # Bridge and Fractal on v5e and v5p
  python tools/plan_annotation.py --data=bridge --input_size=518,392,252     # what a smaller network input saves
  python tools/plan_annotation.py --dataset=DATASET_DIR --camera=IMAGE_KEY   # with the episode lengths of an index

Compiles the window function of tools/annotate_depth.py for the smallest slice of each chip with libtpu (extra `plan`;
no TPU is needed; a minute for each), up to the machine code, whose bytes are not counted. Windows share nothing, so
chip-hours are the same on any number of chips. Without libtpu, or with --nocompile, only the arithmetic counts, and
that is said. The last line of stdout is JSON.
"""

import json
import sys
import time

from absl import flags

_DATA = flags.DEFINE_list("data", ["bridge", "fractal"], "known data sets")
_DATASET = flags.DEFINE_string("dataset", "", "an RLDS data set instead: its own episode lengths count")
_CAMERA = flags.DEFINE_string("camera", "", "image feature of --dataset; default: its definition's main view")
_INDEX_DIR = flags.DEFINE_string("index_dir", "", "root for indexes; default: inside the data set")
_CHIPS = flags.DEFINE_list("chips", ["v5e", "v5p"], "chip types")
_ENCODER = flags.DEFINE_string("encoder", "vitl", "vits, vitb or vitl")
_INPUT_SIZE = flags.DEFINE_list("input_size", ["518"], "short side that the network sees, one or more")
_BATCH = flags.DEFINE_integer("batch", 1, "windows on each chip", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of activations")
_EFFICIENCY = flags.DEFINE_float("efficiency", 0.5, "share of the bound that is assumed", 0.01, 1.0)
_COMPILE = flags.DEFINE_boolean("compile", True, "--nocompile: arithmetic alone")
_CACHE = flags.DEFINE_string("cache", "", "folder that keeps compiled results: the same program is compiled once")


def main(argv: list[str]) -> None:
    from qdepth_jax.plan import topology

    topology.prepare_environment()
    from qdepth_jax import chips, errors

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}: flags are --data, --chips, --input_size, ...")
    for name in _CHIPS.value:
        if name not in chips.CHIPS or chips.CHIPS[name].kind != "tpu":
            known = [chip.name for chip in chips.CHIPS.values() if chip.kind == "tpu"]
            raise errors.UserError(f"--chips={name}: use TPUs, {', '.join(known)}")
    compiles = _COMPILE.value
    if compiles and (missing := topology.compiler_missing()):
        print(f"NOT COMPILED: {missing}. Memory is unknown, and the speed that of the arithmetic.", file=sys.stderr)
        compiles = False
    rows = planned(compiles)
    print(text(rows))
    print(json.dumps({"encoder": _ENCODER.value, "dtype": _DTYPE.value, "efficiency": _EFFICIENCY.value, "rows": rows}))


def planned(compiles: bool) -> list[dict]:
    """One row for each data set, input size and chip."""
    from qdepth_jax import video_depth
    from qdepth_jax.plan import annotation, topology

    start = time.monotonic()
    say = lambda message: print(f"[{time.monotonic() - start:6.1f} s] {message}", file=sys.stderr, flush=True)  # noqa: E731
    rows = []
    for name, (work, windows) in works().items():
        for input_size in map(int, _INPUT_SIZE.value):
            for chip in _CHIPS.value:
                where = topology.parse(f"{chip}:" + ("1x1" if topology.chips.CHIPS[chip].dimensions == 2 else "2x2x1"))
                row = annotation.plan(
                    _ENCODER.value,
                    _DTYPE.value,
                    work.size,
                    input_size,
                    _BATCH.value,
                    where,
                    compiles,
                    _CACHE.value,
                    say,
                )
                row |= {"data": name, "input_size": input_size, "frames": work.frames, "episodes": work.episodes}
                row |= {"windows": windows, "computed": windows * video_depth.LENGTH / work.frames}
                row |= {"usable": where.chip.usable_bytes, "source": work.source}
                rows.append(row | {"chip_hours": annotation.chip_hours(row, windows, _EFFICIENCY.value)})
    return rows


def works() -> dict:
    """Data set name -> (annotation.Work, windows)."""
    from qdepth_jax import errors
    from qdepth_jax.plan import annotation

    if not _DATASET.value:
        unknown = sorted(set(_DATA.value) - set(annotation.DATA))
        if unknown:
            raise errors.UserError(
                f"--data={','.join(unknown)}: known are {', '.join(annotation.DATA)}, or --dataset=DIR"
            )
        return {name: (annotation.DATA[name], annotation.DATA[name].windows) for name in _DATA.value}
    import numpy as np

    from qdepth_jax.data import definitions, episode_reader, index

    opened = index.open_index(_DATASET.value, _INDEX_DIR.value)
    camera = _CAMERA.value or f"steps/{definitions.find(opened.dataset.name).main_view}"
    reader = episode_reader.EpisodeReader(next(iter(opened.splits.values())))
    size = reader.image_size(camera)
    reader.close()
    lengths = np.concatenate([split.episodes["length"] for split in opened.splits.values()])
    return {opened.dataset.name: annotation.work_of(lengths, size, "its index")}


def text(rows: list[dict]) -> str:
    """The table, and what it assumes."""
    out, gib = [], 2**30
    for row in {row["data"]: row for row in rows}.values():
        out += [
            f"{row['data']}: {row['frames']:,} frames of {row['frame'][0]}x{row['frame'][1]} in {row['episodes']:,} "
            f"episodes, mean {row['frames'] / row['episodes']:.1f} ({row['source']})",
            f"  {row['windows']:,.0f} windows of 32 in steps of 22: the network sees {row['computed']:.2f} frames for "
            "each of them (32/22 = 1.45 in endless episodes; short ones repeat their last frame)",
        ]
    header = [
        *("data", "chip", "input", "TFLOP a frame", "peak GiB a chip", "compute s", "HBM s", "limit"),
        *("frames/s a chip", "MFU %", "chip-hours at the bound", "without overlap"),
        f"at {_EFFICIENCY.value:.0%} of the bound",
    ]
    out += [
        "",
        f"{_ENCODER.value}, {_DTYPE.value}, {_BATCH.value} x 32 frames at once on each chip, nothing sent between "
        "chips; roofline at data sheet peaks",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for row in rows:
        memory = "not compiled"
        if row["compiled"]:
            memory = f"{row['needed'] / gib:.2f} of {row['usable'] / gib:.2f}" + ("" if row["fits"] else ": NO")
        hours = row["chip_hours"]
        cells = (
            row["data"],
            row["chip"],
            f"{row['network'][0]}x{row['network'][1]}",
            f"{row['tflop_per_frame']:.3f}",
            memory,
            f"{row['compute']:.3f}",
            f"{row['hbm']:.3f}" if row["hbm"] else "-",
            row["limit"],
            f"{row['frames_per_second_sum']:.0f} to {row['frames_per_second_bound']:.0f}",
            f"{100 * row['mfu_sum']:.0f} to {100 * row['mfu_bound']:.0f}",
            *(f"{hours[key]:.1f}" for key in ("bound", "sum", "assumed")),
        )
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join([*out, "", "Nothing here was measured on a chip."])


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)

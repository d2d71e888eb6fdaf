"""Data loaders side by side: CPU per frame, memory, start, and what each promises.

  python benchmarks/loader.py [--octo=DIR --dlimp=DIR] [--repeats=5] [--append_results]

Contenders, each cell in a fresh process, on the same data (benchmarks/make_dataset.py, written on first use):
  octo      the real thing, from checkouts of github.com/octo-models/octo and github.com/kvablack/dlimp
  tfdata    the same stages in one small file of tf.data (runs without a checkout)
  ours      qdepth_jax.data.loader
  arrayrecord, arrayrecord_episodes   TFDS rewritten to ArrayRecord, read through grain (pip install grain array-record)
Those that cannot run here are left out, and named.

Modes: decode at stored size; decode + Lanczos-3 to 224 on the host; the same + octo's augmentation. In the last two
"ours" is equal work on the CPU. Rows called "sent raw" are not: they are the decode cell, beside what the others do on
the host, because in training our device resizes and augments.

Procedure: page cache warmed; contenders take turns (A B C D A B C D ...), --repeats times; 10 batches pass before the
measured ones. CPU time is user + system of the whole process tree and the figure to trust; frames/s suffers from what
else runs, which is recorded (load, cores used by others). Finished cells are kept in --cells: a stopped run goes on, if
neither its settings nor the code have changed.
"""

import datetime
import functools
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the package `benchmarks`, and this tree's qdepth_jax before an installed one

from benchmarks import default_data, loader_cell, loader_report  # noqa: E402

_DATA = flags.DEFINE_string(
    "data", "", "data set in the layout of benchmarks/make_dataset.py; default: made in --scratch"
)
_SCRATCH = flags.DEFINE_string("scratch", str(ROOT / "runs" / "benchmark"), "folder for data and finished cells")
_OCTO = flags.DEFINE_string("octo", "", "checkout of octo (measured with 241fb35)")
_DLIMP = flags.DEFINE_string("dlimp", "", "checkout of dlimp (measured with ad72ce3)")
_CONTENDERS = flags.DEFINE_list("contenders", [], "default: all that can run here")
_MODES = flags.DEFINE_list("modes", ["decode", "resize", "augment"], "of the measured cells")
_REPEATS = flags.DEFINE_integer("repeats", 5, "fresh processes per cell", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", 80, "measured batches per cell", lower_bound=2)
_SKIP = flags.DEFINE_integer("skip", 10, "batches before them", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "frames per batch", lower_bound=1)
_BUFFERS = flags.DEFINE_list("buffers", ["2000"], "shuffle buffers of octo and tfdata; the further ones in mode decode")
_THREADS = flags.DEFINE_integer("threads", 0, "decode threads of ours and grain, 0 = cores")
_GATES = flags.DEFINE_bool("gates", True, "also try what each loader promises (several minutes)")
_PREPARE = flags.DEFINE_bool("prepare", True, "also measure the one-time work on the data set")
_CELLS = flags.DEFINE_string("cells", "", "file of finished cells; default: in --scratch, by settings")
_APPEND = flags.DEFINE_bool("append_results", False, "append the tables to benchmarks/RESULTS.md")

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
# Rows of the table by mode. Frames drawn one by one from episode records cost several times the decode: measured once.
_BY_MODE = {
    "decode": loader_cell.CONTENDERS,
    "resize": ("octo", "tfdata", "ours"),
    "augment": ("octo", "tfdata", "ours"),
}


def main(argv: list[str]) -> int:
    from qdepth_jax import errors, progress

    if len(argv) > 1:
        raise errors.UserError(f"unexpected arguments {argv[1:]}; flags start with --")
    unknown = [mode for mode in _MODES.value if mode not in _BY_MODE]
    if unknown:
        raise errors.UserError(f"--modes={','.join(unknown)} is not known; there are {', '.join(_BY_MODE)}")
    present, absent = _contenders()
    data = _data()
    common = {
        "data": data,
        "array_record": _array_record(data) if any(name.startswith("arrayrecord") for name in present) else "",
        "octo": _OCTO.value and os.path.abspath(_OCTO.value),
        "dlimp": _DLIMP.value and os.path.abspath(_DLIMP.value),
        "batch_size": _BATCH_SIZE.value,
        "skip": _SKIP.value,
        "batches": _BATCHES.value,
        "threads": _THREADS.value,
    }
    plan = _plan(present, common)
    path = pathlib.Path(_CELLS.value or pathlib.Path(_SCRATCH.value) / "cells.jsonl")
    done = _finished(path)
    left = [item for item in plan if _key(*item) not in done]
    if len(left) < len(plan):
        print(f"{len(plan) - len(left)} of {len(plan)} cells are in {path} already", file=sys.stderr)
    _warm(data, common["array_record"])
    bar = progress.Progress(len(plan), "cells", initial=len(plan) - len(left), unit="cell")
    for repeat, cell in left:
        result = run_cell(cell) | {"repeat": repeat, "code": _code()}
        done[_key(repeat, cell)] = result
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        note = result.get("cpu_ms_per_frame")
        bar.update(1, f"{cell.contender} {cell.mode}" + (f" {note:.2f} CPU-ms/frame" if note else ""))
    bar.close()
    rows = [done[_key(*item)] for item in plan]
    text, summary = report(rows, absent)
    print(text)
    if _APPEND.value:
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write("\n" + text)
    # A run that ended is over: the next one measures anew.
    os.replace(path, path.with_suffix(".last.jsonl"))
    print(json.dumps(summary))
    return 0


def run_cell(cell: loader_cell.Cell) -> dict:
    """Runs one cell in a process of its own.

    Raises:
      UserError: it failed; carries the end of its stderr.
    """
    from qdepth_jax import errors

    asked = {name: getattr(cell, name) for name in cell.__dataclass_fields__}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loader_child", json.dumps(asked)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        end = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise errors.UserError(f"cell {cell.contender} {cell.mode} failed with exit code {done.returncode}:\n{end}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(rows: list[dict], absent: dict[str, str]) -> tuple[str, dict]:
    """(Markdown for people and RESULTS.md, the JSON summary)."""
    lines = loader_report.summarise(rows)
    gates = [row for row in rows if row["cell"]["mode"] == "gates"]
    prepared = [row for row in rows if row["cell"]["mode"] == "prepare"]
    timed = [row for row in rows if row["cell"]["mode"] in _BY_MODE]
    machine = loader_report.machine()
    packages = loader_report.versions(
        ("numpy", "simplejpeg", "pillow", "jax", "tensorflow", "tensorflow-cpu", "tensorflow-datasets", "grain",
         "array-record", "opencv-python-headless")
    )  # fmt: skip
    loads, others = ([row[name] for row in timed] for name in ("load_1m", "others_cores"))
    shown = [arg for arg in sys.argv[1:] if not arg.startswith(("--scratch", "--data", "--cells"))]
    shown = [arg if not arg.startswith(("--octo=", "--dlimp=")) else arg.partition("=")[0] + "=DIR" for arg in shown]
    text = [
        f"## {datetime.date.today()} loaders: {machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB",
        "",
        f"`python benchmarks/loader.py {shlex.join(shown)}`".replace(" `", "`"),
        f"{machine['system']}; " + ", ".join(f"{name} {number}" for name, number in packages.items()) + ".",
        f"{_REPEATS.value} repeats in turns; median [quartiles]; {_BATCHES.value} batches of {_BATCH_SIZE.value}.",
        f"Load average {min(loads):.1f} to {max(loads):.1f}; others used {min(others):.2f} to {max(others):.2f} cores.",
        *(f"Left out: {name}: {why}." for name, why in absent.items()),
        "",
        loader_report.table(lines),
        "",
    ]
    if prepared:
        text += [loader_report.prepare_table(prepared), ""]
    if gates:
        text += [loader_report.gate_table(gates), ""]
    summary = {"machine": machine, "versions": packages, "lines": lines, "gates": gates, "left_out": absent}
    return "\n".join(text), summary


def _plan(present: list[str], common: dict) -> list[tuple[int, loader_cell.Cell]]:
    """(repeat, cell) in running order: within a repeat and mode the contenders take turns."""
    first, *further = [int(buffer) for buffer in _BUFFERS.value]
    cells = []
    for repeat in range(_REPEATS.value):
        for mode in _MODES.value:
            for name in present:
                if name in _BY_MODE[mode]:
                    cells.append((repeat, loader_cell.Cell(name, mode, buffer=first, **common)))
        if "decode" in _MODES.value:
            for buffer in further:
                for name in sorted({"octo", "tfdata"} & set(present)):
                    cells.append((repeat, loader_cell.Cell(name, "decode", buffer=buffer, **common)))
    if _PREPARE.value:
        with_work = [name for name in present if not name.startswith("arrayrecord")]
        cells += [(0, loader_cell.Cell(name, "prepare", buffer=first, **common)) for name in with_work]
    if _GATES.value:
        cells += [(0, loader_cell.Cell(name, "gates", buffer=first, **common)) for name in present]
    return cells


def _contenders() -> tuple[list[str], dict[str, str]]:
    """(Those that can run here, the others with the reason)."""
    import importlib.util

    from qdepth_jax import errors

    asked = _CONTENDERS.value or list(loader_cell.CONTENDERS)
    unknown = sorted(set(asked) - set(loader_cell.CONTENDERS))
    if unknown:
        raise errors.UserError(f"--contenders={','.join(unknown)}: there are {', '.join(loader_cell.CONTENDERS)}")
    needs = {
        "octo": ("tensorflow", "tensorflow_datasets"),
        "tfdata": ("tensorflow", "tensorflow_datasets"),
        "ours": (),
        "arrayrecord": ("tensorflow_datasets", "grain", "array_record"),
        "arrayrecord_episodes": ("tensorflow_datasets", "grain", "array_record"),
    }
    absent = {}
    for name in asked:
        missing = [module for module in needs[name] if importlib.util.find_spec(module) is None]
        if missing:
            absent[name] = f"{', '.join(missing)} not installed"
        elif name == "octo" and not (_OCTO.value and _DLIMP.value):
            absent[name] = "needs --octo=DIR and --dlimp=DIR, two checkouts"
    if absent and _CONTENDERS.value:
        raise errors.UserError("; ".join(f"{name} {why}" for name, why in absent.items()))
    return [name for name in loader_cell.CONTENDERS if name in asked and name not in absent], absent


def _data() -> str:
    """The data set and its index; written and built on first use."""
    from qdepth_jax.data import index, spec

    directory = spec.find_version(_DATA.value or default_data.write(_SCRATCH.value))
    index.open_index(directory)
    return directory


def _array_record(data: str) -> str:
    from benchmarks import loader_arrayrecord

    name, version = data.rstrip("/").split("/")[-2:]
    return loader_arrayrecord.rewrite(data, os.path.join(_SCRATCH.value, "array_record", name, version))


def _warm(*folders: str) -> None:
    """Reads every shard once, so that no cell pays for the disk."""
    for folder in filter(None, folders):
        for path in sorted(pathlib.Path(folder).glob("*record-*")):
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def _key(repeat: int, cell: loader_cell.Cell) -> str:
    fields = {name: getattr(cell, name) for name in cell.__dataclass_fields__}
    return json.dumps([_code(), repeat, fields], sort_keys=True)


@functools.cache
def _code() -> str:
    """Digest of what is measured and of what measures."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("qdepth_jax/**/*.py"), *ROOT.glob("benchmarks/loader*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _finished(path: pathlib.Path) -> dict[str, dict]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    rows = [row for row in rows if row.get("code") == _code()]
    return {_key(row["repeat"], loader_cell.Cell(**row["cell"])): row for row in rows}


if __name__ == "__main__":
    from qdepth_jax import command

    command.run(main)

"""One cell of the loader benchmark: one contender, one mode, in a process of its own (loader_child.py).

A contender is a module `benchmarks.loader_NAME` with `open_batches(cell)`, an
endless iterator of dicts: image_main, image_wrist u8 [B, S, S, 3], proprio f32 [B, D], action f32 [B, Z, A], and, in
mode "gates", key i64 [B] = 10000 * episode + step. What a contender imports at its top counts as import, what
open_batches does before the first batch as build.
"""

import dataclasses
import importlib
import itertools
import os
import resource
import time
from collections.abc import Iterator
from typing import Any

# "decode": images at their stored size. "resize": and Lanczos-3 to `size`. "augment": and octo's published
# augmentation (main view: crop and colour, wrist view: colour). "gates": as decode, with frame keys. "prepare": what
# has to be done once per data set before the first start.
MODES = ("decode", "resize", "augment", "gates", "prepare")
CONTENDERS = ("octo", "tfdata", "ours", "arrayrecord", "arrayrecord_episodes")
KEY_BASE = 10_000  # more than the steps of any episode
_MB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Cell:
    """What to measure.

    Attributes:
      data: folder of the data set version; array_record: the same data rewritten (benchmarks/loader_arrayrecord.py).
      skip, batches: batches before and inside the measured window.
      buffer: frames in the shuffle buffer of those who need one.
      threads: decode threads of ours and of grain, 0 = cores. tf.data tunes itself.
      octo, dlimp: checkouts.
    """

    contender: str
    mode: str
    data: str
    array_record: str = ""
    octo: str = ""
    dlimp: str = ""
    batch_size: int = 32
    skip: int = 10
    batches: int = 80
    buffer: int = 2000
    threads: int = 0
    seed: int = 0
    size: int = 224
    horizon: int = 4
    # octo takes the first 95 % of a data set without a validation split; so does everybody.
    split: str = "train[:95%]"


def module_of(contender: str):
    """The contender's module, heavy imports included."""
    return importlib.import_module(f"benchmarks.loader_{contender.partition('_')[0]}")


def measure(cell: Cell) -> dict[str, Any]:
    """Runs a cell in this process. CPU is user + system time of the process and its descendants."""
    start, rss_start = time.perf_counter(), rss_mb()
    module = module_of(cell.contender)
    imported, rss_import, cpu_import = time.perf_counter(), rss_mb(), cpu_seconds()
    if cell.mode == "prepare":
        detail = module.prepare(cell)
        return _row(cell, detail) | {
            "prepare_s": time.perf_counter() - imported,
            "prepare_cpu_s": cpu_seconds() - cpu_import,
            "rss_peak_mb": rss_peak_mb(),
        }
    batches = module.open_batches(cell)
    built, rss_build = time.perf_counter(), rss_mb()
    first = next(batches)
    first_at = time.perf_counter()
    shapes = {name: [str(value.dtype), *value.shape] for name, value in first.items()}
    for _ in itertools.islice(batches, cell.skip - 1):
        pass
    load, busy = os.getloadavg()[0], machine_busy_seconds()
    cpu, wall, resident = cpu_seconds(), time.perf_counter(), [rss_mb()]
    for _ in itertools.islice(batches, cell.batches):
        resident.append(rss_mb())
    cpu, wall, busy = cpu_seconds() - cpu, time.perf_counter() - wall, machine_busy_seconds() - busy
    frames = cell.batches * cell.batch_size
    return _row(cell, {"shapes": shapes}) | {
        "cpu_ms_per_frame": 1000 * cpu / frames,
        "frames_per_s": frames / wall,
        "import_s": imported - start,
        "build_s": built - imported,
        "first_batch_s": first_at - built,
        "rss_start_mb": rss_start,
        "rss_import_mb": rss_import,
        "rss_build_mb": rss_build,
        "rss_peak_mb": max(rss_peak_mb(), *resident),
        "rss_growth_mb": max(rss_peak_mb(), *resident) - rss_import,
        "rss_slope_mb_per_1k_batches": slope(resident) * 1000,
        "load_1m": load,
        # What everybody else took of the machine meanwhile, in cores.
        "others_cores": max(0.0, busy - cpu) / wall,
    }


def _row(cell: Cell, detail: dict[str, Any]) -> dict[str, Any]:
    return {"cell": dataclasses.asdict(cell), "cores": len(os.sched_getaffinity(0)), **detail}


def slope(values: list[float]) -> float:
    """Least-squares slope per item."""
    n = len(values)
    mean_x, mean_y = (n - 1) / 2, sum(values) / n
    above = sum((x - mean_x) * (y - mean_y) for x, y in enumerate(values))
    below = sum((x - mean_x) ** 2 for x in range(n))
    return above / below if below else 0.0


# ---- what Linux says about this process ----


def cpu_seconds() -> float:
    """User + system seconds of this process, its ended children, and its living descendants."""
    total = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    tick = os.sysconf("SC_CLK_TCK")
    for pid in _descendants(os.getpid()):
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                # Behind the name in brackets: state is field 3, utime, stime, cutime, cstime are 14 to 17.
                total += sum(int(value) for value in file.read().rpartition(")")[2].split()[11:15]) / tick
        except FileNotFoundError:
            continue  # it ended since: getrusage has its time once it has been waited for
    return total


def _descendants(pid: int) -> Iterator[int]:
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                children = [int(child) for child in file.read().split()]
        except FileNotFoundError:
            continue  # a thread that ended
        for child in children:
            yield child
            if os.path.isdir(f"/proc/{child}"):
                yield from _descendants(child)


def machine_busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used (user, nice, system, interrupts)."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = [int(value) for value in file.readline().split()[1:8]]
    user, nice, system, _idle, _wait, irq, softirq = fields
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def rss_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / _MB


def rss_peak_mb() -> float:
    """Highest RSS of the process so far (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

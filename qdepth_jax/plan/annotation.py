"""What labelling a data set with Video-Depth-Anything costs on chips one does not have.

The program is the one that tools/annotate_depth.py runs (video_depth.make_window_fn), data-parallel: every chip has the
whole network and windows of its own, nothing is sent between chips. So one chip says all, and chip-hours do not depend
on how many there are.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import video_depth
from qdepth_jax.models import depth_anything, depth_flops
from qdepth_jax.plan import hlo, placed, topology, traffic


@dataclasses.dataclass(frozen=True)
class Work:
    """A camera of a data set. size: (height, width) of its frames; source: where the numbers stand."""

    frames: int
    episodes: int
    size: tuple[int, int]
    source: str

    @property
    def mean_length(self) -> float:
        return self.frames / self.episodes

    @property
    def windows(self) -> float:
        """Windows of all episodes, if lengths leave every remainder of the step equally often.

        ceil(T / 22) = (T + what is missing to the next multiple) / 22, and of that 10.5 are missing on average.
        """
        return self.episodes * (self.mean_length + (video_depth.STEP - 1) / 2) / video_depth.STEP

    @property
    def computed(self) -> float:
        """Frames that the network sees for each frame of the data set: overlaps and repeated last frames included."""
        return self.windows * video_depth.LENGTH / self.frames


# Frames as stored, steps without an action included: they are labelled too.
DATA: dict[str, Work] = {
    "bridge": Work(2_195_527 + 60_064, 60_064, (256, 256), "octo's OXE statistics, with the last steps that it drops"),
    "fractal": Work(3_786_400, 87_212, (256, 320), "octo's OXE statistics"),
}


def work_of(lengths: np.ndarray, size: tuple[int, int], source: str) -> tuple[Work, float]:
    """(the work of known episode lengths i [E], their true number of windows)."""
    windows = float(np.sum(-(-np.asarray(lengths) // video_depth.STEP)))
    return Work(int(np.sum(lengths)), len(lengths), size, source), windows


def lower(
    config: depth_anything.DepthAnythingConfig,
    size: tuple[int, int],
    input_size: int,
    batch: int,
    devices: Sequence[Any],
) -> jax.stages.Lowered:
    """The window function for `batch` windows on each of `devices`, traced and partitioned; nothing is allocated."""
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = jax.eval_shape(lambda: depth_anything.init(config, jax.random.key(0)))["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
    shape = (batch * len(devices), video_depth.LENGTH, *size, 3)
    frames = jax.ShapeDtypeStruct(shape, np.uint8, sharding=split)
    window = video_depth.make_window_fn(config, *size, input_size)
    # As device_groups.stream runs it: every device has its own copy of the program.
    alone = jax.shard_map(window, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    return jax.jit(alone).lower(params, frames)


def plan(
    encoder: str,
    dtype: str,
    size: tuple[int, int],
    input_size: int,
    batch: int,
    where: topology.Topology,
    compiles: bool,
    cache: str = "",
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Seconds and memory of `batch` windows on each chip of `where`, as JSON types.

    Without `compiles`, or where the program is refused for want of memory, the traffic to memory is unknown and the
    speed that of the arithmetic alone.
    """
    config = depth_anything.sized(encoder, video=True, dtype=dtype)
    network = video_depth.network_size(*size, input_size, config.trunk.patch)
    parts = depth_flops.parts(config, video_depth.LENGTH, *network)
    out: dict[str, Any] = {
        "chip": where.chip.name,
        "topology": where.name,
        "frame": list(size),
        "network": list(network),
        "windows_per_chip": batch,
        "tflop_per_frame": sum(parts.values()) / video_depth.LENGTH / 1e12,
        "parts_tflop_per_frame": {name: value / video_depth.LENGTH / 1e12 for name, value in parts.items()},
        "compiled": compiles,
        "fits": None,
        "needed": None,
        "hbm_bytes": None,
        "hbm": 0.0,
        "compute": batch * sum(parts.values()) / where.chip.peak_flops,
    }
    if compiles:
        progress(f"{where.name}, {network[0]}x{network[1]}, {batch} windows a chip: compiling")
        side = "x".join(map(str, where.shape))
        order = {"topology": f"{where.chip.name}:{side}", "encoder": encoder, "dtype": dtype, "size": list(size)}
        order |= {"input_size": input_size, "batch": batch}
        made = placed.compile_placed("qdepth_jax.plan.annotation_child", order, cache)
        progress(f"compiled in {made.seconds:.0f} s" + (" (from the cache)" if made.cached else ""))
        fits = made.fits and made.needed <= where.chip.usable_bytes
        out |= {"fits": fits, "needed": made.needed}
        if made.text:
            out["hbm_bytes"] = traffic.hbm_bytes(hlo.parse(made.text), ())
            out["hbm"] = out["hbm_bytes"] / where.chip.hbm_bandwidth
    bound, total = max(out["compute"], out["hbm"]), out["compute"] + out["hbm"]
    frames = batch * video_depth.LENGTH
    return out | {
        "bound": bound,
        "sum": total,
        "limit": "compute" if out["compute"] >= out["hbm"] else "hbm",
        "frames_per_second_bound": frames / bound,
        "frames_per_second_sum": frames / total,
        "mfu_bound": out["compute"] / bound,
        "mfu_sum": out["compute"] / total,
    }


def chip_hours(planned: dict[str, Any], windows: float, efficiency: float) -> dict[str, float]:
    """Chip-hours of so many windows: at the bound, if nothing overlaps, and at `efficiency` of the bound."""
    hours = windows / planned["windows_per_chip"] / 3600
    return {
        "bound": hours * planned["bound"],
        "sum": hours * planned["sum"],
        "assumed": hours * planned["bound"] / efficiency,
    }

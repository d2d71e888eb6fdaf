"""Our Video-Depth-Anything forward pass, compiled as tools/annotate_depth.py compiles it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import video_depth_order


def build(order: video_depth_order.Order) -> tuple[Callable[[int], None], dict[str, Any]]:
    """-> run(forward passes), which leaves the last depth in the folder, and facts."""
    import jax
    import jax.numpy as jnp

    from qdepth_jax.models import depth_anything, depth_flops

    if order.device == "gpu" and jax.default_backend() != "gpu":
        raise RuntimeError(f"--device=gpu, but JAX's backend is {jax.default_backend()!r}: install the extra `cuda`")
    config = depth_anything.sized(order.encoder, video=True, dtype=order.dtype, scan=order.scan)
    params = jax.tree.map(jnp.asarray, _weights(order, config))
    frames = jnp.asarray(video_depth_order.make_frames(order))
    forward = jax.jit(lambda params, frames: depth_anything.estimate(config, params, frames))
    compiled = forward.lower(params, frames).compile()

    def run(passes: int) -> None:
        for _ in range(passes):
            depth = compiled(params, frames)
        depth.block_until_ready()
        if not order.depth_file(order.contestant).exists():
            np.save(order.depth_file(order.contestant), np.asarray(depth))

    notes = [f"jax {jax.__version__}", f"scan={order.scan}"]
    if order.dtype == "bfloat16":
        notes.append("float32 weights, bfloat16 activations, float32 norms, softmax and last two layers")
    return run, {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "notes": notes,
        "device_kind": jax.devices()[0].device_kind,
        "flops_per_frame": depth_flops.total(config, order.frames, order.height, order.width) / order.frames,
    }


def _weights(order: video_depth_order.Order, config) -> Any:
    """The original's weights through the importer of its checkpoints; without a checkout fresh ones."""
    import jax

    from qdepth_jax.models import depth_anything
    from qdepth_jax.weights import depth_anything as depth_table
    from qdepth_jax.weights import table

    if not order.checkout:
        return depth_anything.init(config, jax.random.key(0))["params"]
    shapes = jax.eval_shape(lambda: depth_anything.init(config, jax.random.key(0)))["params"]
    with np.load(order.weights) as file:
        return table.load(dict(file), depth_table.TABLE, shapes, "depth network").params

"""Our sampler for the race in benchmarks/inference.py: the program that planner.py compiles, on packed parameters.

It takes the picture as bytes and prepares it inside; the noise comes from outside, so that all contestants compute the
same numbers.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import inference_sizes as sizes


def build(order: sizes.Order) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """-> run(flow steps) -> actions [1, Z, A], and `sizes.facts`."""
    import jax

    from qdepth_jax.models import inference, policy, sampling

    if order.device == "gpu" and jax.default_backend() != "gpu":
        raise RuntimeError(f"--device=gpu, but JAX's backend is {jax.default_backend()!r}: install the extra `cuda`")
    size, folder = sizes.SIZES[order.size], pathlib.Path(order.folder)
    config = _config(order)
    if order.checkout:
        params, noise = _weights(config, order, folder), np.load(folder / "noise.npy")
    else:
        params, noise = policy.init(config, jax.random.key(0))["params"], sizes.draw_noise(size)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    packed = inference.pack(config, params, "int8" if order.contestant == "int8" else "float", donate=True)
    del params
    batch = sizes.observation(size)
    batch["image_main"] = batch.pop("image")

    @functools.cache
    def program(steps: int):
        at = dataclasses.replace(config, flow=dataclasses.replace(config.flow, steps=steps))
        sample = jax.jit(lambda p, b, n: sampling.sample_actions(at, p, {}, b, n))
        return sample.lower(packed, batch, noise).compile()

    def run(steps: int) -> np.ndarray:
        return np.asarray(program(steps)(packed, batch, noise))

    notes = [f"jax {jax.__version__}", f"scan={config.scan}"]
    if order.contestant == "int8":
        notes.append("vision and vlm in int8, action expert and embedding as they are")
    return run, sizes.facts(
        parameters=count,
        weight_bytes=inference.size_in_bytes(packed),
        notes=notes,
        device_kind=jax.devices()[0].device_kind,
    )


def _config(order: sizes.Order):
    from benchmarks import train_step_ours
    from qdepth_jax.models import policy_config

    config = train_step_ours.policy_config(order)
    if order.contestant != "ours_pi0":
        return config
    # openpi: state and action of the same size, one rotary base for both experts; text 0 is padding here and there.
    size = sizes.SIZES[order.size]
    action = dataclasses.replace(config.action, rope_theta=config.vlm.rope_theta)
    return dataclasses.replace(config, **policy_config.CONVENTIONS["pi0"], proprio_dim=size.action_dim, action=action)


def _weights(config, order: sizes.Order, folder: pathlib.Path) -> Any:
    """The original's weights as our tree, through the importer of its checkpoints."""
    import jax

    from qdepth_jax.models import policy
    from qdepth_jax.weights import open_pi_zero, openpi, table

    shapes = jax.eval_shape(lambda: policy.init(config, jax.random.key(0)))["params"]
    if order.contestant == "ours_pi0":
        arrays = {path.stem.replace(".", "/"): np.load(path, mmap_mode="r") for path in folder.glob("params.*.npy")}
        return table.load(arrays, openpi.rows(config), shapes, openpi.TITLE, openpi.clean).params
    # A weight's name has a dot of its own; noise.npy has none.
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.*.npy")}
    return open_pi_zero.load(arrays, shapes).params

"""Our train step on the open-pi-zero baseline, for the race in benchmarks/train_step.py.

It is `train_step.train_step` compiled as the training loop compiles it. The one difference: noise and time come with
the batch, so that all contestants compute the same numbers.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import train_step_sizes as sizes


def policy_config(order: sizes.Order):
    """The PolicyConfig of a size: `faithful`, because the same weights have to be trained."""
    from qdepth_jax.models import policy
    from qdepth_jax.models.flow import FlowConfig
    from qdepth_jax.models.gemma import ExpertConfig
    from qdepth_jax.models.siglip import SiglipConfig

    size = sizes.SIZES[order.size]
    return policy.PolicyConfig(
        siglip=SiglipConfig(
            image_size=size.image_size,
            patch=size.patch,
            width=size.vision_width,
            depth=size.vision_layers,
            heads=size.vision_heads,
            mlp=size.vision_mlp,
        ),
        vlm=ExpertConfig(size.vlm_width, size.vlm_mlp, size.rope_theta),
        action=ExpertConfig(size.action_width, size.action_mlp, size.action_rope_theta),
        depth=None,
        layers=size.layers,
        heads=size.heads,
        head_dim=size.head_dim,
        text_length=size.text_length,
        vocabulary=size.vocabulary,
        proprio_dim=size.proprio_dim,
        action_dim=size.action_dim,
        horizon=size.horizon,
        flow=FlowConfig(time_period=size.time_period),
        dtype=order.dtype,
        scan=order.scan,
        remat=order.remat,
        faithful=True,
    )


def parts(order: sizes.Order) -> tuple[Callable, Any, dict[str, Any], Any, Any]:
    """-> the step before `jit`, its fresh state, its batch, the objective and the config."""
    import jax
    import jax.numpy as jnp

    from qdepth_jax import config as config_lib
    from qdepth_jax import optim, train_step
    from qdepth_jax.models import policy

    config, folder = policy_config(order), pathlib.Path(order.folder)
    batch = sizes.make_batch(sizes.SIZES[order.size], order.batch)
    batch["image_main"] = batch.pop("image")
    batch["position"] = np.arange(order.batch, dtype=np.uint32)
    if (folder / "noise.npy").exists():
        batch["noise"] = np.load(folder / "noise.npy")
    else:
        batch["noise"] = np.random.default_rng(sizes.NOISE_SEED).normal(size=batch["action"].shape).astype(np.float32)

    def loss(params, state, batch, key, step):
        del key  # nothing is left to draw
        return policy.loss_at(config, params, state, batch, batch["noise"], batch["t"], step)

    objective = policy.make_objective(config)._replace(loss=loss)
    if order.open_pi_zero:
        params = jax.tree.map(jnp.asarray, _weights(config, folder))
        objective = objective._replace(init=lambda key: {"params": params, "state": {}})
    frozen = policy.frozen_table(config)
    settings = config_lib.OptimConfig(
        learning_rate=sizes.LEARNING_RATE, schedule="constant", warmup_steps=0, clip_norm=sizes.CLIP_NORM
    )
    tx = optim.make(settings, 1, frozen)
    state = train_step.init_state(jax.random.key(0), objective, tx, ema=False)
    step = functools.partial(
        train_step.train_step, objective=objective, tx=tx, frozen=frozen, micro_batches=1, ema_decay=0.0
    )
    return step, state, {name: jnp.asarray(value) for name, value in batch.items()}, objective, config


def build(order: sizes.Order) -> tuple[Callable[[int], list[tuple[float, float]]], dict[str, Any]]:
    """-> run(steps) -> [(loss, gradient norm) of each step], and `sizes.facts`."""
    import jax

    from qdepth_jax import config as config_lib
    from qdepth_jax import sharding
    from qdepth_jax.models import policy

    if order.device == "gpu" and jax.default_backend() != "gpu":
        raise RuntimeError(f"--device=gpu, but JAX's backend is {jax.default_backend()!r}: install the extra `cuda`")
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        step, state, batch, objective, config = parts(order)
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch, jax.random.key(0)).compile()
    count, trained = _count(state.params, policy.frozen_table(config))
    held = {"state": state}
    del state

    def run(steps: int) -> list[tuple[float, float]]:
        rows, key = [], jax.random.key(0)
        for _ in range(steps):
            held["state"], metrics = compiled(held["state"], batch, key)
            rows.append((metrics["loss"], metrics["grad_norm"]))
        jax.block_until_ready(held["state"])
        return [(float(loss), float(norm)) for loss, norm in rows]

    notes = [f"jax {jax.__version__}", f"scan={config.scan}", f"remat={config.remat}"]
    if config.dtype == "bfloat16":
        notes.append("float32 weights, gradients and moments; bfloat16 activations")
    return run, sizes.facts(
        parameters=count,
        trained=trained,
        notes=notes,
        flops_per_sample=objective.flops,
        device_kind=jax.devices()[0].device_kind,
    )


def _weights(config, folder: pathlib.Path) -> Any:
    """The torch contestant's weights as our tree, through the importer of open-pi-zero checkpoints."""
    import jax

    from qdepth_jax.models import policy
    from qdepth_jax.weights import open_pi_zero

    shapes = jax.eval_shape(lambda: policy.init(config, jax.random.key(0)))["params"]
    # A weight's name has a dot of its own; noise.npy has none.
    return open_pi_zero.load(
        {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.*.npy")}, shapes
    ).params


def _count(params, frozen) -> tuple[int, int]:
    """Parameters, and how many of them are trained."""
    import jax

    from qdepth_jax import optim, sharding

    total = trained = 0
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total += leaf.size
        kind = optim.frozen_kind(sharding.path_of(key_path), frozen)
        parts = {
            "all": leaf.size,
            "last_layer": leaf[-1:].size,
            "last_layer_value": leaf[-1:, 1:].size if leaf.ndim > 1 else 0,
        }
        trained += leaf.size - parts.get(kind, 0)
    return total, trained

"""A small train state with every kind of leaf, on any mesh, in checkpoints that can be damaged."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import checkpoint, checkpoint_read, sharding, train_step
from qdepth_jax import config as config_lib


def mesh_of(*sizes):
    devices = np.asarray(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


SPECS = {"params/img/w": P("fsdp", "tensor"), "params/b": P("tensor"), "state/codebook": P(None, "fsdp")}


def spec_of(path):
    for name, spec in SPECS.items():
        if path.endswith(name.partition("/")[2]):
            return spec
    return P()


def make_state(seed=0, width=16):
    """Every kind of leaf: split, replicated, f32, bf16, i32, scalars; the optimiser's state is nested tuples."""
    g = np.random.default_rng(seed)
    params = {"img": {"w": g.standard_normal((8, width), np.float32)}, "b": g.standard_normal(8, np.float32)}
    moments = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    state = train_step.TrainState(
        **{f: np.int32(seed + n) for n, f in enumerate(checkpoint_read.scalar_fields())},
        params=params,
        state={"codebook": g.standard_normal((4, 8), np.float32), "updates": np.int32(3)},
        opt_state=(({"mu": moments}, ()), {"count": np.int32(9)}),
        ema=jax.tree.map(lambda x: x * 2, params),
    )
    return state


def target_on(mesh, state):
    def shape(path, x):
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=NamedSharding(mesh, spec_of(sharding.path_of(path))))

    return jax.tree_util.tree_map_with_path(shape, state)


def on_devices(state, mesh):
    return jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), state, target_on(mesh, state))


def write(folder, steps, mesh=None, state=None):
    state = on_devices(state or make_state(), mesh or mesh_of(1, 1, 1))
    with checkpoint.open_manager(str(folder), config_lib.TrainConfig(keep_checkpoints=9)) as manager:
        for step in steps:
            checkpoint.save(manager, state.replace(step=state.step * 0 + step), {"step": step}, step)
    return state


def flip_in_array(folder, item, value):
    """Writes a checkpoint's item anew with one changed array: decodes without error, holds other numbers."""
    import tensorstore as ts

    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{folder / item}/", "path": value}}
    array = ts.open(spec, open=True).result()
    content = np.array(array.read().result())
    content.view(np.uint32).reshape(-1)[3] ^= 1  # the last bit of one number
    array.write(content).result()

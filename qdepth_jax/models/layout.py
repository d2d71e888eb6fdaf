"""Where activations lie on the mesh: the batch over (replica, fsdp), heads and mlp columns over tensor.

Weights are split over fsdp along their model width. Left alone, the compiler carries that split into the activations: it
then computes a slice of the width for the whole batch on every device and sums activations over all of them, at full
size many times the bytes of the weights. With the batch pinned it gathers the weights of one layer instead (in the
dtype of the activations) and scatters their gradients: ZeRO-3.
"""

import math

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

BATCH = ("replica", "fsdp")
TENSOR = "tensor"


def pin(x: Array, *rest: str | None) -> Array:
    """x with axis 0 (the batch, or the batch with others folded in as minor parts) over BATCH and `rest` as named.

    Without a mesh (`jax.set_mesh`), or with one of other axis names, x as it is. The same for sizes that do not divide,
    such as the one example that initialises a model or a single kv head: this is about speed, the values are the same.

    Args:
      x: any array with 1 + len(rest) axes or more; axes that are not named lie whole on each device.
      rest: for the axes after the first: TENSOR or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not {*BATCH, TENSOR} <= set(mesh.axis_names):
        return x
    if x.shape[0] % math.prod(mesh.shape[name] for name in BATCH):
        return x
    spec = [name if name and x.shape[axis] % mesh.shape[name] == 0 else None for axis, name in enumerate(rest, 1)]
    return jax.lax.with_sharding_constraint(x, P(BATCH, *spec))

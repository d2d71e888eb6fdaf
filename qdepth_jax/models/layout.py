"""Where activations and gathered weights lie on the mesh: the batch over (replica, fsdp), heads and mlp over tensor.

Weights are split over fsdp along their model width. Left alone, the compiler carries that split into the activations:
it computes a slice of the width for the whole batch on every device and sums activations over all of them, at full size
many times the bytes of the weights. So the batch is pinned, and each layer's weights are gathered where they are used,
in the dtype of the activations, their gradients scattered back: ZeRO-3. Gathering is asked for in so many words,
because products over a split width tempt the TPU compiler into loops that gather piece by piece and pass the result
through memory once for each piece.

Everything here is about speed: the values are the same but for rounding, and without a mesh (`jax.set_mesh`) nothing
happens. A gradient is summed over devices in the dtype in which its weight was gathered: bfloat16 in the full recipes.
"""

import functools
import math

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

BATCH = ("replica", "fsdp")
FSDP, TENSOR = "fsdp", "tensor"


def pin(x: Array, *rest: str | None) -> Array:
    """x with axis 0 (the batch, or the batch with others folded in as minor parts) over BATCH, the others as named.

    A batch that does not divide, such as the one example that initialises a model, is left to the compiler.

    Args:
      x: any array; axes that are not named lie whole on each device.
      rest: TENSOR or None for the axes after the first; a size that does not divide (one kv head) stays whole.
    """
    sizes = _mesh()
    if not sizes or x.shape[0] % math.prod(sizes[name] for name in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH, *_dividing(x.shape[1:], rest, sizes)))


def gather(weight: Array, *axes: str | None) -> Array:
    """A weight (already in the dtype of the activations) whole on every device but for its TENSOR axis.

    Args:
      weight: any array.
      axes: where its gradient goes, FSDP, TENSOR or None for each leading axis: its row in sharding.RULES. None at
        all leaves that to the compiler.
    """
    sizes = _mesh()
    if not sizes:
        return weight
    split = P(*_dividing(weight.shape, axes, sizes))
    return _gather(weight, P(*(name if name == TENSOR else None for name in split)), split if axes else None)


def gathered_dot(*axes: str | None):
    """`jax.lax.dot_general` with its right-hand side gathered: for Flax modules that own their kernel."""

    def dot_general(x: Array, weight: Array, *args, **kwargs) -> Array:
        return jax.lax.dot_general(x, gather(weight, *axes), *args, **kwargs)

    return dot_general


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: Array, whole: P, split: P | None) -> Array:
    return jax.lax.with_sharding_constraint(weight, whole)


def _forward(weight: Array, whole: P, split: P | None) -> tuple[Array, None]:
    return _gather(weight, whole, split), None


def _backward(whole: P, split: P | None, kept: None, g: Array) -> tuple[Array]:
    # The transpose of a constraint is the same constraint: the gradient would be summed whole on every device.
    return (g if split is None else jax.lax.with_sharding_constraint(g, split),)


_gather.defvjp(_forward, _backward)


def _mesh() -> dict[str, int]:
    """Axis -> size of the mesh in use; {} if there is none, or one with other axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if not mesh.empty and {*BATCH, TENSOR} <= set(mesh.axis_names) else {}


def _dividing(shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: dict[str, int]) -> list[str | None]:
    return [name if name and size % sizes[name] == 0 else None for size, name in zip(shape, axes)]

"""A stack of equal layers over stacked parameters: scanned or unrolled, with a named rematerialisation policy.

The one place that knows the arguments of `nn.scan` and `nn.remat`. Parameters have a leading layer axis in both modes,
so a checkpoint fits both. Scanning compiles several times faster and is the choice for full-size models; unrolling
skips the parts of the last layer that nobody reads and is the choice for small models on a CPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qdepth_jax import errors
from qdepth_jax.models import attention, int8

# What the backward pass may keep of a layer beside its inputs, which are always kept; the rest it computes again.
REMAT = {
    # Everything that it needs.
    "none": None,
    # Nothing.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Queries, keys, values and what attention returns: narrow arrays, no projection but the last is done twice.
    "attention": jax.checkpoint_policies.save_only_these_names(*attention.NAMES),
    # Results of the dense layers (products without a batch axis): attention, norms and activations are done twice.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_remat(name: str) -> None:
    """Raises UserError for an unknown policy name."""
    if name not in REMAT:
        raise errors.UserError(f"remat policy {name!r} is unknown: use one of {sorted(REMAT)}")


def run_layers(
    parent: nn.Module,
    layer: type[nn.Module],
    fields: dict[str, Any],
    carry: Any,
    per_layer: Any,
    shared: Any,
    *,
    name: str,
    depth: int,
    scan: bool,
    remat: str,
) -> tuple[Any, Any]:
    """Runs `depth` layers inside the compact method of `parent`.

    Args:
      layer: module class with a bool field `last` and `__call__(carry, per_layer, shared) -> (carry, out)`.
      fields: its other fields.
      carry: what flows from layer to layer.
      per_layer: pytree with a leading layer axis (or None), one slice for each layer.
      shared: pytree that every layer sees whole.
      name: key of the stacked parameters in the parent.
      scan: False unrolls; only then does the last layer know that it is the last.
      remat: a key of REMAT.

    Returns:
      The last carry, and the layers' outputs stacked on a leading axis (None where they return None).
    """
    if remat != "none":
        layer = nn.remat(layer, policy=REMAT[remat], prevent_cse=not scan)
    if scan or parent.is_initializing():
        if not parent.is_initializing() and int8.has_int8(parent.variables["params"][name]):
            # One layer at a time: nowhere is there more than one layer in full precision.
            layer = nn.map_variables(layer, "params", trans_in_fn=int8.dequantise)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=depth,
        )
        return scanned(**fields, last=False, name=name)(carry, per_layer, shared)

    # `split` is transposed to one concatenation; indexing would be transposed to `depth` padded full-size sums.
    params = _unstack(parent.variables["params"][name], depth)
    inputs = _unstack(per_layer, depth)
    outs = []
    for i in range(depth):
        module = layer(**fields, last=i == depth - 1, parent=None)
        carry, out = module.apply({"params": params[i]}, carry, inputs[i], shared)
        outs.append(out)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outs)


def _unstack(tree: Any, depth: int) -> list[Any]:
    """Pytree with a leading axis of size `depth` -> list of `depth` pytrees without it."""
    leaves, structure = jax.tree.flatten(tree)
    rows = [[x[0] for x in jax.lax.split(leaf, (1,) * depth)] for leaf in leaves]
    return [jax.tree.unflatten(structure, [row[i] for row in rows]) for i in range(depth)]

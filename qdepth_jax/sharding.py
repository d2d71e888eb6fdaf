"""The mesh and the one table of (path regex -> PartitionSpec) that places every leaf of a train state.

Mesh axes: `replica` (copies of the model), `fsdp` (parameters, gradients, moments and the batch split),
`tensor` (heads and mlp width split). First match wins, every leaf must match, a size that does not divide is an error:
nothing is replicated unless a row says so. Paths of optimiser moments, averaged parameters and gradients contain the
parameter's own path, so one row serves them all.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import config as config_lib
from qdepth_jax import errors

AXES = ("replica", "fsdp", "tensor")
BATCH = P(("replica", "fsdp"))


def make_mesh(config: config_lib.MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A (replica, fsdp, tensor) mesh over all devices, axes of type Auto.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.replica, config.fsdp, config.tensor]
    if sizes.count(-1) > 1:
        raise errors.UserError(f"mesh {dict(zip(AXES, sizes))}: at most one axis may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if known < 1 or len(devices) % known:
        raise errors.UserError(
            f"mesh {dict(zip(AXES, sizes))} does not fit {len(devices)} devices: {known} must divide {len(devices)}"
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise errors.UserError(
            f"mesh {dict(zip(AXES, sizes))} uses {math.prod(sizes)} of {len(devices)} devices: set one axis to -1"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def path_of(key_path: tuple) -> str:
    """ "opt_state/2/mu/img/head/kernel" from a JAX key path."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def spec_for(path: str, rules: tuple[tuple[str, P], ...]) -> P:
    """The spec of the first rule whose regex is found in `path`.

    Raises:
      UserError: no rule matches.
    """
    for pattern, spec in rules:
        if re.search(pattern, path):
            return spec
    raise errors.UserError(f"no sharding rule matches {path}: add a row for it to RULES in qdepth_jax/sharding.py")


def state_shardings(mesh: Mesh, abstract: Any, rules: tuple[tuple[str, P], ...] = ()) -> Any:
    """A NamedSharding for every leaf of `eval_shape(train state)`.

    Raises:
      UserError: naming each leaf without a rule and each dimension that its mesh axes do not divide, with the sizes
        that would.
    """
    rules, problems = rules or RULES, []

    def place(key_path, leaf):
        path = path_of(key_path)
        try:
            spec = spec_for(path, rules)
        except errors.UserError as e:
            problems.append(str(e))
            return NamedSharding(mesh, P())
        if leaf.ndim < len(spec):
            problems.append(f"{path} has shape {leaf.shape}, fewer dimensions than its rule {spec}")
            return NamedSharding(mesh, P())
        spec = P(*(None,) * (leaf.ndim - len(spec)), *spec) if spec else spec
        for dim, axes in enumerate(spec):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            ways = math.prod(mesh.shape[a] for a in axes)
            if leaf.shape[dim] % ways:
                fit = [n for n in range(1, ways + 1) if leaf.shape[dim] % n == 0]
                problems.append(
                    f"{path} {leaf.shape}: dimension {dim} of size {leaf.shape[dim]} does not divide by "
                    f"{'x'.join(axes)}={ways}; sizes that do: {fit[-4:]} (put the rest of the devices on `replica`)"
                )
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(place, abstract)
    if problems:
        raise errors.UserError("cannot shard this state on mesh " + f"{dict(mesh.shape)}:\n  " + "\n  ".join(problems))
    return shardings


def table(mesh: Mesh, abstract: Any, rules: tuple[tuple[str, P], ...] = ()) -> str:
    """Every leaf with shape, spec and MiB per device, and the total: the layout on a page."""
    shardings, lines, total = state_shardings(mesh, abstract, rules), [], 0
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    for (key_path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings)):
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total += size
        lines.append(f"{path_of(key_path):90s} {leaf.shape!s:24s} {sharding.spec!s:40s} {size / 2**20:10.3f}")
    return "\n".join([*lines, f"total MiB per device: {total / 2**20:.3f}"])


# The table. Specs name the LAST dimensions of a leaf (letters at the right); the layer axis of a stack is never split.
# D width, F mlp, N heads, K kv heads, H head dim, V vocabulary, A action or proprio dim.
RULES: tuple[tuple[str, P], ...] = (
    # SigLIP (models/siglip.py). 1152 = 128 * 9, so fsdp may grow to 128; further devices go to `replica`.
    (r"img/embedding/kernel$", P(None, None, None, "fsdp")),  # patch, patch, 3, D
    (r"img/pos_embedding$", P(None, None, "fsdp")),  # 1, P, D
    (r"img/.*/(query|key|value)/kernel$", P("fsdp", "tensor", None)),  # D, N, H
    (r"img/.*/out/kernel$", P("tensor", None, "fsdp")),  # N, H, D
    (r"img/.*/Dense_0/kernel$", P("fsdp", "tensor")),  # D, F
    (r"img/.*/Dense_1/kernel$", P("tensor", "fsdp")),  # F, D
    (r"img/head/kernel$", P("fsdp", "tensor")),  # D_vision, D
    # Gemma mixture, every expert (models/gemma.py). The kv head is one: it cannot be split over `tensor`.
    (r"llm/embedder/input_embedding$", P("tensor", "fsdp")),  # V, D
    (r"llm/.*/attn/q_einsum/w$", P("tensor", "fsdp", None)),  # N, D, H
    (r"llm/.*/attn/kv_einsum/w$", P(None, None, "fsdp", None)),  # 2, K, D, H
    (r"llm/.*/attn/attn_vec_einsum/w$", P("tensor", None, "fsdp")),  # N, H, D
    (r"llm/.*/mlp/gating_einsum$", P(None, "fsdp", "tensor")),  # 2, D, F
    (r"llm/.*/mlp/linear$", P("tensor", "fsdp")),  # F, D
    # Encoders and decoders around the mixture (models/policy.py).
    (r"(action_encoder/linear_1|proprio_encoder)/kernel$", P(None, "fsdp")),  # A, D
    (r"action_encoder/linear_[23]/kernel$", P("fsdp", None)),  # D or 2D, D
    (r"action_decoder/kernel$", P("fsdp", None)),  # D, A
    (r"depth_encoder/linear_[12]/kernel$", P("fsdp", None)),  # D, D
    (r"depth_decoder/conv_[12]/kernel$", P(None, None, "fsdp", None)),  # 3, 3, D, channels
    # Replicated on purpose: the tokenizer is a few MB and its 3x3 kernels are read whole by every device; norms,
    # biases, codebooks and counters are small.
    (r"(params|mu|nu|ema)/(encoder|decoder|codebook)", P()),
    (r"state/(codebook|count|sum|updates)$", P()),
    (r"(bias|scale)$", P()),
    (r"(^|/)(step|count|skipped|skipped_in_row)$", P()),
)

"""Parameters packed for a program that only infers, and unpacked inside of it without a copy.

Trained layers are stacked, one array for all of them. An unrolled network cuts its layers out of that, which copies
every weight once for a prediction and, in the loop over flow steps, the action expert's once for each step: on a CPU a
third of the time. So layers are stored apart, in the order of axes in which the matrix product reads them. `unpack`
writes the way back as jax.numpy inside the program; the compiler cancels it against the cutting and transposing of the
network, which need not know (tests/models/test_inference.py reads the compiled program).

Kernels are kept in the dtype of the activations, to which the network would round them at every use: the numbers are
the same and memory is half. With weights="int8" those that run once for a prediction are integers (int8.py): vision,
vlm and depth expert, three quarters of all. The action expert stays: it speaks the actions and runs at every flow
step.

Packed trees are for one device. A scanned network (config.scan) needs its layers stacked; they stay so.

Axis letters: N heads, K kv heads, H head dim, D width, F mlp width; each without the layer axis.
"""

import dataclasses
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct

from qdepth_jax import errors
from qdepth_jax.models import flow, int8

WEIGHTS = ("float", "int8")

STACKED = r"llm/layers/.*|img/Transformer/encoderblock/.*"
PAIRS = r".*/(gating_einsum|kv_einsum/w)"  # gate and up, keys and values: the network uses them one by one
ROUNDED = r".*/(kernel|w|gating_einsum|linear|input_embedding)"  # what the network casts before any use
INT8 = r"llm/layers/(vlm|depth)/.*|img/Transformer/encoderblock/.*"


@dataclasses.dataclass(frozen=True)
class Inference:
    """How a trained policy is run; chosen when it is loaded, never stored with it.

    Attributes:
      flow_steps: of the sampler; 0 = as the policy's config says.
      solver: of flow.SOLVERS. midpoint and heun run the action expert twice in a step.
      weights: of WEIGHTS.
      unroll: cut a scanned network into its layers: a faster program that takes several times as long to compile.
    """

    flow_steps: int = 0
    solver: str = "euler"
    weights: str = "float"
    unroll: bool = False

    def __post_init__(self):
        flow.check_solver(self.solver)
        if self.flow_steps < 0:
            raise errors.UserError(f"flow_steps={self.flow_steps} must be at least 1, or 0 for those of the policy")
        if self.weights not in WEIGHTS:
            raise errors.UserError(f"weights {self.weights!r} are unknown: use one of {WEIGHTS}")


def configured(config, options: Inference):
    """The PolicyConfig of a policy that is run with these options."""
    changes = {"scan": config.scan and not options.unroll}
    if options.flow_steps:
        changes["flow"] = dataclasses.replace(config.flow, steps=options.flow_steps)
    return dataclasses.replace(config, **changes)


class Kernel(NamedTuple):
    """Attributes:
    path: regex of the leaf.
    order: of a layer's axes as the product wants them; jnp.einsum sums over several axes in the order of their letters.
    summed: axes it sums over, in the order of training.
    """

    path: str
    order: tuple[int, ...]
    summed: tuple[int, ...]


KERNELS = (
    Kernel(r"llm/.*/(q_einsum|kv_einsum)/w", (1, 0, 2), (1,)),  # [N, D, H] -> [D, N, H]
    Kernel(r"llm/.*/attn_vec_einsum/w", (1, 0, 2), (0, 1)),  # [N, H, D] -> [H, N, D]
    Kernel(r"llm/.*/mlp/(gating_einsum|linear)", (0, 1), (0,)),
    Kernel(r"llm/.*/Dense_0/kernel", (0, 1), (0,)),
    Kernel(r"img/.*/(query|key|value)/kernel", (0, 1, 2), (0,)),  # [D, N, H]
    Kernel(r"img/.*/out/kernel", (0, 1, 2), (0, 1)),  # [N, H, D]
    Kernel(r"img/.*/Dense_[01]/kernel", (0, 1), (0,)),
)


@struct.dataclass
class Layers:
    """A stacked leaf in parts: one for each layer, or a pair. order: of a part's axes, see Kernel."""

    parts: tuple
    order: tuple[int, ...] = struct.field(pytree_node=False)


def pack(config, params, weights: str = "float", donate: bool = False):
    """Trained parameters -> packed ones on this process's first device.

    Args:
      config: PolicyConfig.
      params: tree of arrays, float32 or bfloat16.
      weights: of WEIGHTS.
      donate: free each array once it is packed.

    Raises:
      UserError: unknown weights.
    """
    if weights not in WEIGHTS:
        raise errors.UserError(f"weights {weights!r} are unknown: use one of {WEIGHTS}")
    device = jax.local_devices()[0]

    def packed(key_path, leaf):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        value = _leaf(config, path, np.asarray(jax.device_get(leaf)), weights)
        value = jax.device_put(value, device)
        if donate and isinstance(leaf, jax.Array):
            jax.block_until_ready(value)
            leaf.delete()
        return value

    return jax.tree_util.tree_map_with_path(packed, params)


def _leaf(config, path: str, leaf: np.ndarray, weights: str):
    kernel = next((row for row in KERNELS if re.fullmatch(row.path, path)), None)
    small = weights == "int8" and kernel is not None and bool(re.fullmatch(INT8, path))
    if config.dtype == "bfloat16" and not small and re.fullmatch(ROUNDED, path):
        leaf = leaf.astype(ml_dtypes.bfloat16)
    if not re.fullmatch(STACKED, path):
        return leaf
    pairs = bool(re.fullmatch(PAIRS, path))
    if config.scan:
        stacked = 1 + pairs
        return int8.quantise(leaf, tuple(stacked + axis for axis in kernel.summed)) if small else leaf
    order = kernel.order if kernel else tuple(range(leaf.ndim - 1))

    def part(x: np.ndarray):
        x = np.ascontiguousarray(x.transpose(order))
        return int8.quantise(x, tuple(order.index(axis) for axis in kernel.summed)) if small else x

    return Layers(tuple(tuple(map(part, layer)) if pairs else part(layer) for layer in leaf), order)


def apart(config, cache):
    """The cache of a prefill in parts, as layers are packed: cut before the loop over flow steps instead of in it."""
    if config.scan:
        return cache
    return jax.tree.map(lambda x: Layers(tuple(x), tuple(range(x.ndim - 1))), cache)


def unpack(params):
    """Packed parameters as the network takes them, inside a program; a tree that is not packed comes back as it is."""
    return jax.tree.map(lambda x: _whole(x, jnp), params, is_leaf=is_layers)


def on_host(leaf) -> np.ndarray:
    """One leaf (of a flattening with is_leaf=is_layers) as it was trained, but for what packing rounded."""
    return np.asarray(_whole(jax.tree.map(np.asarray, leaf), np))


def is_layers(x) -> bool:
    return isinstance(x, Layers)


def _whole(x, maths):
    """A leaf with its layers stacked; maths is jax.numpy in a program and NumPy outside."""
    if not isinstance(x, Layers):
        return x
    back = tuple(np.argsort(x.order))

    def part(p):
        return int8.dequantise(p).transpose(back)

    return maths.stack([maths.stack(list(map(part, p))) if isinstance(p, tuple) else part(p) for p in x.parts])


def size_in_bytes(tree) -> int:
    """Of all arrays of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

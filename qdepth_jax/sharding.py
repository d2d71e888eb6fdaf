"""The mesh and the one table of (path regex -> PartitionSpec) that places every leaf of a train state.

Mesh axes: `replica` (copies of the model), `fsdp` (parameters, gradients, moments and the batch split),
`tensor` (heads and mlp width split). First match wins, every leaf must match, a size that does not divide is an error:
nothing is replicated unless a row says so. Paths of optimiser moments, averaged parameters and gradients contain the
parameter's own path, so one row serves them all.

Several slices: chips of one slice are joined by a fast torus (ICI), slices by the data-centre network (DCN). Only
`replica` crosses slices: all that it moves is one sum of the (fsdp-split) gradients for every micro-batch.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import config as config_lib
from qdepth_jax import errors

AXES = ("replica", "fsdp", "tensor")
BATCH = P(("replica", "fsdp"))
SHOWN = 3  # layouts that a message proposes
# What a message proposes before it has seen the leaves: splits of the full model's narrowest dimensions (RULES), which
# are SigLIP's 1152 = 128 * 9 and the 8 heads of the mixture.
WIDEST = {"fsdp": 128, "tensor": 8}

Rules = tuple[tuple[str, P], ...]


# ---- the mesh ----


def make_mesh(config: config_lib.MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A (replica, fsdp, tensor) mesh over all devices, axes of type Auto.

    Inside a slice, TPU devices are ordered so that neighbours on an axis are neighbours in the torus; other devices
    keep their order. `devices` may be those of a topology that is not there (jax.experimental.topologies).

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the slices do not divide `replica`.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = split_slices(config, devices)
    sizes = tuple(mesh_sizes(config, len(devices), len(slices)).values())
    inner = (sizes[0] // len(slices), *sizes[1:])
    array = np.concatenate([_arrange(members, inner) for members in slices])
    # Always said: jax.make_mesh would make these axes Explicit, the Mesh constructor Auto.
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: config_lib.MeshConfig, devices: int, slices: int = 1) -> dict[str, int]:
    """Axis -> size on so many devices in so many equal slices, -1 resolved.

    Raises:
      UserError: as `make_mesh`.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    asked = f"mesh {sizes}"
    if list(sizes.values()).count(-1) > 1:
        raise errors.UserError(f"{asked}: at most one axis may be -1")
    if wrong := {axis: size for axis, size in sizes.items() if size < -1 or size == 0}:
        raise errors.UserError(f"{asked}: sizes are 1 or more, or -1 for what is left over, and not {wrong}")
    if devices % slices:
        raise errors.UserError(f"{devices} devices are not {slices} slices of equal size")
    known = math.prod(s for s in sizes.values() if s != -1)
    among = [found for found in layouts(devices, slices) if all(most % found[a] == 0 for a, most in WIDEST.items())]
    if devices % known:
        near = nearest({axis: max(size, 1) for axis, size in sizes.items()}, among)
        raise errors.UserError(
            f"{asked} does not fit {devices} devices: {known} must divide {devices}; layouts that work: {_show(near)}"
        )
    sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    near = nearest(sizes, among)
    if math.prod(sizes.values()) != devices:
        raise errors.UserError(
            f"{asked} uses {math.prod(sizes.values())} of {devices} devices: set one axis to -1, or use a layout that "
            f"works: {_show(near)}"
        )
    if sizes["replica"] % slices:
        raise errors.UserError(
            f"{asked} on {slices} slices of {devices // slices} devices: only `replica` may cross slices, so {slices} "
            f"must divide it, and it is {sizes['replica']}; layouts that work: {_show(near)}"
        )
    return sizes


def split_slices(config: config_lib.MeshConfig, devices: list[jax.Device]) -> list[list[jax.Device]]:
    """The devices of every slice, slices in order of their index.

    TPU devices know their slice. GPUs do not say how their nodes are joined, so they are one slice unless
    `config.slices` cuts them (in the given order) into islands.

    Raises:
      UserError: slices of unequal size, or another number of them than `config.slices` says.
    """
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        # A single slice has no index; on GPUs it numbers nodes, and the fabric between nodes may be fast.
        index = getattr(device, "slice_index", None) if device.platform == "tpu" else None
        found.setdefault(index or 0, []).append(device)
    if config.slices < 0:
        raise errors.UserError(f"mesh.slices={config.slices} must be 0 (what the devices say) or a number of slices")
    if len(found) == 1 and config.slices > 1:
        if len(devices) % config.slices:
            raise errors.UserError(f"mesh.slices={config.slices} does not divide {len(devices)} devices")
        size = len(devices) // config.slices
        return [devices[start : start + size] for start in range(0, len(devices), size)]
    if config.slices not in (0, len(found)):
        raise errors.UserError(
            f"mesh.slices={config.slices}, but the devices are in {len(found)} slices: leave it at 0"
        )
    if len({len(members) for members in found.values()}) > 1:
        raise errors.UserError(f"slices of unequal size: { {k: len(v) for k, v in sorted(found.items())} } devices")
    return [found[index] for index in sorted(found)]


def _arrange(devices: list[jax.Device], sizes: tuple[int, ...]) -> np.ndarray:
    """One slice as an array of `sizes`."""
    if devices[0].platform != "tpu" or len(devices) == 1:
        out = np.empty(len(devices), object)
        out[:] = devices
        return out.reshape(sizes)
    try:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise errors.UserError(
            f"mesh {dict(zip(AXES, sizes))} cannot be laid on the torus of {len(devices)} {devices[0].device_kind} "
            f"chips: {error}"
        ) from error


def layouts(devices: int, slices: int = 1) -> list[dict[str, int]]:
    """Every (replica, fsdp, tensor) of so many devices of which `slices` divides `replica`."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return [
        dict(zip(AXES, (devices // (f * t), f, t)))
        for f in divisors
        for t in divisors
        if devices % (f * t) == 0 and devices // (f * t) % slices == 0
    ]


def nearest(asked: Mapping[str, int], among: list[dict[str, int]]) -> list[dict[str, int]]:
    """The few layouts that differ least from `asked`, in doublings of each axis; fewer replicas first among equals."""
    return sorted(among, key=lambda sizes: (sum(abs(math.log2(sizes[a] / asked[a])) for a in AXES), sizes["tensor"]))[
        :SHOWN
    ]


def _show(found: list[dict[str, int]]) -> str:
    return "; ".join(" ".join(f"{axis}={size}" for axis, size in sizes.items()) for sizes in found) or "none"


# ---- the rows of a batch ----


def check_batch(train: config_lib.TrainConfig, sizes: Mapping[str, int]) -> None:
    """Raises UserError, with the next size that works, unless every device gets whole examples of each micro-batch."""
    ways = train.micro_batches * sizes["replica"] * sizes["fsdp"]
    if train.batch_size % ways:
        raise errors.UserError(
            f"train.batch_size={train.batch_size} must be a multiple of micro_batches x replica x fsdp = "
            f"{train.micro_batches} x {sizes['replica']} x {sizes['fsdp']}: use {-(-train.batch_size // ways) * ways}, "
            "other micro-batches or another mesh"
        )


def batch_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
    """Rows i64 [n] of a global batch that a process reads, ascending: what its devices hold under BATCH.

    In this order `jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), data, (batch_size, ...))` takes
    them. Processes whose devices differ in `tensor` alone read the same rows.

    Args:
      mesh: over all processes.
      batch_size: global; a multiple of replica x fsdp.
      process: default this one.

    Raises:
      UserError: the batch does not divide, or the process has no device in the mesh.
    """
    ways = mesh.shape["replica"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise errors.UserError(
            f"batch size {batch_size} does not divide over replica x fsdp = {mesh.shape['replica']} x "
            f"{mesh.shape['fsdp']}: use {-(-batch_size // ways) * ways}"
        )
    process = jax.process_index() if process is None else process
    placed = NamedSharding(mesh, BATCH).devices_indices_map((batch_size,))
    mine = {index[0].indices(batch_size)[:2] for device, index in placed.items() if device.process_index == process}
    if not mine:
        raise errors.UserError(f"process {process} has no device in the mesh {dict(mesh.shape)}")
    return np.concatenate([np.arange(*span) for span in sorted(mine)])


# ---- the table, applied ----


class Row(NamedTuple):
    """One leaf and its place: `bytes` on each device, `whole` of the leaf, `pattern` the regex that decided."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: P
    bytes: int
    whole: int
    pattern: str


def path_of(key_path: tuple) -> str:
    """ "opt_state/2/mu/img/head/kernel" from a JAX key path."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def part_of(path: str) -> tuple[str, str]:
    """(part, rest of the path) of a leaf of a train state: "params", "moments", "ema", "state" or "counters"."""
    if found := re.match(r"(params|ema|state)/(.*)", path):
        return found[1], found[2]
    if found := re.match(r"opt_state/.*?/(mu|nu)/(.*)", path):
        return "moments", found[2]
    return "counters", path


def rule_for(path: str, rules: Rules) -> tuple[str, P]:
    """The first row whose regex is found in `path`.

    Raises:
      UserError: no rule matches.
    """
    for pattern, spec in rules:
        if re.search(pattern, path):
            return pattern, spec
    raise errors.UserError(f"no sharding rule matches {path}: add a row for it to RULES in qdepth_jax/sharding.py")


def place(sizes: Mapping[str, int], abstract: Any, rules: Rules = (), slices: int = 1) -> list[Row]:
    """Where every leaf of `eval_shape(train state)` goes on a mesh of these sizes, in tree order; needs no device.

    Raises:
      UserError: naming each leaf without a rule and each dimension that its mesh axes do not divide, with the nearest
        layouts of as many devices in which every leaf divides.
    """
    rules, problems, rows, uneven = rules or RULES, [], [], set()
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        path = path_of(key_path)
        try:
            pattern, spec = rule_for(path, rules)
        except errors.UserError as error:
            problems.append(str(error))
            continue
        if leaf.ndim < len(spec):
            problems.append(f"{path} has shape {leaf.shape}, fewer dimensions than its rule {spec}")
            continue
        spec = P(*(None,) * (leaf.ndim - len(spec)), *spec) if len(spec) else spec
        shard = list(leaf.shape)
        for dim, axes in _split(spec):
            ways = math.prod(sizes[axis] for axis in axes)
            # Moments and averages fail where their parameter does: that is said once.
            if leaf.shape[dim] % ways and (fault := (part_of(path)[1], dim)) not in uneven:
                uneven.add(fault)
                problems.append(
                    f"{path} {leaf.shape}: dimension {dim} of size {leaf.shape[dim]} does not divide by "
                    f"{'x'.join(axes)}={ways}"
                )
            shard[dim] //= ways
        size = math.prod(shard) * leaf.dtype.itemsize
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize
        rows.append(Row(path, tuple(leaf.shape), np.dtype(leaf.dtype), spec, size, whole, pattern))
    if problems:
        message = [f"cannot shard this state on mesh {dict(sizes)}:", *problems]
        if uneven:
            message.append(f"nearest layouts that work: {_show(nearest(sizes, _layouts_of(rows, sizes, slices)))}")
        raise errors.UserError("\n  ".join(message))
    return rows


def state_shardings(mesh: Mesh, abstract: Any, rules: Rules = (), slices: int = 0) -> Any:
    """A NamedSharding for every leaf of `eval_shape(train state)`, or of any tree whose paths contain parameter paths.

    `slices` (config.mesh.slices; 0 = what TPU devices say) only bounds the layouts that an error proposes.

    Raises:
      UserError: as `place`.
    """
    found = {getattr(d, "slice_index", None) for d in mesh.devices.flat if d.platform == "tpu"}
    rows = place(mesh.shape, abstract, rules, slices or max(1, len(found)))
    return jax.tree.unflatten(jax.tree.structure(abstract), [NamedSharding(mesh, row.spec) for row in rows])


def _split(spec: P) -> list[tuple[int, tuple[str, ...]]]:
    """(dimension, mesh axes) of every split dimension."""
    return [(dim, (axes,) if isinstance(axes, str) else tuple(axes)) for dim, axes in enumerate(spec) if axes]


def _layouts_of(rows: list[Row], sizes: Mapping[str, int], slices: int) -> list[dict[str, int]]:
    """Layouts of as many devices in which every one of these leaves divides."""
    cuts = {(row.shape[dim], axes) for row in rows for dim, axes in _split(row.spec)}
    return [
        found
        for found in layouts(math.prod(sizes.values()), slices)
        if all(size % math.prod(found[axis] for axis in axes) == 0 for size, axes in cuts)
    ]


# The table. Specs name the LAST dimensions of a leaf (letters at the right); the layer axis of a stack is never split.
# D width, F mlp, N heads, K kv heads, H head dim, V vocabulary, A action or proprio dim.
RULES: Rules = (
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
    (r"llm/.*norm\w*/Dense_0/kernel$", P("fsdp", None)),  # D, 3D: adaptive norms
    # Encoders and decoders around the mixture (models/policy.py).
    (r"(action_encoder/linear_1|proprio_encoder)/kernel$", P(None, "fsdp")),  # A, D
    (r"(action_encoder/linear_[23]|time_encoder/linear_[12])/kernel$", P("fsdp", None)),  # D or 2D, D
    (r"action_decoder/kernel$", P("fsdp", None)),  # D, A
    (r"depth_encoder/linear_[12]/kernel$", P("fsdp", None)),  # D, D
    (r"depth_decoder/conv_[12]/kernel$", P(None, None, "fsdp", None)),  # 3, 3, D, channels
    # Replicated on purpose: the tokenizer is a few MB and its 3x3 kernels are read whole by every device; norms,
    # biases, codebooks and counters are small.
    (r"(^|/)(encoder|decoder)/", P()),
    (r"(^|/)codebook$", P()),
    (r"state/(count|sum|updates)$", P()),
    (r"(bias|scale)$", P()),
    (r"(^|/)(step|count|skipped|skipped_in_row)$", P()),
)

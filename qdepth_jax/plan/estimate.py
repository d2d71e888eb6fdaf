"""Memory, collectives and memory traffic of a step without compiling it: for GPUs, for a search, for want of libtpu.

The step is ZeRO-3 as models/layout.py lays it out. Its collectives follow from the shapes. Activations are counted by
what each layer keeps and by the largest layer while it runs; the factors were set by compiled programs (docs/plans).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from qdepth_jax import optim, sharding
from qdepth_jax.models import policy_config
from qdepth_jax.plan import collectives, program, state

# Arrays of the size of one layer's hidden activations (attention's logits) that live at once in its backward pass.
HIDDEN_COPIES, LOGIT_COPIES = 4.0, 2.5
# Times that one layer's activations pass through HBM in a step, both ways, without recomputation.
PASSES = 14.0


class Memory(NamedTuple):
    """Bytes on one chip: the state, summed gradients, activations kept between layers, the largest layer at work."""

    state: float
    gradients: float
    kept: float
    working: float

    @property
    def total(self) -> float:
        return sum(self)


def memory(plan: program.Plan, sizes: Mapping[str, int], slices: int = 1) -> Memory:
    """Estimated peak of one chip. A tokenizer's convolutions are not estimated: its kept and working bytes are 0.

    Raises:
      UserError: a leaf that does not divide.
    """
    on_chip = state.of(sizes, plan.state, slices)
    # f32 sums, and parameters once more in the dtype of the activations (the compiler casts them before the loop).
    parameters = on_chip.purposes["parameters"]
    gradients = parameters * (1 + _itemsize(plan) / 4)
    kept, working = _activations(plan, sizes)
    return Memory(on_chip.total, gradients, kept, working)


def _itemsize(plan: program.Plan) -> int:
    return 2 if getattr(plan.model, "dtype", "float32") == "bfloat16" else 4


def _rows(plan: program.Plan, sizes: Mapping[str, int]) -> float:
    """Examples that one chip works on at a time."""
    return plan.train.batch_size / (plan.train.micro_batches * sizes["replica"] * sizes["fsdp"])


def _activations(plan: program.Plan, sizes: Mapping[str, int]) -> tuple[float, float]:
    config = plan.model
    if not isinstance(config, policy_config.PolicyConfig):
        return 0.0, 0.0
    rows, item, tensor, groups = _rows(plan, sizes), _itemsize(plan), sizes["tensor"], config.sizes
    experts = {
        "vlm": (config.vlm, groups["image"] + groups["text"]),
        "action": (config.action, groups["proprio"] + groups["action"]),
    }
    if config.depth is not None:
        experts["depth"] = (config.depth.expert, groups["depth"])
    tokens = sum(t for _, t in experts.values())
    width = sum(t * e.width for e, t in experts.values())
    hidden = sum(t * e.mlp for e, t in experts.values()) / tensor
    logits = config.heads * tokens**2 / tensor
    tower, patches = config.siglip, config.siglip.tokens * config.pictures
    kept = config.layers * width * item + tower.depth * patches * tower.width * item
    heads = config.heads * config.head_dim / tensor
    if config.remat == "attention":
        kept += config.layers * item * tokens * (2 * heads + 2 * config.kv_heads * config.head_dim)
        kept += tower.depth * patches * item * 4 * tower.width / tensor
    if config.remat == "dots":
        kept += (
            config.layers * item * (tokens * (heads + 2 * config.kv_heads * config.head_dim) + 2 * width + 2 * hidden)
        )
        kept += tower.depth * patches * item * (5 * tower.width + tower.mlp / tensor)
    if config.remat == "none":
        kept += config.layers * (item * (tokens * 3 * heads + 4 * width + 4 * hidden) + 6 * logits)
        kept += tower.depth * patches * item * (8 * tower.width + 3 * tower.mlp / tensor)
        kept += tower.depth * 6 * tower.heads / tensor * patches * tower.tokens
    mixture = HIDDEN_COPIES * hidden * item + LOGIT_COPIES * logits * 4
    vision = HIDDEN_COPIES * patches * tower.mlp / tensor * item
    vision += LOGIT_COPIES * tower.heads / tensor * patches * tower.tokens * 4
    # One layer's weights gathered, twice: the next layer's arrive while this one computes; and its gradients.
    weights = 3 * _layer_weights(plan) / tensor
    return rows * kept, rows * max(mixture, vision) + weights


def _layer_weights(plan: program.Plan) -> float:
    c = plan.model
    experts = [expert for _, expert in c.mixture.experts]
    per = sum(e.width * (2 * c.heads * c.head_dim + 2 * c.kv_heads * c.head_dim + 3 * e.mlp) for e in experts)
    return per * _itemsize(plan)


def network(plan: program.Plan, sizes: Mapping[str, int], slices: int = 1) -> list[collectives.Collective]:
    """The collectives of ZeRO-3: weights gathered for the forward and for the backward pass of every micro-batch, their
    gradients scattered; gradients summed over replicas; activations summed over tensor. Norms and the like are left
    out."""
    out, micro, item = [], plan.train.micro_batches, _itemsize(plan)
    shape = dict(sizes)
    gathers = 1 if plan.remat == "none" else 2
    for row in sharding.place(sizes, plan.state, slices=slices):
        if not row.path.startswith("params/"):
            continue
        path = row.path.removeprefix("params/")
        axes = [axis for part in row.spec if part for axis in ((part,) if isinstance(part, str) else part)]
        frozen = optim.frozen_kind(path, plan.frozen) == "all"
        if "embedding" in path and "img" not in path:
            continue  # rows are looked up where they lie
        share = row.bytes / 4 * item
        if "fsdp" in axes and sizes["fsdp"] > 1:
            group = _group(shape, "fsdp")
            payload = share * sizes["fsdp"]
            out.append(_collective("all-gather", item, payload, gathers * micro, group, "fsdp", path))
            if not frozen:
                out.append(_collective("reduce-scatter", item, payload, micro, group, "fsdp", path))
        if sizes["replica"] > 1 and not frozen:
            group = _group(shape, "replica")
            out.append(_collective("all-reduce", item, share, micro, group, "replica", path))
    if sizes["tensor"] > 1 and isinstance(plan.model, policy_config.PolicyConfig):
        out += _tensor(plan, sizes, shape)
    return out


def _tensor(plan, sizes, shape) -> list[collectives.Collective]:
    """Per layer: two sums forward, two backward, and with recomputation the first of the forward ones again."""
    c, item = plan.model, _itemsize(plan)
    groups, runs = c.sizes, (5 if plan.remat == "full" else 4) * plan.train.micro_batches
    width = (groups["image"] + groups["text"]) * c.vlm.width + (groups["proprio"] + groups["action"]) * c.action.width
    if c.depth is not None:
        width += groups["depth"] * c.depth.expert.width
    rows, group = _rows(plan, sizes), _group(shape, "tensor")
    vision = c.siglip.tokens * c.pictures * c.siglip.width
    return [
        _collective("all-reduce", item, rows * width * item, c.layers * runs, group, "tensor", "mixture"),
        _collective("all-reduce", item, rows * vision * item, c.siglip.depth * runs, group, "tensor", "SigLIP"),
    ]


def _collective(kind, item, payload, count, group, axes, where) -> collectives.Collective:
    return collectives.Collective(kind, "bf16" if item == 2 else "f32", payload, count, group, axes, where)


def _group(shape: Mapping[str, int], axis: str) -> tuple[int, ...]:
    """Mesh positions of the first group along an axis."""
    ids = np.arange(int(np.prod(list(shape.values())))).reshape(list(shape.values()))
    return tuple(ids[tuple(slice(None) if name == axis else 0 for name in shape)].tolist())


def hbm_bytes(plan: program.Plan, sizes: Mapping[str, int], slices: int = 1) -> float:
    """Bytes that a step moves through one chip's HBM: state and sums once both ways, weights as gathered and used,
    activations PASSES times (half as often again where a layer is computed twice)."""
    on_chip = state.of(sizes, plan.state, slices)
    micro, found = plan.train.micro_batches, network(plan, sizes, slices)
    weights = sum(3 * c.count * c.payload for c in found if c.kind in ("all-gather", "reduce-scatter"))
    config, item = plan.model, _itemsize(plan)
    if not isinstance(config, policy_config.PolicyConfig):
        return 2 * on_chip.total + weights
    tokens = plan.tokens
    experts = [config.vlm, config.action] + ([config.depth.expert] if config.depth else [])
    hidden = tokens * max(e.mlp for e in experts) * (1 if config.depth is None else 0.62)
    layer = (
        item * (hidden + 6 * tokens * config.vlm.width) / sizes["tensor"]
        + 4 * config.heads * tokens**2 / sizes["tensor"]
    )
    vision = item * config.siglip.tokens * config.pictures * (config.siglip.mlp + 8 * config.siglip.width)
    again = 1.5 if plan.remat == "full" else 1.0
    passes = PASSES * again * micro * _rows(plan, sizes)
    return (
        2 * on_chip.total
        + 3 * on_chip.purposes["parameters"] * micro
        + weights
        + passes * (config.layers * layer + config.siglip.depth * vision)
    )

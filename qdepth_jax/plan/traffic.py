"""Bytes that a compiled step moves between a chip's HBM and the chip, loops counted.

Every operation reads its inputs and writes its results once, fused ones as one. A slice of a large array (one layer of
stacked weights) counts as the slice; an update in place as the update. Arrays that the TPU compiler put into on-chip
memory count nothing, only the copies that bring them there. A collective writes its payload.
"""

import math
from collections.abc import Sequence

from qdepth_jax.plan import collectives, hlo

# Operations that move nothing themselves. The fusions that a collective overlaps with hand its arrays through.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "domain", "add-dependency", "async-update",
}  # fmt: skip
_SLICES = ("dynamic-slice", "gather", "slice")
_VIEWS = ("bitcast", "reshape")


def hbm_bytes(module: hlo.Module, found: Sequence[collectives.Collective]) -> float:
    """Bytes of one call of the program on one chip; `found` are its collectives."""
    counts, _ = hlo.run_counts(module)
    inside = {
        name
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode in ("fusion", "async-start")
        for name in hlo.called(instruction)
    }
    total = sum(item.count * item.payload for item in found)
    for name, times in counts.items():
        if name not in inside:
            computation = module.computations[name]
            total += times * sum(_moved(module, computation, instruction) for instruction in computation.values())
    return total


def _moved(module: hlo.Module, computation: dict[str, hlo.Instruction], instruction: hlo.Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or collectives.kind_of(opcode):
        return 0.0
    if opcode == "async-start":  # weights of a layer, cut out of the stack on their way to on-chip memory
        root = next((i for i in _body(module, instruction).values() if i.root), None)
        if root is None or root.opcode not in _SLICES:
            return 0.0
        source = computation.get(instruction.operands[0])
        return root.bytes * bool(source is not None and _in_hbm(source)) + _in_hbm(root)
    if opcode.endswith("-start"):  # (source, destination, ...) of a copy; slices hold their source in brackets
        source, destination = instruction.shape[0], instruction.shape[1]
        return destination.bytes * (source.in_hbm + destination.in_hbm)
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode in _SLICES:
        return _in_hbm(instruction) + instruction.bytes * bool(operands and _in_hbm(operands[0]))
    if opcode == "dynamic-update-slice" and len(operands) > 1:
        return 2 * operands[1].bytes * bool(_in_hbm(operands[0]))
    if opcode != "fusion":
        return _in_hbm(instruction) + sum(_in_hbm(operand) for operand in operands)
    body = _body(module, instruction)
    numbered = _parameters(body)
    if len(numbered) != len(operands):
        return _in_hbm(instruction) + sum(_in_hbm(operand) for operand in operands)
    read = sum(
        min(_in_hbm(operand), _read(module, body, parameter))
        for parameter, operand in zip(numbered, operands)
        if _in_hbm(operand)
    )
    return read + _written(instruction, body)


def _body(module: hlo.Module, fusion: hlo.Instruction) -> dict[str, hlo.Instruction]:
    return next((module.computations.get(name, {}) for name in hlo.called(fusion)), {})


def _parameters(body: dict[str, hlo.Instruction]) -> list[hlo.Instruction]:
    return sorted((i for i in body.values() if i.opcode == "parameter"), key=lambda i: int(i.attributes))


def _in_hbm(instruction: hlo.Instruction) -> float:
    return sum(array.bytes for array in instruction.shape if array.in_hbm)


def _read(module: hlo.Module, body: dict[str, hlo.Instruction], source: hlo.Instruction) -> float:
    """Bytes of `source` that the rest of a fusion's body reads; infinite for all of it."""
    total = 0.0
    for user in body.values():
        if source.name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == source.name:
            total += user.bytes
        elif user.opcode in _VIEWS:
            total += _read(module, body, user)
        elif user.opcode == "fusion":
            inner = _body(module, user)
            numbered = _parameters(inner)
            for at, name in enumerate(user.operands):
                if name == source.name:
                    total += _read(module, inner, numbered[at]) if at < len(numbered) else math.inf
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            continue
        elif user.opcode not in ("tuple", "custom-call") and not collectives.kind_of(user.opcode):
            return math.inf
    return total


def _written(fusion: hlo.Instruction, body: dict[str, hlo.Instruction]) -> float:
    """Results of a fusion; one that updates a part of an array in place writes the part."""
    root = next((i for i in body.values() if i.root), None)
    if root is None:
        return _in_hbm(fusion)
    parts = [body.get(name, root) for name in root.operands] if root.opcode == "tuple" else [root]
    if root.opcode == "custom-call" or len(parts) != len(fusion.shape):
        return 0.0 if root.opcode == "custom-call" else _in_hbm(fusion)
    total = 0.0
    for part, array in zip(parts, fusion.shape):
        while part.opcode in _VIEWS and part.operands and part.operands[0] in body:
            part = body[part.operands[0]]
        if not array.in_hbm or part.opcode in ("parameter", "custom-call") or collectives.kind_of(part.opcode):
            continue
        update = body.get(part.operands[1]) if part.opcode == "dynamic-update-slice" else None
        total += min(update.bytes, array.bytes) if update else array.bytes
    return total

"""Reads the text of a compiled XLA program: its computations, and how often each runs in one call.

XLA's own cost analysis sees the body of a loop once. A scanned stack and a scan over micro-batches are loops, so every
figure about them needs the trip counts. They stand in the text: as `known_trip_count`, or as the constant with which
the loop's condition compares its counter.
"""

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations)=\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)\}?")
_BRANCHES = re.compile(r"\b(?:branch_computations|true_computation|false_computation)=\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)")


class Array(NamedTuple):
    """One array of a shape: dtype as XLA names it, dimensions, and whether it lies in HBM (not in on-chip memory)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits.group()) if digits else 8)
        if self.dtype in ("c64", "c128"):
            bits = int(self.dtype[1:])
        return math.prod(self.dims) * bits / 8


class Instruction(NamedTuple):
    """`%name = shape opcode(operands), attributes`; of a constant or parameter they are its value or number."""

    name: str
    shape: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.shape)


class Module(NamedTuple):
    """computation name -> instructions by name, in order; the entry's name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`.

    Raises:
      ValueError: no entry computation: this is no HLO text.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif match := _LINE.match(line):
            instruction = _instruction(line[match.end() :], match.group(2), bool(match.group(1)))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this text has no ENTRY computation: it is no compiled HLO module")
    return Module(computations, entry)


def _instruction(rest: str, name: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    open_at = rest.index("(")
    close = _closing(rest, open_at)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[open_at:close]))
    opcode = rest[:open_at]
    attributes = rest[open_at + 1 : close] if opcode in ("constant", "parameter") else rest[close + 1 :]
    return Instruction(name, arrays(shape), opcode, operands, attributes, root)


def _closing(text: str, start: int) -> int:
    level = 0
    for at in range(start, len(text)):
        level += (text[at] == "(") - (text[at] == ")")
        if level == 0:
            return at
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def arrays(shape: str) -> tuple[Array, ...]:
    """All arrays of a shape's text, those of a tuple in order."""
    found = _ARRAY.findall(shape)
    return tuple(Array(t, tuple(int(n) for n in d.split(",") if n), "S(" not in layout) for t, d, layout in found)


def called(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction runs (a reduction's operator is none of them)."""
    if instruction.opcode not in ("while", "fusion", "call", "conditional", "async-start", "custom-call"):
        return []
    names = []
    for pattern in (_CALLED, _BRANCHES):
        for group in pattern.findall(instruction.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
    return names


def run_counts(module: Module) -> tuple[dict[str, int], list[str]]:
    """(computation -> how often it runs in one call of the program, loops without a known trip count: counted once)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name not in module.computations:
            return
        seen.add(name)
        for instruction in module.computations[name].values():
            for callee in called(instruction):
                visit(callee)
        order.append(name)

    visit(module.entry)
    counts, unknown = dict.fromkeys(order, 0), []
    counts[module.entry] = 1
    for name in reversed(order):  # callers before callees
        for instruction in module.computations[name].values():
            times = counts[name]
            if instruction.opcode == "while":
                trips = trip_count(module, instruction)
                if trips is None:
                    unknown.append(instruction.name)
                times *= trips or 1
            for callee in called(instruction):
                if callee in counts:
                    counts[callee] += times
    return counts, unknown


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a while loop runs, or None if the text does not tell."""
    known = re.search(r'known_trip_count"?[:=]\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    body = module.computations.get(condition.group(1), {}) if condition else {}
    for instruction in body.values():
        # Loops that JAX and the partitioner write count up from 0 in steps of 1.
        if instruction.root and instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
            for operand in instruction.operands:
                if operand in body and body[operand].opcode == "constant":
                    return _constant(body[operand])
    return None


def _constant(instruction: Instruction) -> int | None:
    found = re.match(r"-?\d+", instruction.attributes)
    return int(found.group()) if found else None

"""What a checkpoint holds, and in what two differ, as lines and a JSON summary. Values are read one array at a time."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from qdepth_jax import config as config_lib
from qdepth_jax import errors, progress, stored_model
from qdepth_jax.models import policy

PARTS = (*policy.GROUPS, ("other", ".*"))
_SHORT = 200  # characters of a difference: statistics fill pages


def describe(stored: stored_model.Stored, items: list[str], depth: int = 0) -> tuple[list[str], dict[str, Any]]:
    """The tree and the facts of a checkpoint.

    Args:
      items: of params, ema, state, train; empty = all.
      depth: levels to show, 0 = every array.

    Returns:
      (lines, {"path", "form", "step", "items": item -> {"leaves", "elements", "bytes"}, "parts", ...}).
    """
    chosen, placed = _chosen(stored, items), stored_model.shardings(stored)
    if stored.form != "orbax":
        stored_model.check_files(stored)
    lines, totals = [f"{stored.path}: {stored.form}, step {stored.meta['step']}", ""], {}
    for item in chosen:
        rows: dict[str, list[Any]] = {}
        for path, leaf in stored.leaves[item].items():
            names = path.split("/")
            shown = "/".join(names[:depth]) if depth else path
            row = rows.setdefault(shown, [0, 0, set(), set(), set()])
            row[0] += 1
            row[1] += _bytes(leaf)
            row[2].add(str(list(leaf["shape"])))
            row[3].add(leaf["dtype"])
            row[4].add(placed.get(item, {}).get(path, ""))
        width = max(map(len, rows), default=0)
        for shown, (count, size, shapes, dtypes, how) in rows.items():
            shape = shapes.pop() if count == 1 else f"{count} arrays"
            split = how.pop() if len(how) == 1 else "several ways"
            kinds = "+".join(sorted(dtypes))
            lines.append(f"{item:<6} {shown:<{width}}  {kinds:<9} {shape:<22} {_size(size):>11}  {split}".rstrip())
        totals[item] = {
            "leaves": len(stored.leaves[item]),
            "elements": sum(_count(leaf) for leaf in stored.leaves[item].values()),
            "bytes": sum(map(_bytes, stored.leaves[item].values())),
        }
    parts = _parts(stored)
    lines += ["", f"{'part':<8} {'parameters':>15}"]
    lines += [f"{name:<8} {count:>15,}" for name, count in [*parts.items(), ("all", sum(parts.values()))]]
    lines += [""] + [f"{item}: {t['leaves']} arrays, {_size(t['bytes'])}" for item, t in totals.items()]
    facts = _facts(stored)
    lines += [""] + [f"{name}: {value}" for name, value in facts.items()]
    return lines, {"path": stored.path, "form": stored.form, "items": totals, "parts": parts} | facts


def verify(stored: stored_model.Stored, items: list[str]) -> int:
    """Reads every array and compares it with its sum; returns their number.

    Raises:
      UserError: which is damaged.
    """
    chosen = _chosen(stored, items)
    total = sum(len(stored.leaves[item]) for item in chosen)
    bar = progress.Progress(total, f"reading {stored.path}", unit="array")
    for item in chosen:
        for path, _ in stored_model.read_leaves(stored, item, stored_model.whole(stored, item)):
            bar.update(1, path)
    bar.close()
    return total


def compare(
    a: stored_model.Stored,
    b: stored_model.Stored,
    items: list[str],
    values: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[str], dict[str, Any]]:
    """What differs between two checkpoints.

    Args:
      items: of params, ema, state, train; empty = all.
      values: read the numbers and compare them with what was recorded, and those whose sums differ with each other;
        without it the recorded sums alone are compared.
      say: progress.

    Returns:
      (lines, {"same", "only_first", "only_second", "shapes", "dtypes", "changed", "fields", "largest": {...}}).
    """
    chosen = _chosen(a, items) if items else sorted(a.leaves.keys() | b.leaves.keys())
    if values:
        for stored in (a, b):
            verify(stored, [item for item in chosen if item in stored.leaves])
    only: tuple[list[str], list[str]] = ([], [])
    shapes, dtypes, changed, equal = [], [], [], 0
    for item in chosen:
        there, here = a.leaves.get(item, {}), b.leaves.get(item, {})
        only[0].extend(f"{item}/{path}" for path in there if path not in here)
        only[1].extend(f"{item}/{path}" for path in here if path not in there)
        for path in (path for path in there if path in here):
            one, two, name = there[path], here[path], f"{item}/{path}"
            if list(one["shape"]) != list(two["shape"]):
                shapes.append((name, f"{list(one['shape'])} / {list(two['shape'])}"))
                continue
            if one["dtype"] != two["dtype"]:
                dtypes.append((name, f"{one['dtype']} / {two['dtype']}"))
            elif one["sum"] == two["sum"]:
                equal += 1
                continue
            changed.append((item, path))
    lines = [f"first:  {a.path}, step {a.meta['step']}", f"second: {b.path}, step {b.meta['step']}", ""]
    for title, names in (("only in the first", only[0]), ("only in the second", only[1])):
        lines += [f"{title}: {name}" for name in names]
    lines += [f"other shape: {name}: {text}" for name, text in shapes]
    lines += [f"other type: {name}: {text}" for name, text in dtypes]
    largest: dict[str, Any] = {}
    retyped, moved = {name for name, _ in dtypes}, 0
    for item, path in changed:
        name = f"{item}/{path}"
        if not values:
            if name not in retyped:
                lines.append(f"other numbers: {name}")
                moved += 1
            continue
        say(f"reading {name}")
        absolute, relative = _distance(a, b, item, path)
        moved += absolute != 0
        if absolute != 0 or name not in retyped:  # equal numbers of another type are told above
            lines.append(f"other numbers: {name}: at most {absolute:.3g} absolute, {relative:.3g} relative")
        if not largest or not absolute <= largest["absolute"]:
            largest = {"leaf": name, "absolute": _json_number(absolute), "relative": _json_number(relative)}
    fields = [line[:_SHORT] for line in config_lib.differences(_comparable(a), _comparable(b))]
    lines += [f"field {line}" for line in fields]
    same = not (only[0] or only[1] or shapes or dtypes or changed)
    lines += ["", f"{equal} arrays equal, {len(changed)} not" + ("; no field differs" if not fields else "")]
    return lines, {
        "same": same,
        "equal": equal,
        "only_first": len(only[0]),
        "only_second": len(only[1]),
        "shapes": len(shapes),
        "dtypes": len(dtypes),
        "changed": moved,
        "fields": len(fields),
        "largest": largest,
    }


def _distance(a, b, item: str, path: str) -> tuple[float, float]:
    """(largest |a - b|, largest |a - b| / |a|) of one leaf, in float64; infinite where one is not finite."""
    one, two = (next(stored_model.read_leaves(s, item, {path: stored_model.whole(s, item)[path]}))[1] for s in (a, b))
    absolute = relative = 0.0
    flat = [np.asarray(x).reshape(-1) for x in (one, two)]
    for begin in range(0, max(1, flat[0].size), 1 << 22):  # float64 copies of a part at a time
        x, y = (np.asarray(part[begin : begin + (1 << 22)], np.float64) for part in flat)
        off = np.abs(x - y)
        off = np.where(np.isnan(off), np.where(np.isnan(x) & np.isnan(y), 0.0, np.inf), off)
        absolute = max(absolute, float(off.max(initial=0.0)))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(off == 0, 0.0, off / np.abs(x))
        relative = max(relative, float(np.nan_to_num(share, nan=np.inf, posinf=np.inf).max(initial=0.0)))
    return absolute, relative


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _comparable(stored: stored_model.Stored) -> dict[str, Any]:
    """Fields worth a line: the experiment, the data without its place in it, identities."""
    data = {k: v for k, v in (stored.meta.get("data") or {}).items() if k != "position"}
    datasets = {item["name"]: item for item in data.pop("datasets", [])}
    return {
        "step": stored.meta["step"],
        "config": stored.meta.get("config", {}),
        "data": data | {"datasets": datasets},
        "tokenizer": stored.meta.get("tokenizer", ""),
    }


def _facts(stored: stored_model.Stored) -> dict[str, Any]:
    meta, config = stored.meta, stored.meta.get("config", {})
    data = meta.get("data") or {}
    facts = {
        "step": meta["step"],
        "experiment": config.get("name", ""),
        "experiment_id": meta.get("experiment_id", ""),
        "model_kind": config.get("model_kind", ""),
        "init_from": config.get("init_from", ""),
        "source": meta.get("source", ""),
        "depth_tokenizer": meta.get("tokenizer", ""),
        "text_tokenizer": data.get("text_tokenizer", ""),
        "samples_seen": data.get("position", ""),
        "data": {item["name"]: item["fingerprint"] for item in data.get("datasets", [])},
        "export": {k: stored.manifest["weights"][k] for k in ("format", "dtype", "averaged")}
        if stored.manifest
        else "",
    }
    return {name: value for name, value in facts.items() if value not in ("", {}, None)}


def _chosen(stored: stored_model.Stored, items: list[str]) -> list[str]:
    for item in items:
        if item not in stored.leaves:
            raise errors.UserError(f"{stored.path!r} has no item {item!r}: there are {', '.join(stored.leaves)}")
    return items or list(stored.leaves)


def _parts(stored: stored_model.Stored) -> dict[str, int]:
    out: dict[str, int] = {}
    for path, leaf in stored.leaves.get("params", {}).items():
        name = next(name for name, pattern in PARTS if re.fullmatch(pattern, path))
        out[name] = out.get(name, 0) + _count(leaf)
    return {name: out[name] for name, _ in PARTS if name in out}


def _count(leaf: dict[str, Any]) -> int:
    return math.prod(leaf["shape"])


def _bytes(leaf: dict[str, Any]) -> int:
    return _count(leaf) * jnp.dtype(leaf["dtype"]).itemsize


def _size(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB" if size >= 2**14 else f"{size:,} B"

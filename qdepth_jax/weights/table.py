"""Weights of other code bases to ours and back, by tables: one row for each kind of weight.

`match` says where every key of a source belongs and reports all problems of a file at once, before a number is read.
`load` (placing.py does the memory work) then moves one leaf after the other; `save` is the inverse, `keys` the strict
set of keys that a model of ours has under the names of a table.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdepth_jax import errors
from qdepth_jax.weights import placing, source

SHOWN = 40  # problems that one message lists
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _transposed(w):
    return w.T


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of weight.

    Attributes:
      source: key with `{i}` for the layer number, `{copy}` for one of `copies` and, without target, `{rest}` for all
        that may follow.
      target: our path; empty: the source may hold this and we have no use for it.
      part: index after the layer axis, for leaves that hold two matrices. A source with `{i}` is one slice of a leaf
        with a leading layer axis.
      load: source array, target shape -> target array; None: the same array, which is then read in pieces.
      save: the inverse, target array -> source array. Both take NumPy arrays and JAX tracers.
      copies: names under which the same weight may lie in a file: one at least, and all that are there equal. They
        may be whole keys (a tied output layer beside its embedding).
      optional: a file may lack it although the model has it; it is then listed as missing.
    """

    source: str
    target: str
    part: tuple[int, ...] = ()
    load: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] | None = None
    save: Callable[[np.ndarray], np.ndarray] = lambda w: w
    copies: tuple[str, ...] = ()
    optional: bool = False

    @property
    def pattern(self) -> re.Pattern:
        """Matches whole source keys; group `i` is the layer."""
        text = re.escape(self.source).replace(re.escape("{i}"), r"(?P<i>0|[1-9]\d*)")
        text = text.replace(re.escape("{rest}"), ".*")
        copies = "|".join(re.escape(copy) for copy in self.copies)
        return re.compile(text.replace(re.escape("{copy}"), f"(?P<copy>{copies})"))

    def key(self, layer: tuple[int, ...] = (), copy: str = "") -> str:
        """The source key of one layer."""
        key = self.source.replace("{copy}", copy or (self.copies[0] if self.copies else ""))
        return key.replace("{i}", str(layer[0])) if layer else key

    def layers(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Layer indices of the target leaf: one for each source key of this row."""
        return [(i,) for i in range(shape[0])] if "{i}" in self.source else [()]


# Linear [out, in] -> [in, out].
LINEAR = {"load": lambda w, shape: w.T, "save": _transposed}
# Convolution [out, in, kh, kw] -> [kh, kw, in, out].
CONV = {"load": lambda w, shape: w.transpose(2, 3, 1, 0), "save": lambda w: w.transpose(3, 2, 0, 1)}
# SigLIP query, key, value [heads*H, D] -> [D, heads, H]; bias [heads*H] -> [heads, H].
VISION_IN = {"load": lambda w, shape: w.T.reshape(shape), "save": lambda w: w.reshape(w.shape[0], -1).T}
VISION_IN_BIAS = {"load": lambda w, shape: w.reshape(shape), "save": lambda w: w.reshape(-1)}
# Out [D, heads*H] -> [heads, H, D], of SigLIP and of Gemma.
OUT = {"load": lambda w, shape: w.T.reshape(shape), "save": lambda w: w.reshape(-1, w.shape[-1]).T}
# Gemma query, key, value [N*H, D] -> [N, D, H].
HEADS_IN = {
    "load": lambda w, shape: w.reshape(shape[0], shape[2], shape[1]).transpose(0, 2, 1),
    "save": lambda w: w.transpose(0, 2, 1).reshape(-1, w.shape[1]),
}
# Learned positions [P, D] -> [1, P, D].
POSITIONS = {"load": lambda w, shape: w[None], "save": lambda w: w[0]}


def dense(key: str, target: str) -> list[Row]:
    """A torch linear layer with bias."""
    return [Row(f"{key}.weight", f"{target}/kernel", **LINEAR), Row(f"{key}.bias", f"{target}/bias")]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Attributes:
    params: nested dict with every leaf that the source provides, in the dtype and sharding of the target.
    read: source keys used, copies included. missing: paths of ours that the source does not provide.
    unused: source keys that we have no use for.
    """

    params: dict[str, Any]
    read: list[str]
    missing: list[str]
    unused: list[str]


@dataclasses.dataclass(frozen=True)
class Match:
    """Where a source's keys go.

    Attributes:
      leaves: target path -> {index of the slice: (row, keys that hold it)}.
      unused: keys that rows without target name. missing: paths that the source does not provide.
    """

    leaves: dict[str, dict[tuple[int, ...], tuple[Row, list[str]]]]
    unused: list[str]
    missing: list[str]


def match(
    specs: Mapping[str, source.Spec],
    rows: tuple[Row, ...],
    shapes: Any,
    title: str,
    clean: Callable[[str], str] = lambda key: key,
    equal: Callable[[str, str], bool] = lambda first, second: True,
) -> Match:
    """Gives every key its place.

    Args:
      specs: of the source.
      rows: the table. shapes: our parameter tree, arrays or ShapeDtypeStructs.
      title: what the weights are, for messages.
      clean: source key -> key as in the table.
      equal: whether two keys hold the same numbers; asked of copies of one weight.

    Raises:
      UserError: keys that no row or two rows name, two keys for one place, wrong shapes or dtypes, layers that the
        model does not have, copies that differ, and what the source lacks; all of them in one message.
    """
    targets = {path: tuple(leaf.shape) for path, leaf in flatten(shapes).items()}
    patterns = [(row.pattern, row) for row in rows]
    leaves: dict[str, dict[tuple[int, ...], tuple[Row, list[str]]]] = {}
    problems, unused, claimed = [], [], set()
    expected: dict[tuple[Row, tuple[int, ...]], tuple[int, ...]] = {}
    for original in sorted(specs):
        key, spec = clean(original), specs[original]
        found = [(row, m) for pattern, row in patterns if (m := pattern.fullmatch(key))]
        if len(found) != 1:
            problems.append(f"{original}: matches {len(found)} rows of the table, needs exactly 1")
            continue
        row, groups = found[0][0], found[0][1].groupdict()
        if not row.target:
            unused.append(original)
            continue
        if row.target not in targets:
            problems.append(f"{original}: the model has no parameter {row.target}")
            continue
        layer = (int(groups["i"]),) if "i" in groups else ()
        shape = targets[row.target]
        if layer and layer[0] >= shape[0]:
            problems.append(f"{original}: the model has {shape[0]} layers in {row.target}")
            continue
        index = layer + row.part
        claimed.add((row.target, index))
        wanted = shape[len(index) :]
        if (row, wanted) not in expected:
            expected[row, wanted] = source_shape(row, wanted)
        if tuple(spec.shape) != expected[row, wanted]:
            problems.append(
                f"{original}: shape {tuple(spec.shape)}, the model needs {expected[row, wanted]} for {row.target}"
            )
            continue
        if np.dtype(spec.dtype).name not in DTYPES:
            problems.append(f"{original}: dtype {spec.dtype}, weights are {', '.join(DTYPES)}")
            continue
        held = leaves.setdefault(row.target, {}).setdefault(index, (row, []))[1]
        if same := [other for other in held if clean(other) == key]:
            problems.append(f"{original}: duplicate of {same[0]}")
            continue
        if held and not equal(held[0], original):
            problems.append(f"{original}: differs from {held[0]}, which is the same weight")
            continue
        held.append(original)

    absent = _gaps(rows, targets, claimed, problems)
    if problems:
        listed = "\n  ".join(problems[:SHOWN]) + (
            f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        )
        raise errors.UserError(
            f"{len(problems)} problems with these {title} weights (is it a file of that code base, whole, and do the "
            f"sizes of the config fit?):\n  {listed}"
        )
    return Match(leaves, unused, sorted(set(targets) - set(leaves) | absent))


def _gaps(rows, targets, claimed: set, problems: list[str]) -> set[str]:
    """Adds a problem for each slice that a row promises and the source lacks; returns paths that may be absent."""
    absent = set()
    for row in rows:
        shape = targets.get(row.target)
        if shape is None:
            continue
        places = [(layer, (row.target, layer + row.part)) for layer in row.layers(shape)]
        if row.optional and not any(place in claimed for _, place in places):
            absent.add(row.target)
            continue
        problems += [f"{row.key(layer)}: not in the file" for layer, place in places if place not in claimed]
    return absent


def load(
    weights: source.Source | Mapping[str, np.ndarray],
    rows: tuple[Row, ...],
    target: Any,
    title: str,
    clean: Callable[[str], str] = lambda key: key,
    on_read: Callable[[str, int], None] = lambda path, size: None,
) -> Loaded:
    """Reads a source into our tree, leaf after leaf.

    Args:
      weights: a reader's Source, or a dict of arrays.
      rows: the table. title, clean: see `match`.
      target: our parameter tree of ShapeDtypeStructs (or arrays, for their shape). The dtype is the one wanted. Leaves
        with a sharding come as jax.Array there; no device ever holds more than its shard and one piece of a leaf, the
        host no more than a few pieces. Leaves without one come as NumPy arrays.
      on_read: called with our path and the bytes of each block that was read for it.

    Raises:
      UserError: what `match` finds; copies of one weight that differ; what the reader finds.
    """
    weights = source.as_source(weights)
    equal = functools.partial(source.equal, weights)
    placed = match(weights.specs, rows, target, title, clean, equal)
    leaves, read = {}, []
    for path, leaf in flatten(target).items():
        if path not in placed.leaves:
            continue
        parts = placed.leaves[path]
        report = functools.partial(on_read, path)
        leaves[path] = placing.assemble(leaf, _pieces(weights, parts, leaf.shape, report, title))
        read += [key for _, held in parts.values() for key in held]
    return Loaded(nest(leaves), read, placed.missing, placed.unused)


def _pieces(weights: source.Source, parts, shape: tuple[int, ...], report, title: str) -> Iterator[placing.Piece]:
    """All blocks of one leaf: (start, array), both with the leaf's number of axes."""
    for index, (row, held) in sorted(parts.items()):
        wanted, ones = shape[len(index) :], (1,) * len(index)
        if row.load is None:
            for start, block in weights.pieces(held[0], source.ELEMENTS):
                source.check_finite(block, f"{title}: {held[0]}")
                yield index + start, block.reshape(ones + block.shape)
                report(block.nbytes)
        else:
            block = np.asarray(row.load(weights.read(held[0]), wanted))
            source.check_finite(block, f"{title}: {held[0]}")
            yield index + (0,) * len(wanted), block.reshape(ones + block.shape)
            report(block.nbytes)


def save(
    params: Any, rows: tuple[Row, ...], copies: Callable[[Row], tuple[str, ...]] = lambda row: row.copies[:1]
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters (or gradients) under the names of a table; the inverse of `load`, one array at a time.

    Args:
      params: nested dict of arrays, whose dtypes stay. Leaves without a row are left out.
      rows: the table.
      copies: which copies of a weight to write.

    Raises:
      UserError: a row that is not optional names a leaf that `params` lacks.
    """
    leaves = flatten(params)
    for row in rows:
        if row.target not in leaves:
            if row.target and not row.optional:
                raise errors.UserError(f"these parameters have no {row.target}, which {row.source} is saved from")
            continue
        leaf = leaves[row.target]
        for layer in row.layers(leaf.shape):
            value = row.save(_slice(leaf, layer + row.part))
            for copy in copies(row) or ("",):
                yield row.key(layer, copy), value


def keys(
    rows: tuple[Row, ...], shapes: Any, copies: Callable[[Row], tuple[str, ...]] = lambda row: row.copies[:1]
) -> dict[str, tuple[int, ...]]:
    """Source key -> shape of everything that `save` would write for a model of these shapes."""
    leaves, out = flatten(shapes), {}
    for row in rows:
        if row.target not in leaves:
            continue
        shape = tuple(leaves[row.target].shape)
        layers = row.layers(shape)
        wanted = shape[len(layers[0] + row.part) :]
        theirs = source_shape(row, wanted)
        out |= {row.key(layer, copy): theirs for layer in layers for copy in copies(row) or ("",)}
    return out


def source_shape(row: Row, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the source of a slice that has the shape `wanted` in our leaf; allocates nothing."""
    return tuple(jax.eval_shape(row.save, jax.ShapeDtypeStruct(wanted, jnp.float32)).shape)


def _slice(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    if not index:
        return np.asarray(leaf)
    if isinstance(leaf, jax.Array):
        return np.asarray(_at(leaf, np.asarray(index, np.int32)))
    return np.asarray(leaf[index])


@jax.jit
def _at(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """The slice at leading indices [n]; one program serves all layers."""
    for axis in range(index.shape[0]):
        leaf = jax.lax.dynamic_index_in_dim(leaf, index[axis], 0, keepdims=False)
    return leaf


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested dict -> {"a/b": leaf}."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    out: dict[str, Any] = {}
    for name in tree:
        out |= flatten(tree[name], f"{path}/{name}" if path else str(name))
    return out


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": leaf} -> nested dict."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return out

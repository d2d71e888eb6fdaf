"""Matching and streaming: every problem of a file in one message, one block at a time, the same numbers on any mesh."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import errors
from qdepth_jax.weights import placing, source, table
from qdepth_jax.weights.table import LINEAR, Row

ROWS = (
    Row("stacked", "a/stacked"),
    Row("layers.{i}.w", "a/kernel", **LINEAR),
    Row("layers.{i}.{copy}.gate", "a/pair", part=(0,), copies=("one", "two"), **LINEAR),
    Row("layers.{i}.{copy}.up", "a/pair", part=(1,), copies=("one", "two"), **LINEAR),
    Row("maybe", "b/maybe", optional=True),
    Row("rest.{rest}", ""),
)
SHAPES = {"a": {"stacked": (4, 16, 8), "kernel": (3, 8, 16), "pair": (3, 2, 8, 16)}, "b": {"maybe": (8,), "own": (2,)}}


def shapes(dtype=jnp.float32, sharding=None):
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, dtype, sharding=sharding), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes())


def load(weights, target=None):
    return table.load(weights, ROWS, shapes() if target is None else target, "test")


def test_there_and_back_by_any_copy():
    ours = params()
    saved = dict(table.save(ours, ROWS, lambda row: row.copies[1:]))
    assert saved["layers.2.two.up"].shape == (16, 8)
    np.testing.assert_array_equal(saved["layers.2.two.up"], ours["a"]["pair"][2, 1].T)
    loaded = load(saved | {"rest.of.it": np.zeros(3, np.int64)})
    assert loaded.missing == ["b/own"] and loaded.unused == ["rest.of.it"]
    assert set(loaded.read) == set(saved)
    for path, leaf in table.flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, table.flatten(ours)[path])
    assert {k: v.shape for k, v in saved.items()} == table.keys(ROWS, shapes(), lambda row: row.copies[1:])


def test_all_problems_in_one_message():
    weights = dict(table.save(params(), ROWS))
    weights["surprise"] = np.zeros(1)
    weights["layers.3.w"] = np.zeros((16, 8), np.float32)
    weights["layers.01.w"] = np.zeros((16, 8), np.float32)
    weights["layers.1.w"] = weights["layers.1.w"][:5]
    weights["stacked"] = weights["stacked"].astype(np.int32)
    weights["layers.0.two.up"] = weights["layers.0.one.up"] + 1
    del weights["layers.2.one.gate"]
    with pytest.raises(errors.UserError) as caught:
        load(weights)
    text = str(caught.value)
    assert text.startswith("7 problems with these test weights")
    for line in (
        "surprise: matches 0 rows",
        "layers.3.w: the model has 3 layers in a/kernel",
        "layers.01.w: matches 0 rows",
        "layers.1.w: shape (5, 8), the model needs (16, 8) for a/kernel",
        "stacked: dtype int32, weights are float32",
        "layers.0.two.up: differs from layers.0.one.up",
        "layers.2.one.gate: not in the file",
    ):
        assert line in text


def test_two_keys_of_one_name_and_two_rows_of_one_key():
    weights = dict(table.save(params(), ROWS))
    with pytest.raises(errors.UserError, match=r"params/stacked: duplicate of params/stacked|stacked: duplicate of"):
        table.load(
            weights | {"params/stacked": weights["stacked"]},
            ROWS,
            shapes(),
            "test",
            lambda key: key.removeprefix("params/"),
        )
    with pytest.raises(errors.UserError, match="stacked: matches 2 rows"):
        table.load(weights, (*ROWS, Row("stacked", "b/own")), shapes(), "test")


def test_a_long_list_of_problems_is_cut():
    with pytest.raises(errors.UserError, match="and 60 more"):
        load(dict(table.save(params(), ROWS)) | {f"k{i}": np.zeros(1) for i in range(100)})


class Counted(source.Arrays):
    """Notes every block that was read: key and elements."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.log = []

    def pieces(self, key, elements):
        for start, block in super().pieces(key, elements):
            self.log.append((key, block.size))
            yield start, block


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        slow((1, 1, 1), jnp.float32),
        ((2, 2, 2), jnp.bfloat16),
        slow((1, 8, 1), jnp.float32),
        slow((1, 2, 4), jnp.bfloat16),
        slow((8, 1, 1), jnp.float32),
    ],
)
def test_streamed_into_shards_equals_whole(sizes, dtype, monkeypatch):
    """Forced through the way of large leaves, in blocks of 40 elements, each leaf read once."""
    monkeypatch.setattr(placing, "WHOLE_BYTES", 0)
    monkeypatch.setattr(source, "ELEMENTS", 40)
    ours = params()
    weights = Counted(dict(table.save(ours, ROWS)))
    count = int(np.prod(sizes))
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(sizes), ("replica", "fsdp", "tensor"))
    specs = {"a": {"stacked": P(None, "fsdp", "tensor"), "kernel": P(None, "tensor", "fsdp"), "pair": P()}, "b": P()}
    placed = {
        "a": {
            name: jax.ShapeDtypeStruct(SHAPES["a"][name], dtype, sharding=NamedSharding(mesh, spec))
            for name, spec in specs["a"].items()
        },
        "b": shapes(dtype, NamedSharding(mesh, P()))["b"],
    }
    loaded = load(weights, placed)
    for path, leaf in table.flatten(loaded.params).items():
        wanted = table.flatten(ours)[path].astype(dtype)
        assert leaf.sharding == table.flatten(placed)[path].sharding and leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf), wanted)
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), wanted[shard.index])
    stacked = [size for key, size in weights.log if key == "stacked"]
    assert max(stacked) <= 40 and sum(stacked) == 4 * 16 * 8
    assert sum(size for _, size in weights.log) == sum(x.size for x in jax.tree.leaves(loaded.params))


def test_a_leaf_is_read_when_the_one_before_is_done():
    weights, done = Counted(dict(table.save(params(), ROWS))), []

    def on_read(path, size):
        # At every call all blocks read so far were reported, but for the present one.
        done.append((path, size))
        assert len(weights.log) == len(done)

    table.load(weights, ROWS, shapes(), "test", on_read=on_read)
    order = [path for path, _ in done]
    assert order == sorted(order, key=list(dict.fromkeys(order)).index), "leaves are mixed up"


def test_dtypes_of_files_become_the_targets():
    exact = np.arange(8, dtype=np.float32) / 4
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64, ">f4"):
        found = table.load({"w": exact.astype(dtype)}, (Row("w", "w"),), {"w": jax.ShapeDtypeStruct((8,), "f4")}, "t")
        assert found.params["w"].dtype == np.float32
        np.testing.assert_array_equal(found.params["w"], exact)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=4),
    elements=st.integers(1, 200),
    chunks=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    chunked=st.booleans(),
)
def test_blocks_cover_an_array_once_in_order(shape, elements, chunks, chunked):
    chunk = tuple(chunks[: len(shape)]) if chunked else ()
    spec = source.Spec(tuple(shape), np.dtype("f4"), chunk)
    seen, sizes = np.zeros(shape, int), []
    flat = np.arange(spec.size).reshape(shape)
    runs = []
    for block in source.blocks(spec, elements):
        seen[block] += 1
        sizes.append(flat[block].size)
        runs.append(flat[block].ravel())
        assert all(s.start % min(c, n) == 0 for s, c, n in zip(block, chunk, shape, strict=False))
    assert (seen == 1).all()
    assert max(sizes, default=0) <= max(elements, int(np.prod([min(c, n) for c, n in zip(chunk, shape, strict=False)])))
    if not chunked:  # one run of the file after the other
        np.testing.assert_array_equal(np.concatenate(runs), np.arange(spec.size))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_random_trees_round_trip(data):
    """Any tree of stacked and single leaves through a table made for it."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, tree = [], {}
    for n in range(data.draw(st.integers(1, 6))):
        stacked, torch = data.draw(st.booleans()), data.draw(st.booleans())
        shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=2)))
        rows.append(Row(f"k{n}" + (".{i}" if stacked else ""), f"t/{n}", **(LINEAR if torch else {})))
        full = (data.draw(st.integers(1, 12)), *shape) if stacked else shape
        tree[str(n)] = rng.normal(size=full).astype(np.float32)
    saved = dict(table.save({"t": tree}, tuple(rows)))
    back = table.load(saved, tuple(rows), {"t": tree}, "random")
    assert back.missing == [] and sorted(back.read) == sorted(saved)
    for name, leaf in tree.items():
        np.testing.assert_array_equal(back.params["t"][name], leaf)

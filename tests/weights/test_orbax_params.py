"""Orbax trees read array by array: OCDBT or not, zarr 2 and 3, sharded and damaged."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdepth_jax import errors
from qdepth_jax.weights import orbax_params

KINDS = {"ocdbt": {}, "files": {"use_ocdbt": False}, "zarr3": {"use_zarr3": True}}


def tree():
    rng = np.random.default_rng(0)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P(None, "x"))
    big = jax.device_put(rng.normal(size=(6, 16)).astype(np.float32), sharding)
    return {"params": {"a": {"kernel": {"value": big}}, "b": {"value": jnp.arange(3, dtype=jnp.bfloat16)}}}


def save(folder, kind="ocdbt"):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**KINDS[kind])) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree()))
    return tree()["params"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_array(tmp_path, kind):
    wanted = save(tmp_path / "params", kind)
    # The item itself, or the step that holds it.
    for path in (tmp_path / "params", tmp_path):
        weights = orbax_params.open_source(str(path))
        assert set(weights.specs) == {"params/a/kernel/value", "params/b/value"}
        np.testing.assert_array_equal(weights.read("params/a/kernel/value"), wanted["a"]["kernel"]["value"])
        found = weights.read("params/b/value")
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, np.asarray(wanted["b"]["value"]))


def test_pieces_are_whole_chunks(tmp_path):
    wanted = np.asarray(save(tmp_path / "params")["a"]["kernel"]["value"])
    weights = orbax_params.open_source(str(tmp_path))
    assert weights.specs["params/a/kernel/value"].chunk == (6, 2), "one chunk for each of eight shards"
    found = list(weights.pieces("params/a/kernel/value", 24))
    assert [block.shape for _, block in found] == [(6, 4)] * 4
    for (_, column), block in found:
        np.testing.assert_array_equal(block, wanted[:, column : column + 4])


def test_a_chunk_that_is_gone_is_no_zero(tmp_path):
    save(tmp_path / "params", "files")
    (tmp_path / "params" / "params.a.kernel.value" / "0.3").unlink()
    weights = orbax_params.open_source(str(tmp_path))
    with pytest.raises(errors.UserError, match=r"params/a/kernel/value cannot be read.*missing"):
        weights.read("params/a/kernel/value")


def test_half_a_checkpoint(tmp_path):
    save(tmp_path / "params")
    for file in (tmp_path / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(errors.UserError, match=r"no whole Orbax checkpoint|cannot be read"):
        weights = orbax_params.open_source(str(tmp_path))
        for key in weights.specs:
            weights.read(key)
    (tmp_path / "params" / "_METADATA").write_text("{")
    with pytest.raises(errors.UserError, match="no whole Orbax checkpoint"):
        orbax_params.open_source(str(tmp_path))


def test_folders_of_something_else(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(errors.UserError, match=r"is no Orbax checkpoint.*holds \['x'\]"):
        orbax_params.open_source(str(tmp_path))
    with pytest.raises(errors.UserError, match="no folder"):
        orbax_params.open_source(str(tmp_path / "none"))

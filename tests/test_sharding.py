"""The mesh and the table: total coverage, no silent replication, clear errors."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from qdepth_jax import config as config_lib
from qdepth_jax import errors, optim, sharding, train_step
from qdepth_jax.models import policy, tokenizer


def full_state(objective, frozen=(), ema=True):
    tx = optim.make(config_lib.OptimConfig(), 1000, frozen)
    return jax.eval_shape(lambda key: train_step.init_state(key, objective, tx, ema), jax.random.key(0))


@pytest.mark.parametrize(
    ("replica", "fsdp", "tensor"), [(1, 8, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1), (1, 1, 8), (-1, 2, 2)]
)
def test_full_size_policy_and_tokenizer_fit_every_mesh_of_eight(replica, fsdp, tensor):
    mesh = sharding.make_mesh(config_lib.MeshConfig(replica, fsdp, tensor))
    config = policy.sized("full")
    for objective, frozen in (
        (policy.make_objective(config), policy.frozen_table(config)),
        (tokenizer.make_objective(tokenizer.TokenizerConfig()), ()),
        (tokenizer.make_objective(tokenizer.TokenizerConfig(quantiser="plain")), ()),
    ):
        state = full_state(objective, frozen)
        placed = sharding.state_shardings(mesh, state)
        per_device = sum(
            math.prod(s.shard_shape(x.shape))
            for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
        )
        whole = sum(x.size for x in jax.tree.leaves(state))
        # Only `replica` copies a policy; the tokenizer is replicated by its rows of the table.
        ways = mesh.shape["fsdp"] * mesh.shape["tensor"] if frozen else 1
        assert whole / ways <= per_device
        assert (per_device < whole) == (ways > 1)


def test_nothing_above_a_mebibyte_of_the_policy_is_replicated():
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 8, 1))
    config = policy.sized("full")
    state = full_state(policy.make_objective(config), policy.frozen_table(config))
    placed = jax.tree.leaves(sharding.state_shardings(mesh, state))
    total = 0
    for (path, leaf), s in zip(jax.tree_util.tree_leaves_with_path(state), placed):
        per_device = math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        whole = leaf.size * leaf.dtype.itemsize
        assert per_device < whole or whole < 2**20, sharding.path_of(path)
        total += per_device
    everything = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert total < 1.01 * everything / 8


def test_frozen_embedding_has_no_moments_but_everything_else_has_two():
    config = policy.sized("full")
    state = full_state(policy.make_objective(config), policy.frozen_table(config), ema=False)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    embedding = state.params["llm"]["embedder"]["input_embedding"].size
    moments = sum(x.size for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state) if x.ndim)
    assert moments == 2 * (size(state.params) - embedding)


def test_a_leaf_without_a_rule_is_an_error_with_its_name():
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 8, 1))
    with pytest.raises(errors.UserError, match="params/new_module/thing"):
        sharding.state_shardings(mesh, {"params": {"new_module": {"thing": jnp.zeros((8,))}}})


def test_a_size_that_does_not_divide_names_leaf_axis_and_fix():
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 8, 1))
    with pytest.raises(
        errors.UserError, match=r"action_decoder/kernel.*size 20 does not divide by fsdp=8.*\[1, 2, 4, 5\]"
    ):
        sharding.state_shardings(mesh, {"params": {"action_decoder": {"kernel": jnp.zeros((20, 7))}}})


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (1, 4, 1), (16, -1, 1)])
def test_meshes_that_do_not_fit_eight_devices(sizes):
    with pytest.raises(errors.UserError):
        sharding.make_mesh(config_lib.MeshConfig(*sizes))


def test_specs_align_to_the_last_dimensions():
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 4, 2))
    leaves = {
        "llm": {"layers": {"mlp": {"linear": jnp.zeros((3, 16, 8))}}},
        "img": {"x": {"Dense_0": {"kernel": jnp.zeros((8, 6))}}},
    }
    placed = sharding.state_shardings(mesh, leaves)
    assert placed["llm"]["layers"]["mlp"]["linear"].spec == P(None, "tensor", "fsdp")
    assert placed["img"]["x"]["Dense_0"]["kernel"].spec == P("fsdp", "tensor")

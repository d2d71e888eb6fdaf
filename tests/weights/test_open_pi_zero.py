"""The weight table: both directions, and every problem of a bad file in one message."""

import functools

import jax
import numpy as np
import pytest

from qdepth_jax import errors
from qdepth_jax.models import policy
from qdepth_jax.weights import open_pi_zero, table

CONFIG = policy.sized("tiny")


@functools.cache
def shapes(config=CONFIG):
    return jax.eval_shape(lambda: policy.init(config, jax.random.key(0)))["params"]


@functools.cache
def state_dict():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes())
    return open_pi_zero.save(params), params


def test_there_and_back():
    source, params = state_dict()
    loaded = open_pi_zero.load(source, shapes())
    assert set(loaded.read) == set(source)
    theirs, ours = table.flatten(params), table.flatten(loaded.params)
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path])
    assert set(theirs) - set(ours) == set(loaded.missing)
    assert all("depth" in path for path in loaded.missing)


def test_full_size_has_the_published_938_keys():
    full = policy.sized("full", depth=None)
    keys = table.keys(open_pi_zero.TABLE, shapes(full), open_pi_zero.copies_of())
    assert len(keys) == 938


def test_compiled_prefix_and_a_single_copy_of_the_expert():
    source = {f"_orig_mod.{k}": v for k, v in state_dict()[0].items() if "mixtures.proprio" not in k}
    assert len(open_pi_zero.load(source, shapes()).read) == len(source)


def test_linear_is_transposed_and_heads_are_split():
    source, _ = state_dict()
    params = open_pi_zero.load(source, shapes()).params
    np.testing.assert_array_equal(params["action_decoder"]["kernel"], source["action_decoder.weight"].T)
    q = source["joint_model.mixtures.vlm.layers.1.self_attn.q_proj.weight"]
    w = params["llm"]["layers"]["vlm"]["attn"]["q_einsum"]["w"][1]
    h = CONFIG.head_dim
    np.testing.assert_array_equal(w[2], q[2 * h : 3 * h].T)


def test_all_problems_are_reported_together():
    source = dict(state_dict()[0])
    source["surprise.weight"] = np.zeros(3)
    source["proprio_encoder.weight"] = np.zeros((16, 9))
    source["joint_model.mixtures.proprio.norm.weight"] = np.zeros(16)
    del source["joint_model.mixtures.vlm.layers.2.mlp.up_proj.weight"]
    source["joint_model.mixtures.vlm.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32))
    with pytest.raises(errors.UserError) as caught:
        open_pi_zero.load(source, shapes())
    text = str(caught.value)
    for fragment in (
        "surprise.weight: matches 0 rows",
        "proprio_encoder.weight: shape (16, 9), the model needs (16, 7)",
        "joint_model.mixtures.proprio.norm.weight: differs from",
        "layers.2.mlp.up_proj.weight: not in the file",
        "layers.3.mlp.up_proj.weight: the model has 3 layers",
    ):
        assert fragment in text

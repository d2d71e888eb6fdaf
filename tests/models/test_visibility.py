"""The visibility table: as data, as a mask, and as exactly zero gradients of the real model, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from flax import linen as nn

from qdepth_jax import errors
from qdepth_jax.models import policy, policy_config, visibility

PICTURE_R1 = """\
             image     text    depth  proprio   action
image            x        x        .        .        .
text             x        x        .        .        .
depth            x        x        x        .        .
proprio          x        x        .        x        .
action           x        x        x        x        x"""


def test_default_table_is_the_published_one():
    assert visibility.picture(visibility.resolve("r1")) == PICTURE_R1


def test_other_tables_differ_where_they_should():
    r1, r2, hybrid = (dict(visibility.TABLES[name]) for name in ("r1", "r2", "proprio_sees_depth"))
    assert {g for g in visibility.GROUPS if r1[g] != r2[g]} == {"image", "text"}
    assert r2["image"] == ("image",) and r2["text"] == ("text",)
    assert {g for g in visibility.GROUPS if r1[g] != hybrid[g]} == {"proprio"}
    assert set(hybrid["proprio"]) - set(r1["proprio"]) == {"depth"}


def test_mask_by_hand():
    sizes = {"image": 1, "text": 3, "depth": 1, "proprio": 1, "action": 2}
    valid = jnp.array([[True, True, False], [True, False, False]])
    mask = np.asarray(visibility.mask(visibility.resolve("r1"), sizes, valid))
    expected = """
      x xx. . . ..
      x xx. . . ..
      x xx. . . ..
      x xx. . . ..
      x xx. x . ..
      x xx. . x ..
      x xx. x x xx
      x xx. x x xx"""
    rows = [[c == "x" for c in line if c in "x."] for line in expected.split("\n") if line.strip()]
    np.testing.assert_array_equal(mask[0], np.array(rows))
    assert not mask[:, :, 3].any() and not mask[1, :, 2].any() and mask[0, :, 2].all()


def test_mask_of_the_action_alone_is_the_last_rows():
    table, sizes = visibility.resolve("r1"), {"image": 4, "text": 3, "depth": 4, "proprio": 1, "action": 2}
    valid = jnp.array([[True, True, False]])
    full = visibility.mask(table, sizes, valid)
    np.testing.assert_array_equal(visibility.mask(table, sizes, valid, ("action",)), full[:, -2:])


@pytest.mark.parametrize(
    "table, message",
    [
        ("r3", "'r3' is unknown"),
        ((("image", ("image",)),), "one row for each"),
        (visibility.with_rows(visibility.TABLES["r1"], text=("image", "speech")), r"unknown groups \['speech'\]"),
    ],
)
def test_bad_tables(table, message):
    with pytest.raises(errors.UserError, match=message):
        visibility.resolve(table)


def test_only_tables_whose_prefix_does_not_see_actions_can_be_cached():
    visibility.check_cacheable(visibility.TABLES["proprio_sees_depth"])
    with pytest.raises(errors.UserError, match=r"\['proprio'\] do"):
        visibility.check_cacheable(visibility.with_rows(visibility.TABLES["r1"], proprio=("image", "action")))


# Two tokens in every group, so that "sees its own group" is about another token than itself.
CONFIG = dict(layers=3, views=("main",), text_length=4, proprio_steps=2, horizon=2, scan=False)


@functools.cache
def fresh_params(convention="open_pi_zero"):
    """Of the model with a depth expert; the one without ignores the rest."""
    config = policy.sized("tiny", **{**CONFIG, **policy_config.CONVENTIONS[convention]})
    params = jax.jit(lambda k: policy.init(config, k)["params"])(jax.random.key(0))
    # Adaptive norms start with a gate of zero, and nobody would see anything.
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32) if "Dense_0" in str(path[-2]) else x,
        params,
    )


@pytest.mark.parametrize(
    ("table", "convention"),
    [
        ("r1", "open_pi_zero"),
        ("r2", "open_pi_zero"),
        ("proprio_sees_depth", "open_pi_zero"),
        ("no_depth", "open_pi_zero"),
        pytest.param("r1", "pi0", marks=pytest.mark.slow),
        pytest.param("r1", "pi05", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_zero_exactly_where_the_table_is(table, convention):
    """J[l, t, s]: how the value that layer l + 1 computes for token t depends on the input state of token s.

    After one layer it is the table itself; after two layers the table again, because all tables here are transitively
    closed, so nothing leaks through a third group.
    """
    changes = {"depth": None} if table == "no_depth" else {"visibility": table}
    config = policy.sized("tiny", **{**CONFIG, **policy_config.CONVENTIONS[convention], **changes})
    batch = synthetic.policy_batch(config, 1)
    batch["text"] = jnp.array([[5, 6, 7, 0]])  # the last one is padding
    params = fresh_params(convention)
    sizes = config.sizes
    widths = {"image": 32, "text": 32, "depth": 16, "proprio": 16, "action": 16}
    groups = [group for group in visibility.GROUPS if sizes[group]]

    def values(deltas):
        def run(module):
            images = policy.prepare_images(config, batch)
            streams, _ = module._prefix(images, batch["text"], batch.get("proprio"))
            action, conditions = module._action(batch["action"], jnp.array([0.3]))
            before = [streams["action"]] if config.proprio_steps else []
            streams["action"] = jnp.concatenate([*before, action], axis=1)
            experts = {"vlm": ("image", "text"), "depth": ("depth",), "action": ("proprio", "action")}
            streams = {
                name: streams[name] + jnp.concatenate([deltas[group] for group in members if group in deltas], axis=1)
                for name, members in experts.items()
                if name in streams
            }
            everything = visibility.GROUPS
            mask = module._mask(batch["text"], everything, everything)
            positions = module._positions(everything, batch["text"], None)
            _, cache = module.llm(streams, positions, mask, conditions=conditions, return_cache=True)
            # One number for each layer and token; a random direction cannot be orthogonal to a dependence.
            direction = jax.random.normal(jax.random.key(1), cache.v.shape[-1:])
            return jnp.einsum("LBSKH,H->LS", cache.v, direction)[1:]

        return nn.apply(run, policy.Policy(config))({"params": params})

    deltas = {group: jnp.zeros((1, sizes[group], widths[group])) for group in groups}
    jacobian = jax.jit(jax.jacrev(values))(deltas)
    strength = np.concatenate([np.abs(jacobian[g]).sum(axis=(2, 4)) for g in groups], axis=2)  # [layer, T, S]
    table = visibility.resolve(config.visibility)
    expected = np.asarray(visibility.mask(table, sizes, batch["text"] != 0))[0]
    other = ~np.eye(len(expected), dtype=bool)
    padding = sizes["image"] + 3
    for layer, name in enumerate(("direct", "through a second layer")):
        zeros = strength[layer][other & ~expected]
        assert (zeros == 0).all(), f"{name}: {np.argwhere((strength[layer] != 0) & other & ~expected)}"
        assert (strength[layer][other & expected] > 0).all(), name
    assert not expected[:, padding].any()

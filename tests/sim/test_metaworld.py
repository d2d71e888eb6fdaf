"""Meta-World adapter: instructions for every task, deterministic seeds, upright views, a scripted success."""

import importlib.util

import numpy as np
import pytest

from qdepth_jax.sim import metaworld, metaworld_instructions


def test_fifty_different_instructions():
    table = metaworld_instructions.INSTRUCTIONS
    assert len(table) == 50
    assert len(set(table.values())) == 50
    assert all(text == text.strip().lower() and 3 < len(text) < 80 for text in table.values())


@pytest.mark.slow
def test_scripted_policy_solves_door_open_and_a_seed_is_an_episode():
    if importlib.util.find_spec("metaworld") is None:  # importing it here would fix MuJoCo's GL backend too early
        pytest.skip("extra 'sim' is not installed: pip install 'qdepth_jax[sim]'")
    env = metaworld.MetaWorldEnv(metaworld.list_tasks().index("door-open-v3"), image_size=64)
    from metaworld import policies

    assert metaworld.list_tasks() == sorted(policies.ENV_POLICY_MAP)
    starts = []
    for seed in (1, 2, 1):
        env.reset(seed)
        starts.append(env._observation.copy())
    np.testing.assert_array_equal(starts[0], starts[2])
    assert np.abs(starts[0] - starts[1]).max() > 1e-3
    seen = env.render()
    # Upright: the table in front is nearer than what lies behind it.
    assert np.median(seen["depth"][-8:]) < np.median(seen["depth"][:8])
    assert any(env.step(env.expert_action()) for _ in range(metaworld.STEP_CAP))
    env.close()

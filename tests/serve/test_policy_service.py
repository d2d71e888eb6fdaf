"""What the server is asked to be, checked before anything is loaded."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_observation import good, reader

from qdepth_jax import errors, planner
from qdepth_jax.models import images, inference
from qdepth_jax.serve import policy_service, protocol


@pytest.fixture
def service(monkeypatch):
    """`service(**options)` with a policy that was never run."""
    monkeypatch.setattr(planner, "load", lambda *args: reader().planner)
    return lambda **options: policy_service.Service("", policy_service.Options(**options))


def test_every_program_is_named_before_it_is_compiled(service, monkeypatch):
    told, found = [], service(batch_sizes=(1, 4), depth=True)
    asked = lambda requests, size: told.append((size, requests[0].row.previous is not None, requests[0].depth))  # noqa: E731
    monkeypatch.setattr(found, "run", asked)
    found.warm_up(told.append)
    lines, programs = told[::2], told[1::2]
    assert programs == [(s, rtc, depth) for s in (1, 4) for depth in (False, True) for rtc in (False, True)]
    assert lines[0] == "compiling program 1 of 8: 1 at a time"
    assert lines[7] == "compiling program 8 of 8: 4 at a time, real-time chunking, depth"


@pytest.mark.parametrize("ahead", [0, 16, None])
def test_clients_are_told_how_far_ahead_the_depth_lies(service, ahead):
    found = service(depth=True)
    found.planner = found.planner._replace(found=found.planner.found._replace(depth_ahead=ahead))
    assert protocol.unpack(protocol.pack(found.metadata()))["depth"]["frames_ahead"] == ahead


def test_a_picture_of_a_size_not_seen_before_compiles_nothing(service, monkeypatch):
    """One thread reads the requests of all robots."""
    monkeypatch.setattr(planner, "_resize_program", lambda *size: pytest.fail(f"it compiles for {size}"))
    picture = np.random.default_rng(0).integers(0, 256, (40, 52, 3)).astype(np.uint8)
    found = service(max_side=64).prepare(protocol.pack(good(**{"observation/image": picture}))).row.batch["image_main"]
    side = found.shape[0]
    assert found.dtype == np.uint8 and found.shape == (side, side, 3) != picture.shape
    np.testing.assert_array_equal(images.prepare(found[None], side), images.prepare(jnp.asarray(picture[None]), side))


def test_keys_that_the_policy_has_no_use_for_pass_where_the_server_says_so(service):
    found = service(ignore=("observation/joints", "observation/right_image"))
    frame = protocol.pack(good(**{"observation/joints": [1.0], "observation/right_image": "any"}))
    assert found.prepare(frame).row.batch.keys() == {"text", "proprio", "image_main", "image_wrist"}
    # As large as the others may be.
    assert found.max_frame - service().max_frame == 2 * 3 * 1024**2
    with pytest.raises(errors.UserError, match=r"'observation/third'.*--ignore=KEY"):
        found.prepare(protocol.pack(good(**{"observation/third": 1})))
    with pytest.raises(errors.UserError, match="--ignore=prompt,seed: this server reads 'prompt', 'seed'"):
        service(ignore=("seed", "prompt", "x"))


def test_a_seed_that_no_noise_can_have_is_refused():
    for seed in (-1, 1 << 32):
        with pytest.raises(errors.UserError, match=f"--seed={seed}: a whole number from 0"):
            policy_service.Options(seed=seed)


def test_a_solver_that_cannot_continue_chunks_is_refused_unless_nobody_does():
    with pytest.raises(errors.UserError, match="heun's last evaluation lies there"):
        policy_service.Options(how=inference.Inference(solver="heun"))
    assert policy_service.Options(rtc="off", how=inference.Inference(solver="heun")).how.solver == "heun"
    assert policy_service.Options(how=inference.Inference(flow_steps=5, solver="midpoint")).how.flow_steps == 5

"""What the server is asked to be, checked before anything is loaded."""

import pytest

from qdepth_jax import errors
from qdepth_jax.models import inference
from qdepth_jax.serve import policy_service


def test_a_solver_that_cannot_continue_chunks_is_refused_unless_nobody_does():
    with pytest.raises(errors.UserError, match="heun's last evaluation lies there"):
        policy_service.Options(how=inference.Inference(solver="heun"))
    assert policy_service.Options(rtc="off", how=inference.Inference(solver="heun")).how.solver == "heun"
    assert policy_service.Options(how=inference.Inference(flow_steps=5, solver="midpoint")).how.flow_steps == 5

"""A policy whose parameters and batch are split over processes; two minutes of CPU, most of it in the compiler."""

import pytest
import tiny_runs
from multihost_runs import assert_same, read, rows, run


@pytest.mark.slow
def test_a_policy_whose_tensor_axis_spans_processes(tmp_path):
    """Two processes hold one row of the mesh, heads and widths are split over them: both read the whole batch."""
    flags = tiny_runs.flags(train__total_steps=10, train__checkpoint_every=10, train__micro_batches=2)
    run(tmp_path / "one", tmp_path / "index", flags, 1, (1, 1, 2), devices=2)
    run(tmp_path / "two", tmp_path / "index", flags, 2, (1, 1, 2), devices=2)
    assert len(rows(tmp_path / "two")) == 10
    assert_same(tmp_path / "two", rows(tmp_path / "one"))
    twice = {step: sorted(part * 2) for step, part in read(tmp_path / "one", 1).items()}
    assert read(tmp_path / "two", 2) == twice

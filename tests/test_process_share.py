"""Which share of the work a process does: by flags, by the launcher, or all of it."""

import pytest

from qdepth_jax import errors, process_share

SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[0-3]", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ((None, None), {}, (0, 1)),
        ((2, 3), {}, (2, 3)),
        ((0, 2), SLURM | {"SLURM_PROCID": "3"}, (0, 2)),  # flags before the launcher
        ((None, None), SLURM | {"SLURM_PROCID": "3"}, (3, 4)),
        (
            (None, None),
            {"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            (1, 2),
        ),
        ((None, None), {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "2"}, (2, 3)),
    ],
)
def test_share(given, environment, expected):
    assert process_share.find(*given, environment) == expected


@pytest.mark.parametrize(
    ("given", "environment", "match"),
    [
        ((1, None), {}, "belong together"),
        ((None, 2), {}, "belong together"),
        ((2, 2), {}, "--process_id=2 --num_processes=2"),
        ((None, None), {"WORLD_SIZE": "4"}, "not by a launcher that is known: give --process_id"),
        (
            (None, None),
            {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2"},
            "4 processes",
        ),
        ((None, None), {"TPU_WORKER_HOSTNAMES": "a,b"}, "not which of them this is"),
    ],
)
def test_refusals(given, environment, match):
    with pytest.raises(errors.UserError, match=match):
        process_share.find(*given, environment)

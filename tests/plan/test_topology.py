"""Names of slices, chips' rates, network shapes, memory messages, the state on every mesh."""

import types

import pytest

from qdepth_jax import chips, errors
from qdepth_jax.plan import collectives, program, roofline, topology


@pytest.mark.parametrize(
    ("name", "chip", "shape", "slices", "count", "hosts"),
    [
        ("v5e-8", "v5e", (2, 4), 1, 8, 1),
        ("v5e:4x4", "v5e", (4, 4), 1, 16, 4),
        ("v5e-16", "v5e", (4, 4), 1, 16, 4),
        ("v5e-256", "v5e", (16, 16), 1, 256, 64),
        ("v5p-64", "v5p", (2, 4, 4), 1, 32, 8),  # counts TensorCores, two a chip
        ("2xv5e-256", "v5e", (16, 16), 2, 512, 128),
        ("h100-64", "h100", (), 1, 64, 8),
    ],
)
def test_names(name, chip, shape, slices, count, hosts):
    where = topology.parse(name)
    assert (where.chip.name, where.shape, where.slices, where.chips, where.hosts) == (chip, shape, slices, count, hosts)


@pytest.mark.parametrize("name", ["v9-16", "v5e", "v5e:4x4x4", "v5e-17", "v5p-65", "v5e:4by4"])
def test_unknown_names_say_what_there_is(name):
    with pytest.raises(errors.UserError, match=r"v5[ep]"):
        topology.parse(name)


def test_both_names_of_a_slice_are_printed():
    assert topology.parse("v5p-64").name == "v5p:2x4x4 (v5p-64)"
    assert topology.parse("2xv5e-256").name == "2 x v5e:16x16 (v5e-256)"


def test_peak_flops_by_device_kind():
    assert chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("TPU v5") == chips.peak_flops("TPU v5p") == 459e12
    assert chips.peak_flops("TPU v4") == 275e12
    assert chips.peak_flops("TPU v6 lite") == 918e12
    assert chips.peak_flops("NVIDIA H200") == chips.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert chips.peak_flops("cpu") is None
    assert chips.peak_flops("NVIDIA H100 PCIe") is None, "another board with another rate is no H100 SXM"


def test_links_of_a_group():
    pod, half = topology.parse("v5e-256"), topology.parse("v5e:4x4")
    everything = [(x, y) for x in range(16) for y in range(16)]
    assert topology.link_bandwidth(pod, everything) == 4 * 50e9  # two rings
    assert topology.link_bandwidth(pod, [(x, 0) for x in range(16)]) == 2 * 50e9
    assert topology.link_bandwidth(pod, [(x, 0) for x in range(8)]) == 50e9  # half a ring is a line
    assert topology.link_bandwidth(half, [(x, y) for x in range(4) for y in range(4)]) == 2 * 50e9  # no wraparound


def test_an_all_reduce_over_slices_crosses_with_each_chip_s_share():
    where = topology.parse("2xv5e-16")
    devices = [
        types.SimpleNamespace(slice_index=s, coords=(x, y, 0)) for s in range(2) for x in range(4) for y in range(4)
    ]
    whole = collectives.Collective("all-reduce", "f32", 32e9, 1, tuple(range(32)), "replica+fsdp", "")
    inside, outside = roofline.network_seconds(where, [whole], devices)
    # Scatter and gather 32 GB over 16 chips with two links; then every chip sums its sixteenth with the other slice.
    assert inside == pytest.approx(2 * 32e9 * 15 / 16 / 100e9)
    assert outside == pytest.approx(2 * 32e9 / 16 / 2 / where.chip.dcn_bandwidth)
    pair = collectives.Collective("all-reduce", "f32", 2e9, 3, (0, 16), "replica", "")
    assert roofline.network_seconds(where, [pair], devices) == (0.0, pytest.approx(3 * 2e9 / where.chip.dcn_bandwidth))


def test_roofline_takes_the_largest_term():
    where = topology.parse("v5e-16")
    line = roofline.roofline(where, 16 * 197e12, 2 * 16 * 197e12, 819e9, (0.5, 0.25))
    assert (line.model, line.compute, line.hbm, line.limit, line.bound) == (1.0, 2.0, 1.0, "compute", 2.0)
    assert line.mfu_bound == 0.5 and line.mfu_sum == pytest.approx(1 / 3.75)


def test_the_compiler_s_refusal_is_read():
    messages = (  # libtpu 0.0.52 (8 GiB of arguments, 16 of temporaries), and older ones
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (24.00G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee https://openxla.org/xla/errors",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 24.00G of 15.75G hbm. Exceeded hbm capacity by 8.25G.",
    )
    for message in messages:
        result = program.refused(message)
        assert not result.fits and (result.needed, result.limit) == (24 * 2**30, 15.75 * 2**30)
    assert program.refused("INTERNAL: something else") is None

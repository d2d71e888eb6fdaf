# ruff: noqa: E501 (lines of compiled programs)
"""Reading compiled programs: loops, groups in every notation, collectives written several times."""

import pytest

from qdepth_jax.plan import collectives, hlo, traffic

# Lines in the form of the TPU compiler's own text: a scan of 3 micro-batches around a scan of 18 layers.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%start (p0: bf16[8,64]) -> (bf16[8,64], bf16[128,64], u32[]) {
  %p0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %ag.1 = bf16[128,64]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}, frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/mlp/dot"}
  ROOT %cc = (bf16[8,64]{1,0}, bf16[128,64]{1,0}, u32[]{:S(2)}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%done (p0.1: bf16[8,64]) -> bf16[128,64] {
  %p0.1 = bf16[8,64]{1,0} parameter(0)
  ROOT %ag.2 = bf16[128,64]{1,0} all-gather(%p0.1), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.3 (p0.2: bf16[32,64]) -> bf16[2,64] {
  %p0.2 = bf16[32,64]{1,0} parameter(0)
  %ar = bf16[32,64]{1,0} all-reduce(%p0.2), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, to_apply=%add
  ROOT %ds = bf16[2,64]{1,0} dynamic-slice(%ar), dynamic_slice_sizes={2,64}
}

%layer (t: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %x = bf16[8,64]{1,0} get-tuple-element(%t), index=1
  %f.start = (bf16[8,64]{1,0}, bf16[128,64]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %f.done = bf16[128,64]{1,0} fusion(%x), kind=kCustom, calls=%done
  %f.rs = bf16[2,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %out = (s32[], bf16[8,64]{1,0}) tuple(%i, %x)
}

%layer_cond (t.1: (s32[], bf16[8,64])) -> pred[] {
  %n = s32[]{:T(128)} constant(18)
  %t.1 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

%micro (t.2: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t.2 = (s32[], bf16[8,64]{1,0}) parameter(0)
  ROOT %w = (s32[], bf16[8,64]{1,0}) while(%t.2), condition=%layer_cond, body=%layer
}

%micro_cond (t.3: (s32[], bf16[8,64])) -> pred[] {
  %t.3 = (s32[], bf16[8,64]{1,0}) parameter(0)
  ROOT %p = pred[] custom-call(%t.3), custom_call_target="x"
}

ENTRY %main (x: bf16[8,64]) -> bf16[8,64] {
  %x.1 = bf16[8,64]{1,0} parameter(0)
  %ar.2 = (f32[4]{0}, f32[4]{0}) all-reduce(%x.1, %x.1), channel_id=1, replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
  %cp = (bf16[8,64]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x.1), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %cp.d = bf16[8,64]{1,0} collective-permute-done(%cp)
  %init = (s32[], bf16[8,64]{1,0}) tuple(%x.1, %x.1)
  %w.1 = (s32[], bf16[8,64]{1,0}) while(%init), condition=%micro_cond, body=%micro, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = bf16[8,64]{1,0} get-tuple-element(%w.1), index=1
}
"""
MESH = {"replica": 2, "fsdp": 8, "tensor": 1}


def test_loops_multiply():
    module = hlo.parse(PROGRAM)
    counts, unknown = hlo.run_counts(module)
    assert not unknown
    assert (counts["main"], counts["micro"], counts["layer"], counts["start"]) == (1, 3, 54, 54)
    assert "add" not in counts, "the operator of a reduction is no computation that runs"


def test_a_loop_without_a_known_count_is_named():
    text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    counts, unknown = hlo.run_counts(hlo.parse(text))
    assert unknown == ["w.1"]
    assert counts["layer"] == 18


def test_collectives_with_kind_size_count_and_axes():
    found, _ = collectives.find(hlo.parse(PROGRAM), MESH)
    by_kind = {item.kind: item for item in found}
    assert len(found) == 4, "an overlapped collective is written twice and runs once"
    gather, scatter = by_kind["all-gather"], by_kind["reduce-scatter"]
    assert (gather.count, gather.payload, gather.dtype, gather.axes) == (54, 128 * 64 * 2, "bf16", "replica+fsdp")
    assert gather.sent == 15 / 16 * gather.payload
    assert gather.where == "jit(step)/mlp/dot"
    assert (scatter.count, scatter.payload, len(scatter.group)) == (54, 32 * 64 * 2, 16)
    assert by_kind["all-reduce"].payload == 32
    assert (by_kind["all-reduce"].axes, by_kind["all-reduce"].group) == ("replica", (0, 8))
    assert (by_kind["collective-permute"].payload, by_kind["collective-permute"].axes) == (1024, "fsdp")
    rows = collectives.summary(found)
    assert rows[0]["kind"] == "all-gather" and rows[0]["sent"] == 54 * gather.sent


def test_what_crosses_slices_is_handed_to_the_runtime():
    text = """\
HloModule m

ENTRY %main (x: bf16[65,8]) -> bf16[65,8] {
  %x = bf16[65,8]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[65,8]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[65,8]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = bf16[65,8]{1,0} all-reduce(%x), channel_id=3, replica_groups={{0,1,2,3}}
}
"""
    crossing, inside = collectives.find(hlo.parse(text), {"replica": 4, "fsdp": 2, "tensor": 1}, slices=2)[0]
    assert (crossing.kind, crossing.payload, crossing.axes, crossing.group) == ("all-reduce", 1040, "slices", (0, 4))
    assert (inside.axes, inside.group) == ("replica+fsdp", (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups={}", tuple(range(8))),
        ("source_target_pairs={{3,1},{1,3}}", (3, 1)),
    ],
)
def test_groups_in_every_notation(text, group):
    assert collectives.first_group(f"channel_id=1, {text}, dimensions={{0}}", 8) == group


def test_sizes():
    array = hlo.arrays("(bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[3], f8e4m3fn[5], s4[8], u32[]{:S(2)})")
    assert [a.bytes for a in array] == [1024, 3, 5, 4, 4]
    assert [a.in_hbm for a in array] == [False, True, True, True, False]
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_step {}")


TRAFFIC = """\
HloModule m

%fused (p: f32[27,100], i: s32[]) -> f32[100] {
  %p = f32[27,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = f32[1,100]{1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,100}
  ROOT %b = f32[100]{0} bitcast(%s)
}

%update (q: f32[27,100], u: f32[1,100], j: s32[]) -> f32[27,100] {
  %q = f32[27,100]{1,0} parameter(0)
  %u = f32[1,100]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %d = f32[27,100]{1,0} dynamic-update-slice(%q, %u, %j)
}

ENTRY %main (x: f32[27,100], k: s32[]) -> f32[27,100] {
  %x = f32[27,100]{1,0} parameter(0)
  %k = s32[]{:S(6)} parameter(1)
  %one = f32[100]{0:T(128)S(1)} fusion(%x, %k), kind=kLoop, calls=%fused
  %two = f32[1,100]{1,0} negate(%one)
  ROOT %three = f32[27,100]{1,0} fusion(%x, %two, %k), kind=kLoop, calls=%update
}
"""


def test_memory_traffic_counts_slices_and_updates_as_what_they_move():
    # Read one row (400 bytes) into on-chip memory; write its negation (400); read it, update one row (800).
    assert traffic.hbm_bytes(hlo.parse(TRAFFIC), []) == 400 + 400 + 800


ASYNC = """HloModule jit_f

%cut (p: f32[12,100]) -> f32[3,100] {
  %p = f32[12,100]{1,0:T(8,128)} parameter(0)
  ROOT %rows = f32[3,100]{1,0:T(8,128)S(1)} slice(%p), slice={[0:3], [0:100]}
}

ENTRY %main (x: f32[12,100]) -> f32[3,100] {
  %x = f32[12,100]{1,0:T(8,128)} parameter(0)
  %slice-start = ((f32[12,100]{1,0:T(8,128)}), f32[3,100]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) async-start(%x), calls=%cut
  %slice-done = f32[3,100]{1,0:T(8,128)S(1)} async-done(%slice-start)
  ROOT %out = f32[3,100]{1,0:T(8,128)} negate(%slice-done)
}
"""


def test_slices_on_their_way_to_on_chip_memory_are_read_from_hbm():
    # Three rows read (1200 bytes) into on-chip memory, their negation written.
    assert traffic.hbm_bytes(hlo.parse(ASYNC), []) == 1200 + 1200

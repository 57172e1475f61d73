"""Statistics of compiled programs: counted from text, and from what the real TPU compiler makes of known functions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from configs import wan5b
from wallwm_jax.console import UserError
from wallwm_jax.data.packing import batch_spec
from wallwm_jax.parallel.aot import count_instructions, statistics, topology_devices
from wallwm_jax.parallel.chips import GIB
from wallwm_jax.parallel.hlo import hbm_bytes, parse
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training.train_step import build_train_step

MODULE = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[]{:T(128)} add(%a, %a), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%fused (p: f32[8,16], q: f32[16,4]) -> f32[8,4] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  %q = f32[16,4]{1,0:T(8,128)} parameter(1)
  ROOT %dot = f32[8,4]{1,0:T(8,128)} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%condition (state: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(30)
  %state.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  ROOT %less = pred[]{:T(512)} compare(%state.1, %limit), direction=LT
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state.2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%state.2), index=1
  %y = f32[16,4]{1,0:T(8,128)} get-tuple-element(%state.2), index=1
  %product = f32[8,4]{1,0:T(8,128)} fusion(%x, %y), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  %a2 = f32[5,8,128]{2,1,0:T(8,128)} parameter(1)
  %b2 = f32[5,128,8]{2,1,0:T(8,128)} parameter(2)
  %batched = f32[5,8,8]{2,1,0:T(8,128)} convolution(%a2, %b2), window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf
  %gathered = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=[4,32]<=[128], dimensions={0}
  %splash_fwd = (f32[8]{0}, f32[8]{0}) custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,3]{1,0}, bf16[2,3,64,16]{3,2,1,0}, bf16[2,3,128,16]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"kernel_name": "splash"}}, metadata={op_name="x"}
  %splash_dkv = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,3,3]{2,1,0}, bf16[3,64,16]{2,1,0}, bf16[3,128,16]{2,1,0}, s32[8,64]{1,0}}
  ROOT %next = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%limit, %product)
}

ENTRY %main (start: (s32[], f32[8,4])) -> f32[] {
  %start = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %loop = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body, metadata={op_name="scan"}
  %reduced = f32[100]{0:T(128)} all-reduce(%loop), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %spread = f32[50]{0:T(128)} all-reduce(%loop), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, to_apply=%add
  %again = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  ROOT %total = f32[]{:T(128)} reduce(%reduced), dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_loops_fusions_collectives_and_kernels_are_counted():
    found = count_instructions(MODULE)
    trips = 30 + 2
    product, batched = 2 * 8 * 4 * 16, 2 * 5 * 8 * 8 * 128
    assert found.flops == trips * (product + batched)
    assert found.products == dict.fromkeys([(8, 16), (16, 4), (5, 8, 128), (5, 128, 8)], trips)
    assert found.cycles == trips * 100
    assert found.collectives == {"all-gather": trips, "all-reduce": 2}
    assert found.received["all-gather"] == pytest.approx(trips * 64 * 128 * 2 * 31 / 32)
    assert found.received["all-reduce"] == pytest.approx(2 * (100 + 50) * 4 * 3 / 4)
    assert found.kernels == {"splash_fwd": trips, "splash_dkv": trips}
    assert found.kernel_flops == trips * (4 * 2 + 10) * 3 * 64 * 128 * 16  # forward of two rows, backward of one
    assert "splash_fwd" in found.table() and "all-gather" in found.table()


OVERLAPPED = """HloModule overlapped

%start (shard: bf16[1,8192,512]) -> (bf16[1,8192,2048], u32[]) {
  %shard = bf16[1,8192,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)} all-gather(%shard), replica_groups=[2,4]<=[8], dimensions={2}
  ROOT %begun = (bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (shard: bf16[1,8192,512], a: bf16[64,128], b: bf16[128,32]) -> (bf16[64,32], bf16[1,8192,2048]) {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %b = bf16[128,32]{1,0:T(8,128)(2,1)} parameter(2)
  %dot = bf16[64,32]{1,0:T(8,128)(2,1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %shard.1 = bf16[1,8192,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %gather.2 = bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)} all-gather(%shard.1), replica_groups=[2,4]<=[8], dimensions={2}
  ROOT %both = (bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)}) tuple(%dot, %gather.2)
}

%end (shard: bf16[1,8192,512]) -> bf16[1,8192,2048] {
  %shard.2 = bf16[1,8192,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %gather.3 = bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)} all-gather(%shard.2), replica_groups=[2,4]<=[8], dimensions={2}
  ROOT %ended = bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (shard: bf16[1,8192,512], a: bf16[64,128], b: bf16[128,32]) -> bf16[1,8192,2048] {
  %p = bf16[1,8192,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %r = bf16[128,32]{1,0:T(8,128)(2,1)} parameter(2)
  %first = (bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start
  %during = (bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)}) fusion(%p, %q, %r), kind=kOutput, calls=%async_collective_fusion.7, backend_config={"window_config":{"estimated_cycles":"900"}}
  ROOT %last = bf16[1,8192,2048]{2,1,0:T(8,128)(2,1)} fusion(%p), kind=kCustom, calls=%end
}
"""  # noqa: E501


ON_SPARSE_CORES = """HloModule sparse

%gathering (shard: bf16[8,512]) -> bf16[8,2048] {
  %shard = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather = bf16[8,2048]{1,0:T(8,128)(2,1)} all-gather(%shard), replica_groups=[2,4]<=[8], dimensions={1}
}, execution_thread="sparsecore"

%called () -> bf16[8,2048] {
  %shard.1 = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %call = bf16[8,2048]{1,0:T(8,128)(2,1)} call(%shard.1), to_apply=%gathering
}, execution_thread="sparsecore"

ENTRY %main (p: bf16[8,512], q: bf16[64,128]) -> bf16[64,128] {
  %p = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %one.start = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%called
  %before = bf16[64,128]{1,0:T(8,128)(2,1)} add(%q, %q), backend_config={"window_config":{"estimated_cycles":"300"}}
  %one.update = ((bf16[8,512]{1,0}), bf16[8,2048]{1,0}) call-update(%one.start, %p)
  %two.start = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%called
  %two.update = ((bf16[8,512]{1,0}), bf16[8,2048]{1,0}) call-update(%two.start, %p)
  %during = bf16[64,128]{1,0:T(8,128)(2,1)} add(%q, %before), backend_config={"window_config":{"estimated_cycles":"200"}}
  %one.done = bf16[8,2048]{1,0:T(8,128)(2,1)} call-done(%one.update)
  %two.done = bf16[8,2048]{1,0:T(8,128)(2,1)} call-done(%two.update)
  ROOT %after = bf16[64,128]{1,0:T(8,128)(2,1)} add(%q, %during), backend_config={"window_config":{"estimated_cycles":"70"}}
}
"""  # noqa: E501


def test_a_collective_of_the_sparse_cores_runs_beside_what_stands_before_its_end():
    """Two at once share what they run beside."""
    moved = count_instructions(ON_SPARSE_CORES).traffic["all-gather", 4]
    one = 8 * 2048 * 2 * 3 / 4
    assert (moved.count, moved.received, moved.exposed, moved.beside) == (2, 2 * one, 0, 0)
    assert moved.overlapped == {(one, 400.0, 0.0): 1, (one, 100.0, 0.0): 1} and moved.sparse == 2


ON_THEIR_OWN = """HloModule on_their_own

ENTRY %main (p: bf16[4,512], q: bf16[1,256,128]) -> bf16[4,512] {
  %p = bf16[4,512]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %start = ((bf16[4,512]{1,0:T(8,128)(2,1)}), bf16[4,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) all-to-all-start(%p), replica_groups=[1,4]<=[4], dimensions={0}
  %kernel_fwd = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} custom-call(%q, %q), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[1,256,128]{2,1,0}, bf16[1,256,128]{2,1,0}}, metadata={op_name="kernel_fwd"}
  %during = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} add(%q, %kernel_fwd), backend_config={"window_config":{"estimated_cycles":"200"}}
  ROOT %done = bf16[4,512]{1,0:T(8,128)(2,1)} all-to-all-done(%start)
}
"""  # noqa: E501


def test_the_largest_integer_is_no_estimate():
    absurd = ON_THEIR_OWN.replace('"estimated_cycles":"200"', f'"estimated_cycles":"{2**63 - 1}"')
    one, other = count_instructions(ON_THEIR_OWN), count_instructions(absurd)
    assert (one.cycles, one.unpriced) == (200, 0) and (other.cycles, other.unpriced) == (0, 3 * 256 * 128 * 2)


def test_a_collective_with_a_start_and_an_end_runs_beside_what_stands_between():
    moved = count_instructions(ON_THEIR_OWN).traffic["all-to-all", 4]
    size = 4 * 512 * 2 * 3 / 4
    assert (moved.count, moved.received, moved.exposed, moved.sparse) == (1, size, 0, 0)
    assert moved.overlapped == {(size, 200.0, 4.0 * 256 * 256 * 128): 1}


def test_a_collective_inside_a_product_is_counted_once_and_beside_it():
    found = count_instructions(OVERLAPPED)
    moved = found.traffic["all-gather", 4]
    assert (moved.count, moved.exposed, moved.beside) == (1, 0, 900)
    assert moved.received == 8192 * 2048 * 2 * 3 / 4
    assert (found.flops, found.product_cycles, found.cycles) == (2 * 64 * 32 * 128, 900, 900)


IN_PLACE = """HloModule in_place

%cut (stack: bf16[7,64,64]) -> bf16[64,64] {
  %stack = bf16[7,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} constant(3)
  %one = bf16[1,64,64]{2,1,0:T(8,128)(2,1)} dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={1,64,64}
  ROOT %flat = bf16[64,64]{1,0:T(8,128)(2,1)} bitcast(%one)
}

%as_it_is (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0:T(8,128)} parameter(0)
  ROOT %same = f32[64,64]{1,0:T(8,128)} bitcast(%x)
}

%fused (stack.1: bf16[7,64,64], x.1: f32[64,64], all: f32[9,64,64]) -> (f32[9,64,64], f32[64,64]) {
  %stack.1 = bf16[7,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x.1 = f32[64,64]{1,0:T(8,128)} parameter(1)
  %all = f32[9,64,64]{2,1,0:T(8,128)} parameter(2)
  %w = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%stack.1), kind=kLoop, calls=%cut
  %y = f32[64,64]{1,0:T(8,128)} fusion(%x.1), kind=kLoop, calls=%as_it_is
  %dot = f32[64,64]{1,0:T(8,128)} dot(%y, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %row = f32[1,64,64]{2,1,0:T(8,128)} bitcast(%dot)
  %put = f32[9,64,64]{2,1,0:T(8,128)} dynamic-update-slice(%all, %row, %i, %i, %i)
  ROOT %both = (f32[9,64,64]{2,1,0:T(8,128)}, f32[64,64]{1,0:T(8,128)S(1)}) tuple(%put, %dot)
}

ENTRY %main (a: bf16[7,64,64], b: f32[64,64], c: f32[9,64,64]) -> f32[9,64,64] {
  %a = bf16[7,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[64,64]{1,0:T(8,128)} parameter(1)
  %c = f32[9,64,64]{2,1,0:T(8,128)} parameter(2)
  %fetched = (f32[64,64]{1,0:T(8,128)S(1)}, f32[64,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%b)
  %here = f32[64,64]{1,0:T(8,128)S(1)} copy-done(%fetched)
  %layer = (f32[9,64,64]{2,1,0:T(8,128)}, f32[64,64]{1,0:T(8,128)S(1)}) fusion(%a, %b, %c), kind=kOutput, calls=%fused
  %stays = f32[64,64]{1,0:T(8,128)S(1)} add(%here, %here)
  ROOT %out = f32[9,64,64]{2,1,0:T(8,128)} get-tuple-element(%layer), index=0
}
"""


def test_hbm_is_read_where_it_is_cut_and_written_where_it_changes():
    """Of a stack of weights one layer, of a stack of results one, and nothing of what stays on the chip."""
    computations, entry = parse(IN_PLACE)
    main = computations[entry]
    moved = {name: hbm_bytes(one, main, computations) for name, one in main.items()}
    weights, matrix = 64 * 64 * 2, 64 * 64 * 4
    assert moved["layer"] == weights + matrix + matrix  # one layer's weights, b, and the row of c that changes
    assert moved["fetched"] == matrix and moved["stays"] == moved["here"] == moved["out"] == 0
    assert count_instructions(IN_PLACE).hbm == weights + 3 * matrix


BETWEEN_SLICES = """HloModule between_slices

ENTRY %main (a: bf16[1024,8,128]) -> bf16[1024,8,128] {
  %a = bf16[1024,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %after-all = token[] after-all()
  %send = (bf16[1024,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%a, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[1024,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (bf16[1024,8,128]{2,1,0:T(8,128)(2,1)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %out = bf16[1024,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501


def test_what_goes_over_the_data_centre_network_has_a_kind_of_its_own():
    ((key, moved),) = count_instructions(BETWEEN_SLICES).traffic.items()
    size = 1024 * 8 * 128 * 2
    assert key == ("dcn-all-reduce", 4) and moved.count == 1
    assert moved.received == moved.exposed == 2 * size * 3 / 4
    assert moved.arrays == {"bf16[1024,8,128]": 1}


@pytest.fixture(scope="module")
def devices():
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    return topology_devices("v5p:2x2x1")


@pytest.mark.tpu
def test_memory_is_what_the_compiler_refuses_a_program_by():
    """Gradients of so many layers as just fit a v5e chip, by what one of fewer layers takes, and of two more."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    (device, *_), room = topology_devices("v5e:2x2"), 15.75 * GIB

    def compiled(layers):
        def loss(weights, x):
            x, _ = jax.lax.scan(lambda x, weight: (x + jnp.tanh(x @ weight) @ weight.T, None), x, weights)
            return jnp.sum(x.astype(jnp.float32) ** 2)

        where = jax.sharding.SingleDeviceSharding(device)
        weights = jax.ShapeDtypeStruct((layers, 4096, 4096), jnp.bfloat16, sharding=where)
        x = jax.ShapeDtypeStruct((8192, 4096), jnp.bfloat16, sharding=where)
        return jax.jit(jax.grad(loss)).lower(weights, x).compile()

    if not hasattr(compiled(1).memory_analysis(), "total_allocation_bytes"):
        pytest.skip("this jax does not say what is allocated")
    small, large = (statistics(compiled(layers)).memory for layers in (10, 20))
    fitting = int(10 + (room - small) // ((large - small) / 10))
    assert 0.97 * room < statistics(compiled(fitting)).memory <= room
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compiled(fitting + 2)


@pytest.mark.tpu
def test_products_of_a_scan_over_layers_are_exact(devices):
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.einsum("bsd,de->bse", jnp.tanh(x), w), None), x, weights)[0]

    where = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((4, 256, 512), jnp.bfloat16, sharding=where)
    weights = jax.ShapeDtypeStruct((7, 512, 512), jnp.bfloat16, sharding=where)
    found = statistics(jax.jit(layers).lower(x, weights).compile())
    assert found.flops == 7 * 2 * 4 * 256 * 512 * 512
    assert found.arguments >= (4 * 256 * 512 + 7 * 512 * 512) * 2 and found.cycles > 0


@pytest.mark.tpu
def test_hbm_traffic_is_what_the_compiler_counts(devices):
    """Of a program without loops, too large for the chip's own memory."""

    def layer(x, weights, outputs, i):
        return jax.lax.dynamic_update_index_in_dim(outputs, jnp.tanh(x @ weights[i]), i, 0)

    where = jax.sharding.SingleDeviceSharding(devices[0])
    shapes = [(65536, 2048), (7, 2048, 2048), (3, 65536, 2048)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in shapes]
    compiled = jax.jit(layer, donate_argnums=2).lower(*arrays, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    found = statistics(compiled)
    assert found.hbm == pytest.approx(2 * (2 * 65536 * 2048 + 2048 * 2048), rel=0.01)  # in, weights of a layer, out
    assert found.hbm == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.01)


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["video", "action"])
def test_the_5b_train_step_compiles_for_128_chips(stage):
    """WALL-WM's size at event shapes on v5p:4x4x8: kernels once per layer and pass, most of the memory free."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    config = wan5b.get_config(stage)
    with config.unlocked():
        config.data.update(rows=128, views=("left", "right", "wrist"))
        config.mesh.update(data=4, fsdp=32)
    built = build_train_step(config, make_mesh(config.mesh, topology_devices("v5p:4x4x8")))
    compiled = built.step.lower(built.abstract_state, built.abstract_batch(batch_spec(config, 128))).compile()
    found = statistics(compiled)
    print(found.table())
    assert found.kernels["resident_attention_fwd"] >= 3 * config.model.depth  # along views, across them, to captions
    assert all(count % config.model.depth == 0 for count in found.kernels.values())
    assert found.memory < 0.9 * 95 * 2**30


def test_an_unknown_topology_is_named(monkeypatch):
    monkeypatch.setattr(jax.experimental.topologies, "get_topology_desc", functools.partial(_fail, "no such chip"))
    with pytest.raises(UserError, match=r"topology 'v5p-128' \(no such chip\); write it as v5p:4x4x8"):
        topology_devices("v5p-128")


def _fail(message, *_, **__):
    raise RuntimeError(message)

"""What TPU and GPU compilers write differently: small modules as they print them."""

from textwrap import dedent

from dspark_jax.plan.hlo.collectives import group_size
from dspark_jax.plan.hlo.cost import account
from dspark_jax.plan.hlo.shapes import Shape, leaves, main_bytes, parse_type
from dspark_jax.plan.hlo.text import Estimate, parse_module

TPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

%body (p: (s32[], bf16[16,256], bf16[5,256,256], s32[])) -> (s32[], bf16[16,256], bf16[5,256,256], s32[]) {
  %p = (s32[]{:T(128)}, bf16[16,256]{1,0:T(8,128)(2,1)}, bf16[5,256,256]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[16,256]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[5,256,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)} get-tuple-element(%p), index=3
  %slice-start = ((bf16[5,256,256]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}), bf16[1,256,256]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) dynamic-slice-start(%w, %i), dynamic_slice_sizes={1,256,256}
  %slice-done = bf16[1,256,256]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice-done(%slice-start)
  %flat = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} bitcast(%slice-done)
  %y = bf16[16,256]{1,0:T(8,128)(2,1)} convolution(%x, %flat), dim_labels=bf_io->bf, metadata={op_name="jit(f)/while/body/dot_general"}
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[16,256]{1,0:T(8,128)(2,1)}, bf16[5,256,256]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%next, %y, %w, %one)
}

%condition (q: (s32[], bf16[16,256], bf16[5,256,256], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %q = (s32[]{:T(128)}, bf16[16,256]{1,0:T(8,128)(2,1)}, bf16[5,256,256]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: bf16[16,256], b: bf16[5,256,256]) -> bf16[16,256] {
  %a = bf16[16,256]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[5,256,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = s32[]{:T(128)} copy(%zero)
  %step = s32[]{:T(128)} constant(1)
  %t = (s32[]{:T(128)}, bf16[16,256]{1,0:T(8,128)(2,1)}, bf16[5,256,256]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%start, %a, %b, %step)
  %loop = (s32[]{:T(128)}, bf16[16,256]{1,0:T(8,128)(2,1)}, bf16[5,256,256]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%t), condition=%condition, body=%body
  ROOT %r = bf16[16,256]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def entry(*lines: str, header: str = "num_partitions=8") -> str:
    """A module of one computation."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, {header}\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def test_a_tpu_loop_is_counted_by_its_counter():
    cost = account(TPU)
    assert cost.flops == 5 * 2 * 16 * 256 * 256
    assert not cost.notes


def test_what_goes_to_vector_memory_is_read_once_and_then_free():
    cost = account(TPU)
    assert cost.read(1) == 5 * 256 * 256 * 2
    product = next(o for o in cost.operations if o.name == "dot_general")
    assert product.bytes == 5 * 2 * 16 * 256 * 2  # x in and y out; the weight is inside already


def test_a_batched_tpu_product_is_a_dilated_convolution():
    text = entry(
        "%a = bf16[32,16,512]{2,1,0} parameter(0)",
        "%b = bf16[32,512,256]{2,1,0} parameter(1)",
        "ROOT %c = bf16[32,16,256]{2,1,0} convolution(%a, %b), "
        "window={size=32 stride=31 lhs_dilate=32}, dim_labels=0bf_0io->0bf",
    )
    assert account(text).flops == 2 * 32 * 16 * 512 * 256


def test_tiles_are_padded_and_core_memory_is_free():
    kind, _ = parse_type("(bf16[3,5,100]{2,1,0:T(8,128)(2,1)}, f32[16]{0:T(128)S(1)}, pred[])")
    (padded, inside, flag) = leaves(kind)
    assert padded.bytes == 3 * 8 * 128 * 2 and padded.packed_bytes == 3 * 5 * 100 * 2
    assert (inside.bytes, inside.main_bytes) == (512, 0)
    assert flag == Shape("pred", ()) and main_bytes(kind) == padded.bytes + 1


def test_a_tpu_kernel_costs_what_it_states_less_what_is_inside():
    text = entry(
        "%a = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "ROOT %k = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%a), "
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/double/pallas_call"}, '
        'backend_config={"custom_call_config":{"body":"QQ(==","cost_estimate":'
        '{"flops":"77","transcendentals":"0","bytes_accessed":"10000"}}}',
    )
    cost = account(text)
    assert cost.flops == 77
    assert cost.bytes == 10000 - 8 * 128 * 4
    assert cost.operations[0].name == "double/pallas_call"


def test_a_stack_within_the_core_is_charged_as_little_of_as_the_largest():
    """A kernel that reads one of 18 layers, whose scales the compiler has brought inside."""
    layer, scales = 256 * 512, 8 * 128 * 4
    kernel = (
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/layer/pallas_call"}, '
        'backend_config={"custom_call_config":{"body":"QQ(==","cost_estimate":'
        f'{{"flops":"7","transcendentals":"0","bytes_accessed":"{layer + scales + 4096}"}}}}}}'
    )
    text = entry(
        "%w = f8e4m3fn[18,256,512]{2,1,0:T(8,128)(4,1)} parameter(0)",
        "%s = f32[18,2,4]{2,1,0:T(8,128)S(1)} parameter(1)",
        f"ROOT %k = f32[8,128]{{1,0:T(8,128)S(1)}} custom-call(%w, %s), {kernel}",
    )
    cost = account(text)
    assert cost.read(0) == layer and cost.read(1) == 0
    assert cost.bytes == layer


def test_a_gpu_kernel_costs_what_its_trace_states():
    text = entry(
        "%a = f32[8,128]{1,0} parameter(0)",
        "ROOT %k = f32[8,128]{1,0} custom-call(%a), "
        'custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/double/pallas_call"}, '
        'backend_config={module = "ML\\"(("}',
    )
    silent = account(text)
    assert (silent.flops, silent.bytes) == (0, 2 * 8 * 128 * 4)
    assert silent.notes == ("double/pallas_call states no operations: only its bytes count",)
    stated = account(text, estimates={("double", "f32[8,128]"): Estimate(77, 50000)})
    assert (stated.flops, stated.bytes, stated.notes) == (77, 50000, ())


def test_asynchronous_exchanges_count_once():
    text = entry(
        "%a = f32[1,256]{1,0} parameter(0)",
        "%s = (f32[1,256]{1,0}, f32[8,256]{1,0}) all-gather-start(%a), "
        "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}",
        "ROOT %d = f32[8,256]{1,0} all-gather-done(%s)",
    )
    cost = account(text)
    (found,) = cost.collectives
    assert (found.kind, found.shape, found.times, found.group) == ("all-gather", "f32[8,256]", 1, 8)
    assert found.sent == 7 * 256 * 4
    assert cost.bytes == 9 * 256 * 4


def test_every_spelling_of_a_group_is_read():
    spelled = {
        "replica_groups=[16,8]<=[128]": 8,
        "replica_groups=[2,4]<=[4,2]T(1,0)": 4,
        "replica_groups={{0,1,2},{3,4,5}}": 3,
        "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}": 4,
        "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0', 'axis_1'}": 8,
        "replica_groups={}": 8,
    }
    for text, size in spelled.items():
        module = parse_module(
            entry(
                "%a = f32[8]{0} parameter(0)",
                f"ROOT %r = f32[8]{{0}} all-reduce(%a), {text}, to_apply=%add",
            )
        )
        assert group_size(module, module.entry["r"]) == size, text


def test_an_update_through_a_fusion_is_in_place():
    text = dedent(
        """\
        HloModule m

        %fused (c: f32[100,64], u: f32[2,64], i: s32[]) -> f32[100,64] {
          %c = f32[100,64]{1,0} parameter(0)
          %u = f32[2,64]{1,0} parameter(1)
          %twice = f32[2,64]{1,0} add(%u, %u)
          %i = s32[] parameter(2)
          %zero = s32[] constant(0)
          %new = f32[100,64]{1,0} dynamic-update-slice(%c, %twice, %i, %zero)
          ROOT %seen = f32[100,64]{1,0} bitcast(%new)
        }

        ENTRY %main (a: f32[100,64], b: f32[2,64], j: s32[]) -> f32[100,64] {
          %a = f32[100,64]{1,0} parameter(0)
          %b = f32[2,64]{1,0} parameter(1)
          %j = s32[] parameter(2)
          %f = f32[100,64]{1,0} fusion(%a, %b, %j), kind=kLoop, calls=%fused
          ROOT %sum = f32[64]{0} reduce(%f, %j), dimensions={0}, to_apply=%fused
        }
        """
    )
    cost = account(text)
    fused = next(o for o in cost.operations if o.name.startswith("f "))
    assert fused.bytes == 2 * 2 * 64 * 4 + 4
    assert cost.read(0) == 100 * 64 * 4  # the cache as the sum reads it, after the update


def test_a_slice_of_what_a_fusion_lays_out_anew_is_a_slice():
    text = dedent(
        """\
        HloModule m

        %copied (q: bf16[36,64,64]) -> bf16[36,64,64] {
          %q = bf16[36,64,64]{2,1,0} parameter(0)
          ROOT %t = bf16[36,64,64]{1,2,0} copy(%q)
        }

        %fused (w: bf16[36,64,64], i: s32[]) -> bf16[1,64,64] {
          %w = bf16[36,64,64]{2,1,0} parameter(0)
          %n = bf16[36,64,64]{1,2,0} fusion(%w), kind=kLoop, calls=%copied
          %i = s32[] parameter(1)
          %zero = s32[] constant(0)
          ROOT %s = bf16[1,64,64]{1,2,0} dynamic-slice(%n, %i, %zero, %zero)
        }

        ENTRY %main (a: bf16[36,64,64], j: s32[]) -> bf16[1,64,64] {
          %a = bf16[36,64,64]{2,1,0} parameter(0)
          %j = s32[] parameter(1)
          ROOT %f = bf16[1,64,64]{1,2,0} fusion(%a, %j), kind=kLoop, calls=%fused
        }
        """
    )
    cost = account(text)
    assert cost.read(0) == 64 * 64 * 2
    assert cost.bytes == 2 * 64 * 64 * 2 + 4

"""Accounting optimised HLO: against hand counts of programs compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from dspark_jax.plan.hlo.cost import Cost, account

pytestmark = pytest.mark.optimised

SIZE = 4
"""Bytes of a float32."""


def cost_of(function, *arguments, donate: tuple[int, ...] = (), weights=frozenset()) -> Cost:
    """Of a function of arrays of these shapes, compiled for this machine."""
    shapes = [x if isinstance(x, jax.ShapeDtypeStruct) else floats(*x) for x in arguments]
    compiled = jax.jit(function, donate_argnums=donate).trace(*shapes).lower().compile()
    text = compiled.as_text()
    assert text
    return account(text, weights)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_scanned_layer_counts_once_per_layer():
    def layers(stack, x):
        return jax.lax.scan(lambda x, w: (jax.nn.silu(x @ w), None), x, stack)[0]

    L, B, D = 7, 16, 128
    cost = cost_of(layers, (L, D, D), (B, D))
    assert cost.flops == L * 2 * B * D * D
    assert cost.read(0) == L * D * D * SIZE
    assert cost.bytes >= cost.read(0) and not cost.notes


def test_nested_loops_multiply():
    def twice(stack, x):
        def outer(x, w):
            return jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x), None

        return jax.lax.scan(outer, x, stack)[0]

    cost = cost_of(twice, (3, 64, 64), (8, 64))
    assert cost.flops == 3 * 5 * 2 * 8 * 64 * 64


def test_a_loop_that_depends_on_data_counts_once_and_says_so():
    def until(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ w, x)

    cost = cost_of(until, (8, 64), (64, 64))
    assert cost.flops == 2 * 8 * 64 * 64
    assert any("runs until its data says so" in note for note in cost.notes)


def test_an_update_in_place_moves_only_the_update():
    C, D = 4096, 128

    def write(cache, row, at):
        return jax.lax.dynamic_update_slice(cache, row, (at, 0))

    at = jax.ShapeDtypeStruct((), jnp.int32)
    cost = cost_of(write, (C, D), (4, D), at, donate=(0,))
    assert cost.read(0) == 0
    assert 2 * 4 * D * SIZE <= cost.bytes <= 2 * 4 * D * SIZE + 64


def test_a_gather_moves_the_rows_it_takes():
    tokens = jax.ShapeDtypeStruct((8,), jnp.int32)
    cost = cost_of(lambda table, tokens: table[tokens], (50000, 64), tokens)
    assert cost.read(0) == 8 * 64 * SIZE


def test_only_the_dearest_branch_of_a_choice_counts():
    def choose(x, w, which):
        return jax.lax.cond(which, lambda: (x @ w) @ w, lambda: jnp.sin(x))

    which = jax.ShapeDtypeStruct((), jnp.bool_)
    assert cost_of(choose, (8, 256), (256, 256), which).flops == 2 * 2 * 8 * 256 * 256


def test_products_inside_fusions_count():
    cost = cost_of(lambda x, w: jax.nn.silu(x @ w) * 2 + 1, (32, 64), (64, 128))
    assert cost.flops == 2 * 32 * 64 * 128


def test_products_with_batches_count():
    cost = cost_of(lambda a, b: jnp.einsum("hbi,hio->hbo", a, b), (4, 8, 32), (4, 32, 16))
    assert cost.flops == 2 * 4 * 8 * 32 * 16


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    devices = np.array(jax.devices()).reshape(2, 4)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_exchanges_are_counted_with_their_loops(mesh: Mesh):
    def layers(stack, x):
        def layer(x, w):
            return jax.lax.psum(jnp.sin(x @ w), "tensor"), None

        return jax.lax.scan(layer, x, stack)[0]

    sharded = jax.shard_map(
        layers, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
    )
    cost = cost_of(sharded, (6, 64, 64), (16, 64))
    (found,) = cost.collectives
    assert (found.kind, found.shape, found.group, found.times) == ("all-reduce", "f32[8,64]", 4, 6)
    assert found.bytes == 8 * 64 * SIZE
    assert found.sent == 2 * found.bytes * 3 // 4
    assert not found.carries_weights


def test_a_gathered_weight_is_marked(mesh: Mesh):
    def product(x, w):
        return x @ jax.lax.all_gather(w, "tensor", axis=0, tiled=True)

    sharded = jax.shard_map(
        product, mesh=mesh, in_specs=(P(), P("tensor")), out_specs=P(), check_vma=False
    )
    weights = frozenset({("f32", (64, 32))})
    (found,) = cost_of(sharded, (8, 64), (64, 32), weights=weights).collectives
    assert (found.kind, found.group, found.carries_weights) == ("all-gather", 4, True)
    assert found.sent == 64 * 32 * SIZE * 3 // 4


def test_operations_are_named_for_where_they_come_from():
    def step(x, w):
        with jax.named_scope("verify"):
            return x @ w

    cost = cost_of(step, (64, 256), (256, 512))
    assert cost.operations[0].name == "verify/dot_general"
    assert cost.bytes == sum(operation.bytes for operation in cost.operations)

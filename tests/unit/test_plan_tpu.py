"""Accounting what the TPU compiler really writes, where it is installed."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dspark_jax.cache import Cached
from dspark_jax.plan.chips import parse_machine
from dspark_jax.plan.hlo.cost import Cost, account
from dspark_jax.plan.kernels import stated
from dspark_jax.plan.topology import devices_of, set_environment
from dspark_jax.types import Rows

pytestmark = [
    pytest.mark.optimised,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="the TPU compiler is not installed (pip install -e '.[tpu]')",
    ),
]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    set_environment()
    devices = np.array(devices_of(parse_machine("v5p:2x2x1"))).reshape(1, 4)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def cost_of(mesh: Mesh, function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> Cost:
    """Of arguments given as (shape, partition spec, type)."""
    shapes = [
        jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))
        for shape, spec, kind in arguments
    ]
    with jax.default_device(mesh.devices.flat[0]):
        traced = jax.jit(function, donate_argnums=donate).trace(*shapes)
        text = traced.lower().compile().as_text()
    assert text
    return account(text, estimates=stated(traced.jaxpr.jaxpr))


def test_scanned_layers_are_exact(mesh: Mesh):
    L, B, D, F = 6, 16, 1024, 4096

    def layers(x, up, down):
        def layer(x, weights):
            return x + jax.nn.silu(x @ weights[0]) @ weights[1], None

        return jax.lax.scan(layer, x, (up, down))[0]

    cost = cost_of(
        mesh,
        layers,
        ((B, D), P(), jnp.bfloat16),
        ((L, D, F), P(None, None, "tensor"), jnp.bfloat16),
        ((L, F, D), P(None, "tensor"), jnp.bfloat16),
    )
    assert cost.flops == L * 2 * 2 * B * D * F // 4
    assert cost.read(1) == cost.read(2) == L * D * F // 4 * 2
    weights, rows = 2 * L * D * F // 4 * 2, B * D * 2
    assert weights <= cost.bytes <= weights + L * 8 * rows
    (found,) = cost.collectives
    assert (found.kind, found.times, found.group) == ("all-reduce", L, 4)
    assert found.bytes == rows and not cost.notes


def test_a_cache_is_written_in_place(mesh: Mesh):
    B, C, n = 8, 2048, 512
    cost = cost_of(
        mesh,
        lambda old, new, at: Cached(old, Rows(at, at)).write(new).arrays,
        ((B, C, n), P(), jnp.bfloat16),
        ((B, 8, n), P(), jnp.bfloat16),
        ((B, 8), P(), jnp.int32),
        donate=(0,),
    )
    assert cost.read(0) == 0
    assert cost.bytes < 20 * B * 8 * n * 2 < B * C * n * 2


def test_a_kernel_costs_what_it_states(mesh: Mesh):
    def double(x):
        return pl.pallas_call(
            lambda x, y: y.__setitem__(..., x[...] * 2),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            cost_estimate=pl.CostEstimate(flops=77, bytes_accessed=10**7, transcendentals=0),
            name="double",
        )(x)

    sharded = jax.shard_map(double, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    cost = cost_of(mesh, sharded, ((256, 256), P(), jnp.float32))
    kernel = next(o for o in cost.operations if o.name == "double/pallas_call")
    assert kernel.flops == cost.flops == 77
    assert 10**7 - 2 * 256 * 256 * 4 <= kernel.bytes <= 10**7

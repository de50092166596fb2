"""A plan from start to end: find the models, compile both steps, account them, print."""

import sys
import time
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from rich.console import Console

from dspark_jax import ops
from dspark_jax.draft_weights import parameter_table
from dspark_jax.plan.chips import Machine, parse_machine
from dspark_jax.plan.figures import Plan, Step, write_json
from dspark_jax.plan.floor import Needs, draft_needs, held_bytes, step_bytes, target_needs
from dspark_jax.plan.groups import tensor_size
from dspark_jax.plan.hlo.collectives import WeightShapes
from dspark_jax.plan.hlo.cost import Cost, account
from dspark_jax.plan.kernels import hlo_type, stated
from dspark_jax.plan.memory import (
    Memory,
    beyond_arguments,
    cache_bytes,
    held_weights,
    refused_bytes,
    tree_bytes,
)
from dspark_jax.plan.models import find_models
from dspark_jax.plan.program import Program, decode_program, kept_block, plain_program
from dspark_jax.plan.report import show
from dspark_jax.plan.settings import PlanSettings, check
from dspark_jax.plan.topology import devices_of
from dspark_jax.sharding import target_mesh
from dspark_jax.targets.weights import entries


def run(settings: PlanSettings) -> Plan:
    """Plan, print, and write the figures where the settings say. Raises ValueError."""
    with Console(stderr=True).status(f"compiling two steps for {settings.mesh}"):
        plan = make_plan(settings)
    # A pipe has no width: tables keep their names whole in it.
    show(plan, Console(width=None if sys.stdout.isatty() else 120))
    if settings.json is not None:
        write_json(settings.json, plan)
    return plan


def make_plan(settings: PlanSettings) -> Plan:
    """Compile both steps and account them. Raises ValueError."""
    check(settings)
    machine = parse_machine(settings.mesh)
    # GPU kernels state no costs: what is counted of a program with them would mean nothing.
    counted = machine.chip.platform == "tpu" or settings.kernels == "pallas"
    ops.use(settings.kernels if counted else "reference")
    models = find_models(settings.target, settings.draft)
    tensor = tensor_size(settings.tensor_parallel, machine.devices, settings.batch, models)
    mesh = target_mesh(devices_of(machine), tensor)
    models = models._replace(block=kept_block(models.target, models.block, mesh))
    tensors = ((e.name, e.shape) for e in entries(models.target))
    target = target_needs(tensors, models.target, models.block)
    drafter = draft_needs(((r.name, r.shape) for r in parameter_table(models.draft)), models.draft)
    sizes = (settings.batch, settings.context)
    with jax.default_device(mesh.devices.flat[0]):  # caches lie as its kernels read them
        plain = plain_program(models.target, models.block, mesh, *sizes)
        fast = decode_program(models.target, models.block, models.draft, mesh, *sizes)
    plain_step, _ = measure(machine, settings, plain, (target,), 1.0)
    fast_step, memory = measure(
        machine, settings, fast, (target, drafter), settings.acceptance_length
    )
    return Plan(settings, machine, models, tensor, memory, plain_step, fast_step, ops.picked())


def measure(
    machine: Machine,
    settings: PlanSettings,
    program: Program,
    needs: tuple[Needs, ...],
    yields: float,
) -> tuple[Step, Memory]:
    """Compile and account one step; what does not fit is a result, not an error."""
    shared, held = tree_bytes(program.shared), tree_bytes(program.arguments)
    weights, cache = tree_bytes(program.weights) - shared, tree_bytes(program.cache)
    start, cost, temporaries = time.perf_counter(), None, None
    try:
        compiled, cost = compiled_and_cost(program)
        beyond = beyond_arguments(compiled.memory_analysis(), held)
        temporaries = beyond + held - shared - weights - cache
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = refused_bytes(str(error))
        temporaries = None if asked is None else max(0, asked - weights - cache)
    seconds = time.perf_counter() - start
    tokens = settings.batch * program.tokens
    spread = sum(step_bytes(n, tokens, settings.batch, settings.context) for n in needs)
    floors = (
        *held_bytes(held_weights(program.weights), needs[0], tokens),
        *cache_bytes(program.state, program.cache),
        *(0.0 for _ in jax.tree.leaves(program.rest)),
    )
    step = Step(program.tokens, yields, cost, floors, spread / machine.devices, seconds)
    return step, Memory(weights, cache, temporaries, machine.chip.memory_bytes)


def compiled_and_cost(program: Program) -> tuple[Any, Cost]:
    """Ahead of time; the default device tells kernels which chip they are for."""
    leaf = jax.tree.leaves(program.weights)[0]
    with jax.default_device(leaf.sharding.mesh.devices.flat[0]):
        traced = program.step.trace(*program.arguments)
        compiled = traced.lower().compile()
    text = compiled.as_text()
    assert text, "the compiler gives no text"
    return compiled, account(text, weight_shapes(program.weights), stated(traced.jaxpr.jaxpr))


def weight_shapes(weights: Any) -> WeightShapes:
    """How matrices look when they are gathered whole, one layer of a stack or all."""
    found = set()
    for leaf in jax.tree.leaves(weights):
        kind = hlo_type(str(leaf.dtype))
        for dims in (leaf.shape, leaf.shape[1:]):
            dims = tuple(size for size in dims if size != 1)
            if len(dims) > 1:
                found.add((kind, dims))
    return frozenset(found)

"""The decode step that is planned for, as a traced function of shapes and their shardings."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from dspark_jax.config import DraftConfig, GlmConfig, TargetConfig
from dspark_jax.draft import dspark_draft
from dspark_jax.draft_weights import abstract_drafter
from dspark_jax.loop import Request, Weights, decode_step, init_state, prepare_weights
from dspark_jax.targets.families import make_target
from dspark_jax.targets.weights import shape_of
from dspark_jax.types import DecodeState, Rows, Target

DATA, TENSOR = "data", "tensor"


class Program(NamedTuple):
    """A jitted step and what it is called with: `weights` and `state` are its first arguments.

    All arrays are shapes with shardings. `cache` is the part of the state that remembers tokens.
    """

    step: Any
    weights: Any
    state: Any
    cache: Any
    shared: Any
    """Those of `weights` that are others' memory under a second name."""
    rest: tuple[Any, ...]
    tokens: int
    """That the target sees of every sequence."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.weights, self.state, *self.rest)


def plan_mesh(devices: list[Any], tensor: int) -> Mesh:
    """The devices as data x tensor."""
    import numpy as np

    grid = np.array(devices).reshape(-1, tensor)
    return Mesh(grid, (DATA, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))


def decode_program(
    target_config: TargetConfig,
    draft_config: DraftConfig,
    mesh: Mesh,
    batch: int,
    context: int,
    dtype: Any = jnp.bfloat16,
) -> Program:
    """One speculative round of `batch` sequences with room for `context` tokens each."""
    target, draft = make_target(target_config), dspark_draft(draft_config)

    def load() -> Weights:
        params, drafter = (
            nnx.state(shape_of(target_config), nnx.Param),
            abstract_drafter(draft_config),
        )
        params, drafter = (_zeros(x, dtype) for x in (params, nnx.state(drafter, nnx.Param)))
        return prepare_weights(target, draft, params, drafter, target.frozen(params))

    weights = _weights(mesh, jax.eval_shape(load))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = jax.eval_shape(lambda: init_state(target, draft, _zeros(keys), context, dtype))
    state = _state(mesh, state, target_config)
    row = NamedSharding(mesh, PartitionSpec(DATA))
    per_sequence = partial(_shape, batch, sharding=row)
    request = Request(per_sequence(jnp.int32), per_sequence(jnp.float32), per_sequence(jnp.int32))
    step = jax.jit(partial(decode_step, target, draft), donate_argnums=(1,))
    cache = (state.target_cache, state.draft_cache)
    return Program(
        step, weights, state, cache, weights.frozen, (request,), draft_config.draft_length + 1
    )


def plain_program(
    target_config: TargetConfig,
    mesh: Mesh,
    batch: int,
    context: int,
    dtype: Any = jnp.bfloat16,
) -> Program:
    """One token of every sequence without a draft."""
    target = make_target(target_config)

    def load() -> Any:
        return target.prepare(_zeros(nnx.state(shape_of(target_config), nnx.Param), dtype))

    weights = _weights(mesh, jax.eval_shape(load))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))

    def empty() -> DecodeState:
        cache = target.init_cache(batch, context, dtype)
        zeros = jnp.zeros(batch, jnp.int32)
        return DecodeState(zeros, zeros, jnp.ones(batch, bool), _zeros(keys), (), cache)

    state = _state(mesh, jax.eval_shape(empty), target_config)
    step = jax.jit(partial(plain_step, target), donate_argnums=(1,))
    return Program(step, weights, state, state.target_cache, (), (), 1)


def plain_step(target: Target, weights: Any, state: DecodeState) -> tuple[DecodeState, Any]:
    """The most likely next token of every sequence."""
    rows = Rows(state.anchor[:, None], state.length[:, None])
    cache, states = target.extend(weights, state.target_cache, rows)
    token: Int[Array, "B"] = jnp.argmax(target.logits(weights, states.final_hidden)[:, 0], axis=-1)
    token = token.astype(jnp.int32)
    return state._replace(anchor=token, length=state.length + 1, target_cache=cache), token


def _zeros(tree: Any, dtype: Any = None) -> Any:
    """Arrays of these shapes, inside a trace; floats in `dtype` where it is given."""

    def zero(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype if dtype is None else dtype)

    return jax.tree.map(zero, tree)


def _shape(size: int, dtype: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct((size,), dtype, sharding=sharding)


def _weights(mesh: Mesh, tree: Any) -> Any:
    """The last axis of a matrix that divides evenly lies on the tensor axis; all else is whole."""

    def place(leaf: Any) -> Any:
        axes: list[Any] = [None] * leaf.ndim
        for axis in reversed(range(leaf.ndim) if leaf.ndim > 1 else ()):
            if leaf.shape[axis] % (128 * mesh.shape[TENSOR]) == 0:
                axes[axis] = TENSOR
                break
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
        )

    return jax.tree.map(place, tree)


def _state(mesh: Mesh, state: DecodeState, config: TargetConfig) -> DecodeState:
    """Sequences on the data axis, heads on the tensor axis where they divide evenly."""

    def place(tree: Any, behind: int) -> Any:
        """`behind`: axes after that of the sequences; of three the first is that of heads."""

        def one(leaf: Any) -> Any:
            axes: list[Any] = [*(None,) * (leaf.ndim - behind - 1), DATA]
            if behind == 3 and leaf.shape[-3] % mesh.shape[TENSOR] == 0:
                axes.append(TENSOR)
            spec = PartitionSpec(*axes)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(one, tree)

    return place(state, 0)._replace(
        target_cache=place(state.target_cache, 2 if isinstance(config, GlmConfig) else 3),
        draft_cache=place(state.draft_cache, 3),
    )

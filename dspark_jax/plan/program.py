"""The decode steps that are planned for, as traced functions of shapes and their shardings."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from dspark_jax.config import DraftConfig, TargetConfig
from dspark_jax.draft import dspark_draft
from dspark_jax.draft_weights import abstract_drafter
from dspark_jax.generation import plain_state
from dspark_jax.loop import Request, Weights, decode_step, init_state
from dspark_jax.sampling import largest
from dspark_jax.sharding import tree_shardings
from dspark_jax.spread import over, rows
from dspark_jax.targets.families import make_target
from dspark_jax.targets.load import is_multiplied_out, params_shapes
from dspark_jax.targets.mesh import family
from dspark_jax.types import DecodeState, Frozen, Rows, Target

Block = tuple[int, int]
TYPE = jnp.bfloat16


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


def decode_program(
    target_config: TargetConfig,
    block: Block | None,
    draft_config: DraftConfig,
    mesh: Mesh,
    batch: int,
    context: int,
) -> Program:
    """One speculative round of `batch` sequences with room for `context` tokens each."""
    target, draft = make_target(target_config, mesh), dspark_draft(draft_config, mesh)
    params = target_params(target_config, kept_block(target_config, block, mesh))
    drafter = narrow(nnx.state(abstract_drafter(draft_config), nnx.Param))
    weights = Weights(
        placed(mesh, jax.eval_shape(target.prepare, params), family(target_config)),
        placed(mesh, jax.eval_shape(draft.prepare, drafter), "draft"),
        placed(mesh, frozen_shapes(target, params, draft_config), "draft"),
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = jax.eval_shape(
        partial(init_state, target, draft, capacity=context, dtype=TYPE), keys=keys
    )
    state = state_on(mesh, state, target_config)
    lie = NamedSharding(mesh, rows(over(mesh, batch)))

    def row(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((batch,), dtype, sharding=lie)

    request = Request(row(jnp.int32), row(jnp.float32), row(jnp.int32))
    step = jax.jit(partial(decode_step, target, draft), donate_argnums=1, keep_unused=True)
    cache, width = (state.target_cache, state.draft_cache), draft_config.draft_length + 1
    shared = shared_tables(target_config, draft_config, weights.frozen)
    return Program(step, weights, state, cache, shared, (request,), width)


def plain_program(
    config: TargetConfig, block: Block | None, mesh: Mesh, batch: int, context: int
) -> Program:
    """One token of every sequence without a draft."""
    target = make_target(config, mesh)
    params = target_params(config, kept_block(config, block, mesh))
    prepared = jax.eval_shape(target.prepare, params)
    weights = placed(mesh, prepared, family(config))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = jax.eval_shape(partial(plain_state, target, capacity=context, dtype=TYPE), keys=keys)
    state = state_on(mesh, state, config)
    step = jax.jit(partial(plain_step, target), donate_argnums=1, keep_unused=True)
    return Program(step, weights, state, state.target_cache, (), (), 1)


def plain_step(target: Target, weights: Any, state: DecodeState) -> tuple[DecodeState, Any]:
    """The most likely next token of every sequence."""
    given = Rows(state.anchor[:, None], state.length[:, None])
    cache, states = target.extend(weights, state.target_cache, given)
    token: Int[Array, "B"] = largest(target.logits(weights, states.final_hidden)[:, 0])
    return state._replace(anchor=token, length=state.length + 1, target_cache=cache), token


def frozen_shapes(target: Target, params: Any, draft: DraftConfig) -> Frozen:
    """The tables a draft shares, the head cut to its vocabulary where that is reduced."""
    if draft.draft_vocab_size == draft.vocab_size:
        return jax.eval_shape(target.frozen, params)
    ids = jax.ShapeDtypeStruct((draft.draft_vocab_size,), jnp.int32)
    return jax.eval_shape(target.frozen, params, ids)


def shared_tables(target: TargetConfig, draft: DraftConfig, frozen: Frozen) -> tuple[Any, ...]:
    """Those of a draft's tables that are the target's own memory.

    The head of a reduced vocabulary is a copy, and so is that of a tied table, which is transposed.
    """
    tied = getattr(target, "tie_word_embeddings", False)
    copied = tied or draft.draft_vocab_size < draft.vocab_size
    return (frozen.embed,) if copied else (frozen.embed, frozen.lm_head)


def kept_block(config: TargetConfig, block: Block | None, mesh: Mesh) -> Block | None:
    """The blocks of FP8 in memory: None where loading multiplies a small target out."""
    return None if is_multiplied_out(config, mesh) else block


def target_params(config: TargetConfig, block: Block | None) -> Any:
    """Shapes of a target's parameters as they are loaded, in bfloat16 or FP8."""
    return params_shapes(config, block, TYPE)


def narrow(tree: Any) -> Any:
    """The same shapes in bfloat16."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, TYPE), tree)


def placed(mesh: Mesh, tree: Any, table: Any) -> Any:
    """Shapes with their shardings."""

    def place(leaf: Any, lie: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lie)

    return jax.tree.map(place, tree, tree_shardings(mesh, tree, table))


def state_on(mesh: Mesh, state: DecodeState, config: TargetConfig) -> DecodeState:
    """Sequences are shared out over the groups of devices if they can be, heads within each."""
    row = NamedSharding(mesh, rows(over(mesh, state.keys.shape[0])))
    rest = state._replace(target_cache=(), draft_cache=())
    rest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row), rest)
    return rest._replace(
        target_cache=placed(mesh, state.target_cache, family(config)),
        draft_cache=placed(mesh, state.draft_cache, "draft"),
    )

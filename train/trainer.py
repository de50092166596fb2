"""The training step: states, blocks, loss, gradient and update in one program, on any mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dspark_jax import sharding
from dspark_jax.anchors import sample_blocks
from dspark_jax.config import DraftConfig
from dspark_jax.draft import draft_graphdef, dspark_draft
from dspark_jax.losses import denominator
from dspark_jax.metrics import Metrics, at_least_one, count, pair
from dspark_jax.objective import Outcome, Part, Teacher, batch_loss, teacher_unembed
from dspark_jax.target_folder import LoadedTarget
from dspark_jax.train.devices import Meshes
from dspark_jax.train.hidden_states import HiddenStates
from dspark_jax.train.optimizer import make_optimizer
from dspark_jax.train.settings import TrainSettings
from dspark_jax.types import Batch, Blocks, Draft, Frozen, Target


class TrainState(NamedTuple):
    """What training changes; a step takes one and gives the next. `key` is raw key data."""

    params: Any
    opt_state: Any
    step: Any
    key: Any


class Job(NamedTuple):
    """What a run is made of and a step does not change."""

    settings: TrainSettings
    config: DraftConfig
    target: Target
    draft: Draft
    source: HiddenStates
    meshes: Meshes
    target_params: Any
    frozen: Frozen

    @property
    def mesh(self) -> Mesh:
        """That of the draft's training."""
        return self.meshes.draft


def make_job(
    settings: TrainSettings,
    config: DraftConfig,
    target: Target,
    source: HiddenStates,
    meshes: Meshes,
    loaded: LoadedTarget,
    target_id: np.ndarray,
) -> Job:
    """What a step needs beside its state: the target as it was loaded, and the draft's tables."""
    frozen = frozen_tables(target, config, meshes.draft, loaded.params, target_id)
    draft = dspark_draft(config, meshes.target)
    return Job(settings, config, target, draft, source, meshes, loaded.params, frozen)


def frozen_tables(
    target: Target, config: DraftConfig, mesh: Mesh, params: Any, target_id: np.ndarray
) -> Frozen:
    """The tables a draft shares, cut to a reduced vocabulary, placed on the draft's mesh."""
    full = config.draft_vocab_size == config.vocab_size
    given = (params, None if full else target_id)
    shardings = sharding.tree_shardings(mesh, jax.eval_shape(target.frozen, *given))
    return jax.jit(target.frozen, out_shardings=shardings)(*given)


Objective = Callable[..., tuple[Float[Array, ""], Outcome]]


def make_objective(job: Job) -> Objective:
    """`objective(params, target_params, frozen, batch, fetched, blocks, part)`: loss and outcome.

    Parameters are float32 masters; activations have `compute_dtype`.
    """
    settings, graphdef = job.settings, draft_graphdef(job.config)
    unembed, loss = teacher_unembed(job.target, job.config), settings.loss.config()
    dtype = jnp.dtype(settings.compute_dtype)

    def objective(
        params: Any,
        target_params: Any,
        frozen: Frozen,
        batch: Batch,
        fetched: Any,
        blocks: Blocks,
        part: Part | None = None,
    ) -> tuple[Float[Array, ""], Outcome]:
        states = jax.lax.stop_gradient(job.source.states(target_params, batch, fetched))
        # Every device takes its rows of what its group of the target computed: nothing travels.
        states = jax.lax.with_sharding_constraint(states, sharding.row_sharding(job.mesh))
        drafter = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), params), copy=True)
        teacher = Teacher(target_params, frozen.target_id)
        given = (drafter, frozen, teacher, batch, states, blocks, part)
        remat, shards = settings.gradient_checkpointing, job.mesh.size
        return batch_loss(unembed, job.config, loss, *given, remat=remat, shards=shards)

    return objective


def draw_blocks(job: Job, batch: Batch, key: Any) -> Blocks:
    """The training blocks of a step: batch [A R T] in A parts, blocks [A R N …].

    A row's blocks depend on its own key only, so that parts and devices change nothing.
    """
    keys = jax.random.split(key, batch.tokens.shape[:2])

    def draw(keys: Any, tokens: Any, loss_mask: Any, segment: Any) -> Blocks:
        settings = job.settings
        rule, count = settings.loss.config().rule, settings.max_anchors
        return sample_blocks(keys, tokens, loss_mask, segment, count, job.config, rule)

    return jax.vmap(draw)(keys, batch.tokens, batch.loss_mask, batch.segment)


def coverage(batch: Batch, blocks: Blocks) -> Metrics:
    """The share of the answers' tokens that at least one trained slot starts from."""
    K, T = blocks.label_mask.shape[-1], batch.tokens.shape[1]
    row = (blocks.anchor[..., None] + jnp.arange(K)).reshape(len(batch.tokens), -1)
    trained = blocks.label_mask.reshape(row.shape)
    seen = jax.vmap(lambda r, m: jnp.zeros(T, bool).at[r].max(m))(row, trained)
    return pair("coverage", count(seen), at_least_one(batch.loss_mask))


def init_state(job: Job, params: Any) -> TrainState:
    """The state before the first step, placed on the mesh."""
    optimizer = make_optimizer(job.settings.optimizer, job.settings.steps)
    key = jax.random.key_data(jax.random.key(job.settings.seed))
    params = jax.device_put(params, sharding.tree_shardings(job.mesh, params))

    def build(params: Any, key: Any) -> TrainState:
        return TrainState(params, optimizer.init(params), jnp.int32(0), key)

    shardings = sharding.tree_shardings(job.mesh, jax.eval_shape(build, params, key))
    return jax.jit(build, out_shardings=shardings)(params, key)


def make_gradient(job: Job) -> Callable[..., tuple[Any, Metrics]]:
    """`gradient(params, key, target_params, frozen, batch, fetched) -> (gradient, metrics)`.

    The batch is [A R T]: A parts of R rows. Sums over all parts are divided by what all of them
    hold, so that the result is that of one batch of A·R rows.
    """
    loss = job.settings.loss.config()
    differentiate = jax.grad(make_objective(job), has_aux=True)

    def gradient(
        params: Any, key: Any, target_params: Any, frozen: Frozen, batch: Batch, fetched: Any
    ) -> tuple[Any, Metrics]:
        blocks = draw_blocks(job, batch, key)
        parts = len(batch.tokens)
        part = Part(denominator(blocks.label_mask, job.config, loss), parts)

        def of(piece: Any) -> tuple[Any, Metrics]:
            found, outcome = differentiate(params, target_params, frozen, *piece, part)
            return found, outcome.metrics | coverage(piece[0], piece[2])

        pieces = (batch, fetched, blocks)
        first = jax.tree.map(lambda x: x[0], pieces)
        if parts == 1:
            return of(first)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of, first))

        def add(summed: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, summed, of(piece)), None

        return jax.lax.scan(add, zero, pieces)[0]

    return gradient


def make_step(job: Job) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step(state, target_params, frozen, batch, fetched) -> (state, metrics)`, jitted, donated."""
    gradient = make_gradient(job)
    optimizer = make_optimizer(job.settings.optimizer, job.settings.steps)

    def step(state: TrainState, *given: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        found, metrics = gradient(state.params, key, *given)
        updates, opt_state = optimizer.update(found, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def on_mesh(job: Job, tree: Any) -> Any:
    """A step's host arrays [rows …] as [parts, rows / parts …], rows spread over the mesh."""
    parts = job.settings.accumulate
    rows = sharding.row_sharding(job.mesh, leading=1)

    def place(x: Any) -> Any:
        x = np.asarray(x)
        return sharding.place(x.reshape(parts, len(x) // parts, *x.shape[1:]), rows)

    return jax.tree.map(place, tree)

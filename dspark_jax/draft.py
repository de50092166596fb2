"""A DSpark draft as the loop and the trainer see it: pure functions over its parameters."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dspark_jax import drafter
from dspark_jax.config import DraftConfig
from dspark_jax.drafter import Drafter
from dspark_jax.types import Draft


def split_draft(model: Drafter) -> tuple[Any, Any]:
    """(graphdef, params): the static and the array part of a drafter."""
    return nnx.split(model, nnx.Param)


def draft_graphdef(config: DraftConfig) -> Any:
    """The static part of a drafter of this configuration, without making its arrays."""
    return nnx.split(nnx.eval_shape(lambda: Drafter(config, nnx.Rngs(0))))[0]


def init_draft_params(config: DraftConfig, seed: int) -> Any:
    """Freshly drawn parameters."""
    return nnx.state(Drafter(config, nnx.Rngs(seed)), nnx.Param)


def dspark_draft(config: DraftConfig) -> Draft:
    """The functions of a DSpark draft; with markov_rank 0 it is a DFlash draft."""
    graphdef = draft_graphdef(config)

    def model(params: Any) -> Drafter:
        return nnx.merge(graphdef, params, copy=True)

    return Draft(
        draft_length=config.draft_length,
        init_cache=lambda batch, capacity, dtype=jnp.float32: drafter.init_draft_cache(
            config, batch, capacity, dtype
        ),
        extend_context=lambda params, *rows: drafter.extend_context(model(params), *rows),
        draft_block=lambda params, *rows: drafter.draft_block(model(params), *rows),
    )

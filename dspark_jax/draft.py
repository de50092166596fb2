"""A DSpark draft as the loop and the trainer see it: pure functions over its parameters."""

from functools import partial
from typing import Any

from flax import nnx

from dspark_jax import draft_decoder
from dspark_jax.config import DraftConfig
from dspark_jax.drafter import Drafter
from dspark_jax.types import Draft


def draft_graphdef(config: DraftConfig) -> Any:
    """The static part of a drafter of this configuration, without making its arrays."""
    return nnx.split(nnx.eval_shape(lambda: Drafter(config, nnx.Rngs(0))))[0]


def init_draft_params(config: DraftConfig, seed: int) -> Any:
    """Freshly drawn parameters."""
    return nnx.state(Drafter(config, nnx.Rngs(seed)), nnx.Param)


def dspark_draft(config: DraftConfig) -> Draft:
    """The functions of a DSpark draft; with markov_rank 0 it is a DFlash draft."""
    graphdef = draft_graphdef(config)
    return Draft(
        draft_length=config.draft_length,
        prepare=lambda params: draft_decoder.prepare(nnx.merge(graphdef, params, copy=True)),
        init_cache=partial(draft_decoder.init_draft_cache, config),
        extend_context=partial(draft_decoder.extend_context, config),
        draft_block=partial(draft_decoder.draft_block, config),
    )

"""A DSpark draft as the loop and the trainer see it: pure functions over its parameters."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dspark_jax import draft_decoder, drafting
from dspark_jax.config import DraftConfig
from dspark_jax.drafter import Drafter
from dspark_jax.sharding import TENSOR, page_specs, tree_specs, zeros
from dspark_jax.spread import ALONE, Spread, over, recipe_lies, rows, run
from dspark_jax.types import Draft, Proposal


def draft_graphdef(config: DraftConfig) -> Any:
    """The static part of a drafter of this configuration, without making its arrays."""
    return nnx.split(nnx.eval_shape(lambda: Drafter(config, nnx.Rngs(0))))[0]


def init_draft_params(config: DraftConfig, seed: int) -> Any:
    """Freshly drawn parameters."""
    return nnx.state(Drafter(config, nnx.Rngs(seed)), nnx.Param)


def dspark_draft(
    config: DraftConfig, mesh: Mesh | None = None, candidates: int | None = None
) -> Draft:
    """The functions of a DSpark draft; with markov_rank 0 it is a DFlash draft.

    With a mesh of data x tensor devices they run on all of them, as those of the target do. With
    `candidates` every token is drawn among so many. Raises ValueError when the draft cannot be
    shared or drawn from so.
    """
    check_candidates(config, candidates)
    mesh = None if mesh is None or mesh.size == 1 else mesh
    if mesh is not None:
        check_mesh(config, mesh)
    graphdef = draft_graphdef(config)

    def specs(tree: Any) -> Any:
        return None if mesh is None else tree_specs(mesh, tree, "draft")

    def cache_specs(cache: Any, pages: Any) -> Any:
        if mesh is None or pages is None:
            return specs(cache)
        return page_specs(mesh, cache, "draft")

    def prepare(params: Any) -> Any:
        def part(spread: Spread, params: Any) -> Any:
            drafter = nnx.merge(graphdef, params, copy=True)
            return draft_decoder.prepare(drafter, candidates is not None, spread)

        laid_out = jax.eval_shape(partial(part, ALONE), params)
        spread = over(mesh, 1, False)
        return run(mesh, partial(part, spread), (specs(params),), specs(laid_out), params)

    def init_cache(batch: int, capacity: int, dtype: Any = jnp.float32) -> Any:
        if mesh is None:
            return draft_decoder.init_draft_cache(config, batch, capacity, dtype)
        empty = partial(draft_decoder.init_draft_cache, config, batch, capacity, dtype)
        return zeros(jax.eval_shape(empty), mesh, "draft")

    def extend_context(
        prepared: Any, cache: Any, aux_hidden: Any, position: Any, pages: Any = None
    ) -> Any:
        # In pages, which all groups hold, all groups write all rows.
        spread, held = over(mesh, len(aux_hidden), pages is None), cache_specs(cache, pages)
        ins = (specs(prepared), held, *(rows(spread),) * 3)
        part = partial(draft_decoder.extend_context, config, spread=spread)
        return run(mesh, part, ins, held, prepared, cache, aux_hidden, position, pages)

    def draft_block(
        prepared: Any,
        frozen: Any,
        cache: Any,
        length: Any,
        anchor: Any,
        keys: Any,
        temperature: Any,
        pages: Any = None,
    ) -> Any:
        spread, held = over(mesh, len(length)), cache_specs(cache, pages)
        ins = (specs(prepared), specs(frozen), held, *(rows(spread),) * 5)
        part = partial(drafting.draft_block, config, spread=spread, candidates=candidates)
        given, lie = (length, anchor, keys, temperature, pages), rows(spread)
        told = (prepared, config.draft_length, len(length), spread)
        recipes = mesh is not None and candidates is None and drafting.keeps_recipes(*told)
        parts: Any = {"tokens": lie, "logits": recipe_lies(spread), "confidence": lie}
        outs = Proposal(**parts) if recipes else lie
        return run(mesh, part, ins, outs, prepared, frozen, cache, *given)

    return Draft(
        *(config.draft_length, prepare, init_cache, extend_context, draft_block),
        mesh=mesh,
        candidates=candidates,
    )


def check_candidates(config: DraftConfig, candidates: int | None) -> None:
    """Raise ValueError when a slot's token cannot be drawn among so many."""
    if candidates is None:
        return
    if config.markov_rank == 0:
        raise ValueError(
            f"dspark_draft_topk {candidates} spares a Markov head work, and this draft has no such "
            "head; leave it out."
        )
    if not 1 <= candidates <= config.draft_vocab_size:
        raise ValueError(
            f"dspark_draft_topk {candidates} must be from 1 to the {config.draft_vocab_size} "
            "tokens of the draft's vocabulary; choose another, or leave it out."
        )


def check_mesh(config: DraftConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError when a draft's parts cannot be shared evenly; it names all of them."""
    shared = {
        "hidden columns": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "MLP columns": config.intermediate_size,
        "draft vocabulary rows": config.draft_vocab_size,
    }
    tensor = mesh.shape[TENSOR]
    problems = [f"{size} {what}" for what, size in shared.items() if size % tensor]
    if problems:
        raise ValueError(
            f"{tensor} devices cannot share the draft's {', '.join(problems)} evenly; use another "
            "tensor_parallel."
        )

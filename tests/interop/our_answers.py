"""Our greedy answers to the prompts that vLLM is asked: tokens, accepted drafts, and how sure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dspark_jax.draft import dspark_draft
from dspark_jax.draft_files import load_draft
from dspark_jax.loop import Request, Weights, decode_step, init_state, prefill, prepare_weights
from dspark_jax.loop import verify_rows as rows_to_verify
from dspark_jax.target_folder import find_target, load_target
from dspark_jax.targets.families import make_target
from dspark_jax.train.prompts import pad_prompts, prompt_rows
from dspark_jax.types import DecodeState, Draft, Target


class Answer(NamedTuple):
    """An answer and the drafts accepted in every round; `gap` is the closest of its decisions.

    Counted as vLLM does: the first token comes with the prompt and the first round drafts after it;
    drafts past the last token of the answer are counted too.
    """

    tokens: list[int]
    accepted: list[int]
    gap: float


def top_gap(logits: Float[Array, "B S V"]) -> Float[Array, "B S"]:
    """Distance of the largest logit to the second."""
    best = jax.lax.top_k(logits, 2)[0]
    return best[..., 0] - best[..., 1]


def choice_gap(logits: Float[Array, "B G Vd"], target_id: Any, choice: Any) -> Float[Array, "B G"]:
    """How far the draft is from deciding otherwise about the target's choice: to draft it, or not.

    Infinite where its vocabulary lacks that token.
    """
    same = target_id == choice[..., None]
    chosen = jnp.max(jnp.where(same, logits, -jnp.inf), axis=-1)
    other = jnp.max(jnp.where(same, -jnp.inf, logits), axis=-1)
    return jnp.abs(chosen - other)


def round_and_gap(
    target: Target, draft: Draft, weights: Weights, state: DecodeState, request: Request
) -> Any:
    """(state, tokens, count, gap) of one real round, and the closest decision it took."""
    proposal = draft.draft_block(
        *(weights.draft, weights.frozen, state.draft_cache, state.length, state.anchor),
        *(state.keys, request.temperature),
    )
    rows = rows_to_verify(state, proposal, request.verify_length)
    _, states = target.extend(weights.target, state.target_cache, rows)
    logits = target.logits(weights.target, states.final_hidden)
    state, emitted = decode_step(target, draft, weights, state, request)
    slot, last = jnp.arange(logits.shape[1]), emitted.length[:, None] - 1
    ours = jnp.where(slot <= last, top_gap(logits), jnp.inf)
    choice = jnp.argmax(logits[:, :-1], axis=-1)
    drafted = choice_gap(proposal.logits, weights.frozen.target_id, choice)
    judged = (slot[:-1] <= last) & (slot[:-1] < request.verify_length[:, None])
    gap = jnp.minimum(jnp.min(ours), jnp.min(jnp.where(judged, drafted, jnp.inf)))
    return state, emitted.tokens[0], emitted.length[0], gap


def make_answerer(
    folder: Path, exported: Path, longest_prompt: int, max_tokens: int
) -> Callable[[list[int]], Answer]:
    """What answers a prompt of token ids with an exported draft, in float32, one at a time."""
    config, params, target_id = load_draft(exported, find_target(folder, ()).config)
    loaded = load_target(folder, config.aux_layer_ids)
    target, draft = make_target(loaded.config), dspark_draft(config)
    frozen = target.frozen(loaded.params, jnp.asarray(target_id))
    weights = prepare_weights(target, draft, loaded.params, params, frozen)
    capacity = longest_prompt + max_tokens + draft.draft_length + 1

    @jax.jit
    def start(weights: Weights, tokens: Any, count: Any) -> DecodeState:
        state = init_state(target, draft, jax.random.split(jax.random.key(0), 1), capacity)
        return prefill(target, draft, weights, state, *prompt_rows(tokens, count, capacity))

    @jax.jit
    def round_(weights: Weights, state: DecodeState, length: Any) -> Any:
        request = Request(length[None], jnp.zeros(1), jnp.array([max_tokens]))
        return round_and_gap(target, draft, weights, state, request)

    def answer(prompt: list[int]) -> Answer:
        state = start(weights, *pad_prompts([np.array(prompt)], longest_prompt))
        tokens, accepted, gaps = [], [], []
        while len(tokens) < max_tokens:
            length = jnp.int32(draft.draft_length if tokens else 0)
            state, made, count, gap = round_(weights, state, length)
            if tokens:
                accepted.append(int(count) - 1)
            tokens += made[: int(count)].tolist()
            gaps.append(float(gap))
        return Answer(tokens[:max_tokens], accepted, min(gaps))

    return answer

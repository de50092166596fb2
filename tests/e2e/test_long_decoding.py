"""The embedded target and its shipped draft over 2,000 tokens: short tests see no difference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.draft import dspark_draft
from dspark_jax.draft_files import load_draft
from dspark_jax.generation import Generation, generate, plain_generate, plain_prefill, plain_state
from dspark_jax.loop import Request, init_state, prefill, prepare_weights
from dspark_jax.target_folder import load_target
from dspark_jax.targets.families import make_target
from dspark_jax.train.conversations import prompt_tokens
from dspark_jax.train.divergence import NEAR_TIE, explain
from dspark_jax.train.presets import PRESETS
from dspark_jax.train.prompts import pad_prompts, prompt_rows
from dspark_jax.train.served import first_difference

TOKENS, PROMPT = 2000, 64
CAPACITY = PROMPT + TOKENS + 16
NO_END = jnp.array([-1])


@pytest.mark.slow
def test_two_thousand_greedy_tokens_equal_plain_decoding() -> None:
    loaded = load_target(embedded("tiny-glm"), PRESETS["tiny"].draft.aux_layer_ids)
    config, draft_params, target_id = load_draft(embedded("tiny-glm-dspark"), loaded.config)
    target, draft = make_target(loaded.config), dspark_draft(config)
    full = config.draft_vocab_size == config.vocab_size
    frozen = target.frozen(loaded.params, None if full else jnp.asarray(target_id))
    weights = prepare_weights(target, draft, loaded.params, draft_params, frozen)
    prompt = prompt_tokens(
        loaded.tokenizer, [{"role": "user", "content": 'def add(a, b):\n    """Sum."""'}]
    )
    keys = jax.random.split(jax.random.key(0), 1)
    padded = pad_prompts([prompt], PROMPT)

    def request(length: int) -> Request:
        return Request(jnp.array([length]), jnp.zeros(1), jnp.array([TOKENS]))

    @jax.jit
    def speculative(request: Request) -> Generation:
        state = init_state(target, draft, keys, CAPACITY)
        state = prefill(target, draft, weights, state, *prompt_rows(*padded, CAPACITY))
        return generate(target, draft, weights, state, request, TOKENS, NO_END)[1]

    drafted, plain = speculative(request(draft.draft_length)), speculative(request(0))
    assert int(plain.rounds[0]) == TOKENS and int(drafted.rounds[0]) < TOKENS
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)

    state = plain_prefill(
        target,
        weights.target,
        plain_state(target, keys, CAPACITY),
        *prompt_rows(*padded, CAPACITY),
    )
    run = jax.jit(partial(plain_generate, target), static_argnums=3)
    alone = np.asarray(run(weights.target, state, request(0), TOKENS, NO_END)[1].tokens)[0]
    ours = np.asarray(drafted.tokens)[0]
    if (alone != ours).any():
        place = first_difference(ours.tolist(), alone.tolist())
        width = draft.draft_length + 1
        parting = explain(target, loaded.params, prompt, ours.tolist(), place, width)
        assert parting.margin < NEAR_TIE, f"programs part at token {place}: {parting}"

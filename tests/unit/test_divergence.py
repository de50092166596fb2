"""Two right programs part only at a near tie, and a wrong one is found out."""

import dataclasses

import jax
import numpy as np
import pytest

from dspark_jax.targets.families import init_params, make_target
from dspark_jax.train.divergence import NEAR_TIE, explain
from dspark_jax.train.tiny_glm import TINY_GLM

CONFIG = dataclasses.replace(TINY_GLM, index_topk=16, hidden_size=64, vocab_size=96)
PROMPT = np.arange(5, 25, dtype=np.int32)
ANSWER = np.random.default_rng(0).integers(0, 96, 40).tolist()


def test_without_an_earlier_choice_the_last_one_is_named():
    params = init_params(CONFIG, 0)
    parting = explain(make_target(CONFIG), params, PROMPT, ANSWER, 12, 9)
    assert (parting.token, parting.kind) == (31, "top-two")
    target = make_target(CONFIG)
    tokens = np.concatenate([PROMPT, ANSWER[:12]]).astype(np.int32)[None]
    order = np.arange(tokens.shape[1])[None]
    states = jax.jit(target.forward)(params, tokens, np.ones_like(tokens), order)
    best = np.sort(np.asarray(target.unembed(params, states.final_hidden))[0, -1])[-2:]
    assert parting.margin == pytest.approx(best[1] - best[0], rel=1e-3)


def test_a_wrong_one_token_program_is_no_near_tie():
    params = init_params(CONFIG, 0)
    wrong = make_target(dataclasses.replace(CONFIG, routed_scaling_factor=1.5))
    parting = explain(make_target(CONFIG), params, PROMPT, ANSWER, 12, 9, wrong)
    assert parting.token == len(PROMPT) - 1 and parting.margin > NEAR_TIE

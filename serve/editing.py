"""What a request asks to change in its logits, as arrays for one row of a round."""

from collections import Counter

import numpy as np

from dspark_jax.serve.sequence import Sequence
from dspark_jax.truncation import Edits


def fill(edits: Edits, row: int, sequence: Sequence, ends: frozenset[int]) -> None:
    """Write a sequence's edits into row `row` of arrays that change nothing yet."""
    work, sampling = sequence.work, sequence.work.sampling
    bias, penalty, seen, repetition, allowed = (
        np.asarray(x)
        for x in (edits.bias, edits.penalty, edits.seen, edits.repetition, edits.allowed)
    )
    for token, value in sampling.logit_bias:
        bias[row, token] += value
    if sequence.emitted < work.min_tokens:
        bias[row, [*ends, *work.stop_token_ids]] = -np.inf
    answer = sequence.tokens[len(work.prompt) :]
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, times in Counter(answer).items():
            penalty[row, token] = sampling.presence_penalty + sampling.frequency_penalty * times
    if sampling.repetition_penalty != 1:
        seen[row, sequence.tokens] = True
        repetition[row] = sampling.repetition_penalty
    if sequence.matcher is not None:
        allowed[row] = sequence.matcher.allowed()

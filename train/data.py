"""A run's data: the user's conversations, or prompts the target answers itself; then token rows."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dspark_jax.target_folder import LoadedTarget
from dspark_jax.train.conversations import (
    Example,
    Row,
    Tokenised,
    check_trainable,
    prompt_tokens,
    tokenise_all,
)
from dspark_jax.train.packing import Packed, pack
from dspark_jax.train.regenerate import regenerate
from dspark_jax.train.settings import TrainSettings
from dspark_jax.train.tokenise import Conversation
from dspark_jax.types import Target


class Data(NamedTuple):
    """Rows to train on, rows to measure on, and held-out prompts to serve.

    A row's number, which names its hidden-state file too, counts through `train` and on through
    `held_out`. `sha256` is of all of them: whether a resumed run still has its data. `unasked`
    counts the conversations that began with an answer, `skipped` those of them with no other.
    """

    train: list[Row]
    held_out: list[Row]
    prompts: list[np.ndarray]
    sha256: str
    unasked: int = 0
    skipped: int = 0


def load_data(
    settings: TrainSettings,
    target: Target,
    loaded: LoadedTarget,
    given: list[Example] | None,
    progress: Callable[[int, int, int], None],
) -> Data:
    """Tokenise the `given` conversations of `--data`, or make some.

    `progress(done, total, tokens)` follows the making.

    The last `held_out_share` of given data is held out (speculators' rule), counted in
    conversations, so that no conversation is on both sides; regenerated data holds out prompts from
    source files that the embedded target never trained on.
    """
    source = "the regenerated data" if settings.data is None else str(settings.data)
    if given is None:
        train, held_out = regenerate(settings, target, loaded, progress)
    else:
        cut = min(len(given) - 1, int(len(given) * (1 - settings.held_out_share)))
        if cut < 1:
            raise ValueError(
                f"data {source} has {len(given)} conversation(s), of which held_out_share "
                f"{settings.held_out_share} leaves none to train on; give more, at least two."
            )
        train, held_out = given[:cut], given[cut:]
    rows = []
    for examples, what in ((train, "training"), (held_out, "held-out")):
        what = f"{what} conversations of {source}"
        rows.append(tokenise_all(loaded.tokenizer, examples, what))
        check_trainable(rows[-1], settings.sequence_length - settings.draft.block_size, what)
    prompts = servable(loaded.tokenizer, held_out, settings.prompt_tokens, source)
    prompts = prompts[: settings.keeping.serve_prompts]
    unasked = [e for e in [*train, *held_out] if isinstance(e, Conversation) and e.unasked]
    skipped = sum(all(m["role"] != "assistant" for m in e.messages) for e in unasked)
    return Data(*rows, prompts, fingerprint(rows[0] + rows[1]), len(unasked), skipped)


def held_out_batches(settings: TrainSettings, data: Data) -> Iterator[Packed]:
    """One pass over the held-out rows, whose numbers count on where the training rows end."""
    length, rows = settings.sequence_length, settings.batch_rows
    return pack(data.held_out, length, rows, seed=None, first_row=len(data.train))


def servable(
    tokenizer: Any, held_out: Sequence[Example], longest: int, source: str
) -> list[np.ndarray]:
    """The prompts of at most `longest` tokens; ValueError when there are none."""
    prompts = [p for example in held_out for p in asked(tokenizer, example)]
    if not prompts:
        raise ValueError(
            f"none of {len(held_out)} held-out conversations of {source} has a prompt before its "
            "first answer, so there is nothing to serve; let the last ones begin with a human turn "
            "(rows of input_ids with tokens that are not trained)."
        )
    fit = [p for p in prompts if len(p) <= longest]
    if not fit:
        raise ValueError(
            f"none of {len(held_out)} held-out conversations of {source} has a prompt of at most "
            f"{longest} tokens to serve; raise --prompt-tokens (the shortest has "
            f"{min(map(len, prompts))})."
        )
    return fit


def asked(tokenizer: Any, example: Example) -> list[np.ndarray]:
    """The prompt of an example, if it has one: its first question, or the tokens before its first
    trained one."""
    if isinstance(example, Tokenised):
        before = int(example.loss_mask.argmax())
        return [example.tokens[:before].astype(np.int32)] if before else []
    if all(message["role"] != "user" for message in example.messages):
        return []
    return [prompt_tokens(tokenizer, example.messages, example.tools)]


def fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 over the tokens and masks of rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.tokens).to_bytes(8, "little"))
        digest.update(row.tokens.astype("<i4").tobytes())
        digest.update(row.loss_mask.tobytes())
    return digest.hexdigest()


def describe(data: Data, sequence_length: int) -> str:
    """One line on what is trained on, and on what is left out or cut off by `sequence_length`."""
    rows = data.train
    tokens = sum(len(row.tokens) for row in rows)
    answers = sum(int(row.loss_mask.sum()) for row in rows)
    text = (
        f"data: {len(rows):,} training rows of {tokens:,} tokens, {answers / tokens:.0%} of them "
        f"answers to train on; {len(data.held_out):,} rows held out"
    )
    if data.unasked:
        text += (
            f"; {data.unasked:,} conversations began with an answer, which is left out "
            f"({data.skipped:,} had no other and are skipped)"
        )
    long = [row for row in rows if len(row.tokens) > sequence_length]
    if not long:
        return text
    lost = sum(int(row.loss_mask[sequence_length:].sum()) for row in long)
    return text + (
        f"; --sequence-length {sequence_length} cuts {len(long):,} training rows, which lose "
        f"{lost:,} ({lost / answers:.1%}) of the answer tokens"
    )


def frequent_ids(rows: list[Row], vocab_size: int, draft_vocab_size: int) -> np.ndarray:
    """The draft vocabulary: most frequent trained tokens, ties to the lower id, ascending."""
    count = np.zeros(vocab_size, np.int64)
    for row in rows:
        np.add.at(count, row.tokens[row.loss_mask], 1)
    order = np.lexsort((np.arange(vocab_size), -count))
    return np.sort(order[:draft_vocab_size]).astype(np.int32)

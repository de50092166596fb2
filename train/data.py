"""A run's data: the user's conversations, or prompts the target answers itself; then token rows."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dspark_jax.train.conversations import (
    Messages,
    Row,
    check_trainable,
    prompt_tokens,
    read_conversations,
    tokenise_all,
    write_conversations,
)
from dspark_jax.train.files import LoadedTarget, target_fingerprint, tokenizer_fingerprint
from dspark_jax.train.prompts import answer, fitting, library_prompts
from dspark_jax.train.settings import TrainSettings
from dspark_jax.types import Target

ANSWER_BATCH = 64


class Data(NamedTuple):
    """Rows to train on, rows to measure on, and held-out prompts to serve."""

    train: list[Row]
    held_out: list[Row]
    prompts: list[np.ndarray]


def load_data(
    settings: TrainSettings,
    target: Target,
    loaded: LoadedTarget,
    given: list[Messages] | None,
    progress: Callable[[int, int, int], None],
) -> Data:
    """Tokenise the `given` conversations of `--data`, or make some.

    `progress(done, total, tokens)` follows the making.

    The last `held_out_share` of given data is held out (speculators' rule); regenerated data holds
    out prompts from source files that the embedded target never trained on.
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
    rows = tokenise_all(loaded.tokenizer, train + held_out, source)
    tokenised = Data(rows[: len(train)], rows[len(train) :], [])
    room = settings.sequence_length - settings.draft.block_size
    check_trainable(tokenised.train, room, f"training conversations of {source}")
    check_trainable(tokenised.held_out, room, f"held-out conversations of {source}")
    asked = [m for m in held_out if any(turn["role"] == "user" for turn in m)]
    prompts = [prompt_tokens(loaded.tokenizer, m) for m in asked]
    prompts = [p for p in prompts if len(p) <= settings.prompt_tokens]
    if not prompts:
        raise ValueError(
            f"none of {len(held_out)} held-out conversations of {source} has a prompt of at most "
            f"{settings.prompt_tokens} tokens to serve; raise --prompt-tokens."
        )
    return tokenised._replace(prompts=prompts[: settings.serve_prompts])


def regenerate(
    settings: TrainSettings,
    target: Target,
    loaded: LoadedTarget,
    progress: Callable[[int, int, int], None],
) -> tuple[list[Messages], list[Messages]]:
    """Conversations answered by the target, written to OUTPUT/data and reused when they match."""
    folder = settings.output / "data"
    recipe = {
        "target_sha256": target_fingerprint(loaded.folder),
        "tokenizer_sha256": tokenizer_fingerprint(loaded.tokenizer),
        "conversations": settings.conversations,
        "prompt_tokens": settings.prompt_tokens,
        "answer_tokens": settings.answer_tokens,
        "seed": settings.seed,
    }
    files = [folder / "train.jsonl", folder / "held_out.jsonl"]
    stamp = folder / "recipe.json"
    if stamp.exists() and json.loads(stamp.read_text()) == recipe:
        return read_conversations(files[0]), read_conversations(files[1])
    stamp.unlink(missing_ok=True)
    prompts = library_prompts(settings.seed)
    kept = max(ANSWER_BATCH, settings.conversations // 8)
    fit = partial(fitting, loaded.tokenizer, longest_prompt=settings.prompt_tokens)
    wanted = {
        files[0]: fit(prompts.train, wanted=settings.conversations),
        files[1]: fit(prompts.held_out, wanted=kept),
    }
    total, done, made_tokens = sum(map(len, wanted.values())), 0, 0

    def count(answers: int, tokens: int) -> None:
        nonlocal done, made_tokens
        done, made_tokens = done + answers, made_tokens + tokens
        progress(done, total, made_tokens)

    made = []
    for path, texts in wanted.items():
        conversations = answer(
            target,
            loaded.params,
            loaded.tokenizer,
            texts,
            settings.prompt_tokens,
            settings.answer_tokens,
            loaded.ends,
            ANSWER_BATCH,
            settings.seed,
            count,
        )
        write_conversations(path, conversations)
        made.append(conversations)
    stamp.write_text(json.dumps(recipe, indent=1) + "\n")
    return made[0], made[1]


def frequent_ids(rows: list[Row], vocab_size: int, draft_vocab_size: int) -> np.ndarray:
    """The draft vocabulary: most frequent trained tokens, ties to the lower id, ascending."""
    count = np.zeros(vocab_size, np.int64)
    for row in rows:
        np.add.at(count, row.tokens[row.loss_mask], 1)
    order = np.lexsort((np.arange(vocab_size), -count))
    return np.sort(order[:draft_vocab_size]).astype(np.int32)


def check_output(path: Path) -> None:
    """Make the output folder; ValueError when that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {path} cannot be made: {error}.") from error

"""Conversations answered by the target itself, in OUTPUT/data; what a stopped run made is kept."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from dspark_jax.hosts import from_first, leading, together
from dspark_jax.target_folder import LoadedTarget, target_fingerprint, tokenizer_fingerprint
from dspark_jax.train.conversations import Example, Messages, conversation_line, read_conversations
from dspark_jax.train.prompts import answers, fitting, library_prompts
from dspark_jax.train.settings import TrainSettings
from dspark_jax.types import Target

BATCH = 64


def regenerate(
    settings: TrainSettings,
    target: Target,
    loaded: LoadedTarget,
    progress: Callable[[int, int, int], None],
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) conversations; those of the same recipe are used again.

    Where the library has fewer prompts than training asks for, they are answered again.
    `progress(done, total, tokens made now)` follows the making.
    """
    folder = settings.output / "data"
    recipe = {
        "target_sha256": target_fingerprint(loaded.folder),
        "tokenizer_sha256": tokenizer_fingerprint(loaded.tokenizer),
        "conversations": settings.conversations,
        "prompt_tokens": settings.prompt_tokens,
        "answer_tokens": settings.answer_tokens,
        "seed": settings.seed,
        "compute_dtype": settings.compute_dtype,
    }
    files = [folder / "train.jsonl", folder / "held_out.jsonl"]
    if not from_first(lambda: begin(folder, recipe, files)):
        prompts = library_prompts(settings.seed)
        fit = partial(fitting, loaded.tokenizer, longest_prompt=settings.prompt_tokens)
        kept = max(BATCH, settings.conversations // 8)
        train = fit(prompts.train, wanted=settings.conversations)
        again = -(-settings.conversations // len(train)) if train else 1
        wanted = [(train * again)[: settings.conversations], fit(prompts.held_out, wanted=kept)]
        make = partial(answers, target, loaded.params, loaded.tokenizer)
        sizes = (settings.prompt_tokens, settings.answer_tokens, loaded.ends, BATCH)
        sizes = (*sizes, settings.seed, settings.compute_dtype)
        total, done, made = sum(map(len, wanted)), 0, 0
        for path, texts in zip(files, wanted, strict=True):
            for count, tokens in complete(path, texts, partial(make, texts, *sizes)):
                done, made = done + count, made + tokens
                progress(done, total, made)
    return together(lambda: (read_conversations(files[0]), read_conversations(files[1])))


def begin(folder: Path, recipe: dict[str, Any], files: Sequence[Path]) -> bool:
    """Keep what was made by this recipe, else begin anew; whether all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "recipe.json"
    if stamp.exists() and json.loads(stamp.read_text()) == recipe:
        return all(path.exists() for path in files)
    stamp.unlink(missing_ok=True)
    for path in files:
        path.unlink(missing_ok=True)
        unfinished(path).unlink(missing_ok=True)
    partial_stamp = unfinished(stamp)
    partial_stamp.write_text(json.dumps(recipe, indent=1) + "\n")
    os.replace(partial_stamp, stamp)
    return False


def complete(
    path: Path, texts: Sequence[str], make: Callable[..., Iterator[tuple[list[Messages], int]]]
) -> Iterator[tuple[int, int]]:
    """Answer what is missing in a file, batch by batch; yields (conversations, tokens made).

    All processes compute the same answers, the first one writes them.
    """
    partial_path = unfinished(path)
    finished = from_first(path.exists)
    kept = len(texts) if finished else from_first(lambda: keep_whole_batches(partial_path))
    yield kept, 0
    if finished:
        return
    writer = partial_path.open("a", encoding="utf-8") if leading() else nullcontext()
    with writer as file:
        for conversations, tokens in make(first=kept):
            if file is not None:
                file.writelines(map(conversation_line, conversations))
                file.flush()
            yield len(conversations), tokens
    from_first(lambda: os.replace(partial_path, path))


def keep_whole_batches(path: Path) -> int:
    """Cut an unfinished file off after its last whole batch; the number of conversations left.

    Nothing kept is written again, so that a run killed here loses none of it.
    """
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        lines = [len(line) for line in file if line.endswith(b"\n")]
        kept = len(lines) // BATCH * BATCH
        file.truncate(sum(lines[:kept]))
    return kept


def unfinished(path: Path) -> Path:
    """Where a file is while it is written."""
    return path.with_name(path.name + ".partial")

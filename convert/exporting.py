"""`export`: a trained or imported draft, written in a published format with its card."""

import re
from dataclasses import replace
from typing import Any

import numpy as np

from dspark_jax import calibration_file
from dspark_jax.convert.card import card
from dspark_jax.convert.engines import ENGINES, obstacles
from dspark_jax.convert.files import appearing, check_free, write_json, write_tensors
from dspark_jax.convert.run_record import RunRecord, run_record, target_folder, target_tables
from dspark_jax.convert.settings import Export
from dspark_jax.convert.source import Opened, checked, open_checkpoint, read_object, stored_type
from dspark_jax.convert.tensors import Outgoing, chosen_rows, converted, copied, made
from dspark_jax.draft_formats.formats import look, read, written
from dspark_jax.draft_weights import NOT_TRAINED

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
RUN_CONFIG = "run_config.json"
CARD = "README.md"


def export_draft(given: Export) -> str:
    """Write config.json, tensors, card and the run's settings; returns what to say.

    Raises ValueError when the draft cannot be served or is none, OSError when it cannot be written.
    """
    check_free(given.output)
    if not HUB_ID.fullmatch(given.target_name) or ".." in given.target_name:
        raise ValueError(
            f"--target-name {given.target_name} is no hub id; give ORG/MODEL, because vLLM finds "
            "the target of a draft by that name."
        )
    opened = open_checkpoint(str(given.checkpoint))
    reading = read(opened.described)
    if reading.kind != "speculators":
        raise ValueError(
            f"{given.checkpoint} is a draft in {reading.kind} format, not a run's; import it first."
        )
    ids = checked(opened, reading)
    config = reading.said.config
    reasons = obstacles(given.engine, given.format, config)
    if reasons and not given.allow_unservable:
        raise ValueError(
            f"{ENGINES[given.engine]} cannot serve this draft: {'; '.join(reasons)}; give "
            "--allow-unservable to write it all the same."
        )
    record = run_record(opened.folder)
    extras, note = tables(given, opened, record, ids)
    depth, architectures = about_target(given, opened, record)
    said = replace(
        reading.said,
        target_name=given.target_name,
        target_architectures=reading.said.target_architectures or architectures,
        num_target_layers=depth,
        dtype=str(stored_type(opened)),
    )
    described = written(given.format, said, opened.source)
    trained = [copied(t) for name, t in opened.stored.items() if name not in NOT_TRAINED]
    with appearing(given.output) as folder:
        write_json(folder / "config.json", described)
        write_json(folder / RUN_CONFIG, record.settings or imported_from(opened))
        (folder / CARD).write_text(card(given, said, record, trained, extras))
        write_tensors(folder, [*trained, *extras])
        calibration_file.carry(opened.folder, folder, config.draft_length)
    return f"exported {given.checkpoint} to {given.output} ({given.format}).{note}"


def imported_from(opened: Opened) -> dict[str, Any]:
    """In place of a run's settings: where the draft came from."""
    if opened.source is None:
        return {"checkpoint": str(opened.folder)}
    return {"imported_from": opened.source[0], "config": opened.source[1]}


def restores(given: Export, opened: Opened) -> bool:
    """Whether the draft goes back to the format it came from."""
    return opened.source is not None and opened.source[0] == given.format


def tables(
    given: Export, opened: Opened, record: RunRecord, ids: np.ndarray
) -> tuple[list[Outgoing], str]:
    """What the format holds beside the draft's own parameters, and what to say about it.

    Raises ValueError when a reduced vocabulary's head is nowhere to be found.
    """
    if restores(given, opened):
        return [copied(t) for name, t in opened.stored.items() if name in NOT_TRAINED], ""
    config = look(opened.described).said.config
    reduced = config.draft_vocab_size < config.vocab_size
    wanted = ["lm_head.weight"] if reduced else []
    if given.format == "deepspec":
        wanted = ["embed_tokens.weight", "lm_head.weight"]
    found = [copied(opened.stored[name]) for name in wanted if name in opened.stored]
    missing = [name for name in wanted if name not in opened.stored]
    target = target_folder(given.target, record.settings) if missing else None
    if "lm_head.weight" in missing and target is None and reduced:
        raise ValueError(
            f"a draft of {config.draft_vocab_size} of {config.vocab_size} tokens needs its rows of "
            "the target's head, and engines cannot make them; give the target with --target."
        )
    dtype, note = stored_type(opened), ""
    if target is not None:
        stored = target_tables(target, config)
        for name in missing:
            rows = reduced and name == "lm_head.weight"
            tensor = stored[name]
            one = chosen_rows(tensor, name, ids.tolist(), dtype) if rows else None
            found.append(one or converted(tensor, name, dtype))
    elif missing:
        note = (
            "\nwithout the target's embedding and head, which engines take from the target; give "
            "--target to write them too."
        )
    return found + (vocabulary_map(ids, config.vocab_size) if reduced else []), note


def vocabulary_map(ids: np.ndarray, vocab_size: int) -> list[Outgoing]:
    """d2t, offsets in 64 bits, and t2d."""
    chosen = np.zeros(vocab_size, bool)
    chosen[ids] = True
    return [made("d2t", ids.astype(np.int64) - np.arange(len(ids))), made("t2d", chosen)]


def about_target(
    given: Export, opened: Opened, record: RunRecord
) -> tuple[int | None, tuple[str, ...]]:
    """The target's depth and architectures, where they are known."""
    depth = None if opened.source is None else look(opened.source[1]).said.num_target_layers
    target = target_folder(given.target, record.settings)
    if target is None or not (target / "config.json").is_file():
        return depth, ()
    described = read_object(target / "config.json")
    layers, names = described.get("num_hidden_layers"), described.get("architectures")
    if depth is None and type(layers) is int:
        depth = layers
    return depth, tuple(map(str, names)) if isinstance(names, list) else ()

"""`import`: a published draft, made a folder that trains, serves and exports."""

import shlex
from dataclasses import replace

import numpy as np
from flax import nnx

from dspark_jax import calibration_file
from dspark_jax.config import DraftConfig
from dspark_jax.convert.files import appearing, check_free, write_json, write_tensors
from dspark_jax.convert.settings import Import
from dspark_jax.convert.source import IMPORTED, checked, open_checkpoint, stored_type
from dspark_jax.convert.tensors import copied, made
from dspark_jax.draft_formats import speculators
from dspark_jax.draft_formats.formats import DFLASH_KINDS, read
from dspark_jax.draft_formats.keys import write
from dspark_jax.draft_weights import HEADS, drawn_heads


def import_draft(given: Import) -> str:
    """Write config.json in our own terms, what was read beside it, and every tensor bit for bit.

    Returns what to say. Raises ValueError naming whatever of the source is not understood, OSError
    when the output cannot be written.
    """
    check_free(given.output)
    opened = open_checkpoint(given.source)
    reading = read(opened.described)
    checked(opened, reading)
    dtype = stored_type(opened)
    config, heads = reading.said.config, {}
    if reading.kind in DFLASH_KINDS:
        config = with_heads(config, given)
        heads = drawn_heads(config, HEADS, nnx.Rngs(given.seed))
    said = replace(
        reading.said,
        config=config,
        dtype=str(dtype),
        target_name=given.target_name or reading.said.target_name,
    )
    record = {"format": reading.kind, "source": given.source, "config": opened.described}
    tensors = [copied(stored) for stored in opened.stored.values()]
    tensors += [made(name, np.asarray(value).astype(dtype)) for name, value in heads.items()]
    with appearing(given.output) as folder:
        write_json(folder / "config.json", write(speculators.TABLE, said))
        write_json(folder / IMPORTED, record)
        write_tensors(folder, tensors)
        if not heads:  # those drawn afresh say something else
            calibration_file.carry(opened.folder, folder, config.draft_length)
    drawn = f"; drawn afresh: {', '.join(heads)}" if heads else ""
    notes = "".join(f"\n{note}." for note in reading.notes)
    command = ["python", "-m", "dspark_jax.train", "--warm-start", str(given.output)]
    command += ["--target", said.target_name or "TARGET", "--output", "OUTPUT"]
    return (
        f"imported {given.source} ({reading.kind}) to {given.output}{drawn}.{notes}\n"
        f"to train on: {shlex.join([*command, *training_flags(config)])}"
    )


def with_heads(config: DraftConfig, given: Import) -> DraftConfig:
    """A DFlash draft's settings with the heads that were asked for."""
    return replace(
        config,
        markov_rank=given.markov_rank,
        markov_head_type=given.markov_head_type,
        enable_confidence_head=given.confidence_head,
        confidence_head_with_markov=given.confidence_head and given.markov_rank > 0,
    )


def training_flags(config: DraftConfig) -> list[str]:
    """The trainer's flags for a draft of these settings."""

    def switch(name: str, on: bool) -> str:
        return f"--{name}" if on else f"--no-{name}"

    values = {
        "aux-layer-ids": config.aux_layer_ids,
        "num-layers": config.num_hidden_layers,
        "block-size": config.block_size,
        "markov-rank": config.markov_rank,
        "markov-head-type": config.markov_head_type,
        "draft-vocab-size": config.draft_vocab_size,
        "intermediate-size": config.intermediate_size,
        "num-attention-heads": config.num_attention_heads,
        "num-key-value-heads": config.num_key_value_heads,
        "head-dim": config.head_dim,
        "layer-types": config.layer_types,
        "sliding-window": config.sliding_window,
        "mask-token-id": config.mask_token_id,
        "rope-theta": config.rope_theta,
        "rms-norm-eps": config.rms_norm_eps,
    }
    words = [
        word
        for name, value in values.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))
    ]
    return [
        *words,
        switch("sample-from-anchor", config.sample_from_anchor),
        switch("sliding-window-non-causal", config.sliding_window_non_causal),
        switch("confidence-head", config.enable_confidence_head),
        switch("confidence-head-with-markov", config.confidence_head_with_markov),
    ]

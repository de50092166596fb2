"""A draft under examination: its files read leniently, and run under any reading of them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.checkpoints.header import Stored
from dspark_jax.config import DraftConfig
from dspark_jax.convert.evidence import Evidence
from dspark_jax.convert.readings import Known, Reading, Vocabulary
from dspark_jax.convert.scoring import Way, survivals
from dspark_jax.convert.source import Opened, check_stored, open_checkpoint
from dspark_jax.draft_files import whole
from dspark_jax.draft_formats import formats
from dspark_jax.draft_weights import NOT_TRAINED, abstract_drafter, params_from_tensors
from dspark_jax.drafter import NO_WINDOW
from dspark_jax.layers import rms_norm
from dspark_jax.stack import members
from dspark_jax.types import Frozen

HEAD = "lm_head.weight"


class Patient(NamedTuple):
    """A draft: what its config.json says, its parameters, and what its weights look like.

    `maps` are the target tokens of its draft tokens, by how its files may be understood; `head` is
    its own head where its vocabulary is reduced and it has one.
    """

    opened: Opened
    told: formats.Reading
    params: Any
    maps: Mapping[Vocabulary, np.ndarray]
    head: np.ndarray | None
    faults: tuple[str, ...]

    @property
    def config(self) -> DraftConfig:
        return self.told.said.config

    def as_configured(self) -> Reading:
        """The reading that its files ask for."""
        return Reading(self.config)

    def known(self, evidence: Evidence) -> Known:
        """What the likely mistakes depend on."""
        config, tokenizer = evidence.loaded.config, evidence.loaded.tokenizer
        spare = len(tokenizer) if len(tokenizer) < config.vocab_size else None
        masks = (tokenizer.mask_token_id, spare, tokenizer.pad_token_id)
        layer = self.opened.described.get("transformer_layer_config") or self.opened.described
        window = layer.get("sliding_window") if isinstance(layer, dict) else None
        return Known(
            depth=config.num_hidden_layers,
            thetas=(config.rope_theta,),
            masks=tuple(dict.fromkeys(m for m in masks if m is not None)),
            vocabularies=tuple(self.maps),
            written_window=window if type(window) is int and window > 0 else None,
            longest_context=evidence.longest_context,
        )


def open_patient(name: str) -> Patient:
    """A draft's files; ValueError when they are none or their tensors are not those of a draft."""
    opened = open_checkpoint(name)
    told = formats.look(opened.described)
    check_stored(opened, told)
    tensors = {name: whole(t) for name, t in opened.stored.items() if name not in NOT_TRAINED}
    wide = {name: value.astype(np.float32) for name, value in tensors.items()}
    config = told.said.config
    reduced = config.draft_vocab_size < config.vocab_size
    head = (
        whole(opened.stored[HEAD]).astype(np.float32) if reduced and HEAD in opened.stored else None
    )
    params = nnx.state(params_from_tensors(config, wide), nnx.Param)
    maps = dict(vocabulary_maps(opened.stored, config))
    return Patient(opened, told, params, maps, head, tuple(faults(wide)))


def vocabulary_maps(
    stored: Mapping[str, Stored], config: DraftConfig
) -> Iterator[tuple[Vocabulary, np.ndarray]]:
    """The target token of every draft token as engines read d2t, and every other way to tell it.

    To engines a draft token beyond the target's vocabulary, or without a d2t, has none: -1.
    """
    place = np.arange(config.draft_vocab_size)
    if config.draft_vocab_size == config.vocab_size:
        yield "offsets", place
        return
    offsets = whole(stored["d2t"]).astype(np.int64) if "d2t" in stored else np.full_like(place, -1)
    usual = place + offsets if "d2t" in stored else offsets
    usual = np.where((usual >= 0) & (usual < config.vocab_size), usual, -1)
    yield "offsets", usual
    chosen = whole(stored["t2d"]).astype(bool).nonzero()[0] if "t2d" in stored else place
    others: dict[Vocabulary, np.ndarray] = {"ids": offsets, "t2d": chosen, "first": place}
    seen = [usual]
    for name, ids in others.items():
        distinct = len(np.unique(ids)) == len(place)
        inside = distinct and ids.min() >= 0 and ids.max() < config.vocab_size
        if inside and not any(np.array_equal(ids, other) for other in seen):
            seen.append(ids)
            yield name, ids


def faults(tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Weights that no trained draft has."""
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            yield f"{name} holds numbers that are NaN or infinite"
        elif not value.any() and not name.endswith("bias"):
            yield f"{name} is zero everywhere"
        elif name.endswith("norm.weight") and len(value) > 1 and (value == 1).all():
            yield f"{name} is one everywhere, as before training"


def survived(patient: Patient, evidence: Evidence, reading: Reading) -> np.ndarray:
    """[B, N, K]: whether draft i of every block, and all before it, is the target's own token."""
    frozen = evidence.frozen
    if patient.config.draft_vocab_size < patient.config.vocab_size:
        ids = jnp.asarray(patient.maps[reading.vocabulary])
        head = frozen.lm_head[:, ids] if patient.head is None else jnp.asarray(patient.head.T)
        frozen = Frozen(frozen.embed, head, ids)
    params = run_as(patient, reading)
    sizes = neutral(patient.config)
    return np.asarray(survivals(sizes, params, frozen, evidence.text, way(evidence, reading)))


def neutral(config: DraftConfig) -> DraftConfig:
    """A draft's sizes alone, so that every reading of it runs the same program."""
    return replace(
        config,
        aux_layer_ids=tuple(range(len(config.aux_layer_ids))),
        layer_types=(),
        mask_token_id=0,
        max_position_embeddings=0,
        rope_theta=1.0,
        sample_from_anchor=True,
        sliding_window=0,
        sliding_window_non_causal=False,
    )


def way(evidence: Evidence, reading: Reading) -> Way:
    """A reading as the program takes it."""
    config, target = reading.config, evidence.loaded.config
    pieces = []
    for layer in config.aux_layer_ids:
        state = evidence.states[:, :, evidence.layers.index(layer)]
        if layer == target.num_hidden_layers and reading.last_normed:
            state = rms_norm(state, evidence.last_norm, target.rms_norm_eps)
        pieces.append(state)
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    return Way(
        aux=jnp.concatenate(pieces, axis=-1),
        rate=jnp.asarray(1.0 / config.rope_theta**pairs, jnp.float32),
        window=jnp.array([NO_WINDOW if w is None else w for w in config.windows]),
        causal=jnp.array(config.causal),
        mask_token=jnp.array(config.mask_token_id),
        from_anchor=jnp.array(config.sample_from_anchor),
        normed=jnp.array(reading.normed),
        sighted=jnp.array("context" not in reading.without),
    )


def run_as(patient: Patient, reading: Reading) -> Any:
    """The parameters under a reading: pairs of rotary columns moved, parts switched off.

    Neighbouring pairs turned together are half-split ones of columns in the order [evens | odds].
    """
    if not reading.interleaved and not reading.without:
        return patient.params
    dim, flat = patient.config.head_dim, dict(nnx.to_flat_state(patient.params))
    order = np.r_[0:dim:2, 1:dim:2]
    off = {part.removeprefix("layer ") for part in reading.without}
    layers = {(g, m): [] for g, m, _, _ in members(_groups(patient))}
    for g, m, repeat, number in members(_groups(patient)):
        if str(number) in off:
            layers[g, m].append(0 if repeat is None else repeat)

    def of(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        if reading.interleaved and path[-2] in ("q_proj", "k_proj", "q_norm", "k_norm"):
            value = value.reshape(*value.shape[:-1], -1, dim)[..., order].reshape(value.shape)
        gone = layers.get(tuple(path[1:3]), []) if path[0] == "layers" else []
        if path[-2] in ("o_proj", "down_proj") and gone:
            stacked = value.ndim == 3
            value = value.at[np.array(gone)].set(0) if stacked else jnp.zeros_like(value)
        if "Markov head" in off and path[0] == "markov_head" and path[-2] == "markov_w2":
            value = jnp.zeros_like(value)
        return value

    return nnx.from_flat_state(
        [(path, param.replace(of(path, param[...]))) for path, param in flat.items()]
    )


def _groups(patient: Patient) -> Any:
    return abstract_drafter(patient.config).groups

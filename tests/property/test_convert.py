"""Conversions lose nothing: every round trip is the identity, in tensors and in config.json."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.flax import save_file

from dspark_jax import calibration_file
from dspark_jax.calibrate import Calibration
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.config import DraftConfig
from dspark_jax.convert.exporting import export_draft
from dspark_jax.convert.importing import import_draft
from dspark_jax.convert.settings import Export, Import
from dspark_jax.draft_files import whole
from dspark_jax.draft_formats import formats
from dspark_jax.draft_formats.formats import FormatName
from dspark_jax.draft_formats.speculators import config_to_json
from dspark_jax.draft_weights import parameter_table

NAME = "org/target"
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""A failing example is small already, and shrinking it takes minutes."""


class Draft(NamedTuple):
    """A draft's settings, and what its tensors are drawn from."""

    config: DraftConfig
    seed: int


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    """Drafts of every head, layout, vocabulary and attention, of all sizes that are small."""

    def size(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    layers, kv, V = size(1, 3), size(1, 2), size(5, 24)
    kinds = st.sampled_from(("full_attention", "sliding_attention"))
    rank, confident = size(0, 3), draw(st.booleans())
    config = DraftConfig(
        vocab_size=V,
        draft_vocab_size=V if draw(st.booleans()) else size(1, V),
        hidden_size=size(1, 6),
        intermediate_size=size(1, 5),
        num_hidden_layers=layers,
        num_attention_heads=kv * size(1, 2),
        num_key_value_heads=kv,
        head_dim=2 * size(1, 2),
        aux_layer_ids=tuple(sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=3)))),
        mask_token_id=size(0, V - 1),
        block_size=size(2, 8),
        sample_from_anchor=draw(st.booleans()),
        layer_types=tuple(draw(st.tuples(*[kinds] * layers))),
        sliding_window=size(1, 9),
        sliding_window_non_causal=False,
        markov_rank=rank,
        markov_head_type=draw(st.sampled_from(("vanilla", "gated", "rnn"))),
        enable_confidence_head=confident,
        confidence_head_with_markov=confident and rank > 0 and draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from((1e-5, 1e-6))),
        rope_theta=float(draw(st.sampled_from((1e4, 8e6)))),
        max_position_embeddings=size(1, 99),
    )
    if "sliding_attention" not in config.layer_types:
        # A window that no layer has is not written.
        config = DraftConfig(**{**config.__dict__, "sliding_window": 2048})
    return Draft(config, size(0, 99))


def run_of(draft: Draft, folder: Path) -> Path:
    """A run's draft folder as the trainer leaves it, and its target beside it."""
    config = draft.config
    rng = np.random.default_rng(draft.seed)

    def drawn(shape: tuple[int, ...]) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    tensors = {row.name: drawn(row.shape) for row in parameter_table(config)}
    if config.draft_vocab_size < config.vocab_size:
        ids = np.sort(rng.permutation(config.vocab_size)[: config.draft_vocab_size])
        tensors["d2t"] = jnp.asarray(ids - np.arange(len(ids)), jnp.int32)
        tensors["t2d"] = jnp.asarray(np.isin(np.arange(config.vocab_size), ids))
    (folder / "run").mkdir(parents=True)
    described = config_to_json(config, "target", ["Qwen3ForCausalLM"], "bfloat16")
    (folder / "run" / "config.json").write_text(json.dumps(described))
    save_file(tensors, folder / "run" / "model.safetensors")
    (folder / "target").mkdir()
    table = (config.vocab_size, config.hidden_size)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    save_file({n: drawn(table) for n in names}, folder / "target" / "model.safetensors")
    if config.enable_confidence_head:
        temperatures = rng.uniform(0.5, 2, config.draft_length)
        calibration_file.write(
            folder / "run", Calibration(temperatures, temperatures, temperatures, 9)
        )
    about = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 12}
    (folder / "target" / "config.json").write_text(json.dumps(about))
    return folder / "run"


def exported(run: Path, output: Path, name: FormatName) -> Path:
    """The draft in a format, servable or not."""
    target = str(run.parent / "target") if (run.parent / "target").is_dir() else None
    export_draft(Export(run, output, NAME, name, allow_unservable=True, target=target))
    return output


def imported(source: Path, output: Path) -> Path:
    """The draft as a run."""
    import_draft(Import(str(source), output))
    return output


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def bits(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor."""
    values = {name: whole(stored) for name, stored in stored_tensors(folder).items()}
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in values.items()}


def calibration(folder: Path) -> bytes | None:
    path = folder / calibration_file.NAME
    return path.read_bytes() if path.exists() else None


@contextmanager
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("name", get_args(FormatName))
@settings(max_examples=5, deadline=None, phases=PHASES)
@given(draft=drafts())
def test_what_is_exported_is_imported_unchanged(name: FormatName, draft: Draft):
    with folder() as place:
        run = run_of(draft, place)
        first = exported(run, place / "first", name)
        again = imported(first, place / "again")
        assert formats.read(config_of(again)).said.config == draft.config
        found, ours = bits(again), bits(run)
        ours.pop("d2t", None)  # 64 bits in every format, as our trainer's 32 hold as well
        assert {n: found[n] for n in ours} == ours
        assert calibration(again) == calibration(first) == calibration(run)
        assert (calibration(run) is not None) == draft.config.enable_confidence_head
        second = exported(again, place / "second", name)
        assert (config_of(second), bits(second)) == (config_of(first), bits(first))
        (again / "imported.json").unlink()  # written from the settings alone
        third = exported(again, place / "third", name)
        assert config_of(third).keys() >= config_of(first).keys() - {"num_target_layers"}
        told = [formats.read(config_of(one)).said.config for one in (first, third)]
        assert told[0] == told[1]


KEPT = {
    "speculators": {"auto_map": {"": "config.X"}, "transformers_version": "5.19.0"},
    "deepspec": {"num_anchors": 512, "transformers_version": "5.8.1", "num_target_layers": 12},
    "specforge": {"auto_map": {"AutoModel": "dspark.X"}, "eos_token_id": [3, 4]},
}
"""Keys that change nothing, by the format whose files have them."""


@pytest.mark.parametrize("name", get_args(FormatName))
@settings(max_examples=5, deadline=None, phases=PHASES)
@given(draft=drafts(), left_out=st.booleans(), saved_tables=st.booleans())
def test_what_is_imported_is_exported_key_for_key_and_bit_for_bit(
    name: FormatName, draft: Draft, left_out: bool, saved_tables: bool
):
    with folder() as place:
        source = exported(run_of(draft, place), place / "source", name)
        described = config_of(source) | KEPT[name]
        if left_out and name != "speculators" and draft.config.sample_from_anchor:
            del described["sample_from_anchor"]
        (source / "config.json").write_text(json.dumps(described))
        if saved_tables and draft.config.draft_vocab_size == draft.config.vocab_size:
            add_tables(source, place / "target")
        run = imported(source, place / "imported")
        shutil.rmtree(place / "target")
        again = exported(run, place / "again", name)
        layout = {"sample_from_anchor": draft.config.sample_from_anchor}
        assert config_of(again) == described | layout
        assert bits(again) == bits(source) and calibration(again) == calibration(source)


def add_tables(source: Path, target: Path) -> None:
    """Give a checkpoint its target's tables, as older trainers did."""
    stored = stored_tensors(target)
    tensors = {n.removeprefix("model."): whole(t) for n, t in stored.items()}
    ours = {n: whole(t) for n, t in stored_tensors(source).items()}
    save_file(
        {n: jnp.asarray(x) for n, x in (ours | tensors).items()}, source / "model.safetensors"
    )


@settings(max_examples=3, deadline=None, phases=PHASES)
@given(draft=drafts(), path=st.permutations(get_args(FormatName)))
def test_a_way_through_every_format_ends_where_it_began(draft: Draft, path: list[FormatName]):
    with folder() as place:
        run = run_of(draft, place)
        direct = exported(run, place / "direct", path[-1])
        last = run
        for number, name in enumerate(path):
            last = exported(run, place / f"export{number}", name)
            run = imported(last, place / f"run{number}")
        assert bits(last) == bits(direct)
        assert config_of(last) == config_of(direct)

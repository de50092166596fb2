"""A DeepSpec draft's `target_layer_ids` name outputs of PyTorch's layers, and we read those."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.config import DraftConfig, Qwen3Config
from dspark_jax.draft_formats.formats import read, written
from dspark_jax.draft_formats.keys import Described
from dspark_jax.targets.families import make_target, read_config
from dspark_jax.targets.weights import params_from_tensors
from tests.parity.test_glm import RELATIVE, arrays_of, described, ints

DRAFT = DraftConfig(
    vocab_size=8,
    draft_vocab_size=8,
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=2,
    aux_layer_ids=(1,),
    mask_token_id=0,
)


def folder_of(golden: Path) -> Path:
    """Any Qwen3 with PyTorch's layer outputs."""
    every = sorted(path.parent for path in golden.glob("targets/*/golden.npz"))
    return next(f for f in every if described(f)["model_type"].startswith("qwen3"))


@pytest.mark.parametrize("name", ["deepspec", "specforge"])
def test_imported_layer_ids_pick_the_outputs_they_name(name: str, golden: Path):
    folder = folder_of(golden)
    arrays, outputs = arrays_of(folder), [0, 2]
    saved = written(name, Described(DRAFT))  # pyright: ignore[reportArgumentType]
    (saved if name == "deepspec" else saved["dflash_config"])["target_layer_ids"] = outputs
    ids = read(saved).said.config.aux_layer_ids
    config = read_config(described(folder), aux_layer_ids=ids)
    assert isinstance(config, Qwen3Config)
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    params = params_from_tensors(config, shapes, tensors.__getitem__)
    tokens = ints(arrays["input_ids"])
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    states = make_target(config).forward(params, tokens, jnp.ones_like(tokens), place)
    wanted = np.concatenate([arrays[f"layer{m}.out"] for m in outputs], axis=-1)
    np.testing.assert_allclose(states.aux_hidden, wanted, atol=RELATIVE * np.abs(wanted).max())

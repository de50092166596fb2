"""Trains the small Qwen3 that a vLLM server is given: `small_qwen3.py --output DIR`.

It learns the functions of the standard library as conversations, with tiny-glm's tokenizer, for as
long as it takes to write text that is not random. Then its head is made sharper: the argmax of
logits this small a model has learnt is a near tie too often to compare two engines by.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from tokenizers import Tokenizer

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.config import Qwen3Config
from dspark_jax.targets.families import init_params, make_target
from dspark_jax.train import python_corpus
from dspark_jax.train.pretrain import (
    Pretraining,
    batches,
    conversations,
    cross_entropy,
    encode,
)
from dspark_jax.train.tiny_glm import END, save_target

SHARPER = 8.0
"""What all logits are multiplied by in the end; a power of two, which bfloat16 takes exactly."""


@dataclass(frozen=True)
class Small:
    """Settings of the run."""

    output: Path
    """Folder for the model, in Hugging Face layout; its weights are bfloat16 as published ones."""
    steps: int = 1200
    batch_rows: int = 16
    sequence_length: int = 128
    learning_rate: float = 3e-3
    seed: int = 0


def small_config(vocab_size: int) -> Qwen3Config:
    """Grouped queries, and heads of a size that vLLM's attention on CPUs takes."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )


def sharpened(params: Any) -> Any:
    """The parameters with a larger head."""

    def change(path: Any, param: Any) -> Any:
        return param.replace(param[...] * SHARPER) if path[0] == "lm_head" else param

    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, change(path, param)) for path, param in flat])


def run(settings: Small) -> None:
    """Train and save."""
    tokenizer = Tokenizer.from_file(str(embedded("tiny-glm") / "tokenizer.json"))
    config, end = small_config(tokenizer.get_vocab_size()), tokenizer.token_to_id(END)
    assert end is not None
    found = python_corpus.sources(python_corpus.standard_library())
    texts = conversations([source for source in found if not source.held_out])
    rng = np.random.default_rng(settings.seed)
    rng.shuffle(texts)
    stream = encode(tokenizer, texts)
    target, params = make_target(config), init_params(config, settings.seed)
    rate = optax.warmup_cosine_decay_schedule(0, settings.learning_rate, 50, settings.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))

    @jax.jit
    def step(params: Any, opt_state: Any, rows: Any) -> Any:
        def loss(params: Any) -> Any:
            return cross_entropy(target, params, rows)[0]

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = jax.jit(optimizer.init)(params)
    cut = Pretraining(
        settings.output,
        sequence_length=settings.sequence_length,
        batch_rows=settings.batch_rows,
    )
    rows = batches(stream, cut, end, rng)
    for number in range(settings.steps):
        params, opt_state, loss = step(params, opt_state, next(rows))
        if number % 100 == 0 or number == settings.steps - 1:
            print(f"step {number}: {float(loss):.3f} nats per token", flush=True)
    save_target(settings.output, config, sharpened(params), tokenizer)


if __name__ == "__main__":
    run(tyro.cli(Small, description=__doc__))

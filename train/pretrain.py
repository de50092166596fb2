"""Make the embedded target from scratch: `python -m dspark_jax.train.pretrain --output DIR`.

Trains a tokenizer and a small `glm_moe_dsa` model on the Python source of this machine. Matrices
learn by Muon, the rest by AdamW. The indexer learns to imitate attention, first beside dense
attention and then, for most of the run, beside the sparse attention that it steers; experts are
balanced by the router's bias (both as DeepSeek-V3 and V3.2 train them). The learning rate follows
the clock, so that `--minutes` is what the run takes on any machine.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon
from tokenizers import Tokenizer

from dspark_jax.config import GlmConfig
from dspark_jax.target_folder import load_target
from dspark_jax.targets.families import init_params, make_target
from dspark_jax.targets.residual import Choices
from dspark_jax.train import python_corpus
from dspark_jax.train.tiny_glm import (
    ASSISTANT,
    END,
    TINY_GLM,
    USER,
    save_target,
    train_tokenizer,
)
from dspark_jax.types import Target

BIAS_STEP = 1e-3
TOKENIZER_BYTES = 30_000_000


@dataclass(frozen=True)
class Pretraining:
    """Settings of the run."""

    output: Path
    """Folder for the finished model; refreshed during the run."""
    minutes: float = 90.0
    """How long to train; the learning rate decays to zero over this time."""
    corpus: tuple[Path, ...] = ()
    """Folders of Python source beside the standard library; the installed packages by default."""
    package_megabytes: int = 8
    """At most this much text from any one package."""
    start: Path | None = None
    """Target folder to go on from, weights and tokenizer; from scratch when not given."""
    whole_files: bool = True
    """Learn from whole files beside functions as conversations; false: from functions alone."""
    sequence_length: int = 256
    batch_rows: int = 16
    learning_rate: float = 0.0045
    """Of Muon; AdamW's is half of it."""
    dense_share: float = 0.15
    """Share of the time with dense attention before sparse selection is switched on."""
    save_minutes: float = 15.0
    compute_dtype: str = "bfloat16"
    seed: int = 0


class Rows(NamedTuple):
    """Token rows cut from a stream, documents told apart."""

    tokens: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    position: Int[Array, "B T"]


class Corpus(NamedTuple):
    """Token streams, every document ended by the end token."""

    train: np.ndarray
    held_out_code: np.ndarray
    held_out_answers: np.ndarray


def read_corpus(settings: Pretraining) -> list[python_corpus.Source]:
    """All source files; the standard library is in twice, being what the main job asks about."""
    library = list(python_corpus.sources(python_corpus.standard_library()))
    folders = settings.corpus or (python_corpus.installed_packages(),)
    limit = settings.package_megabytes * 1_000_000
    packages = [s for folder in folders for s in python_corpus.sources(folder, limit)]
    return library + library + packages


def conversations(sources: list[python_corpus.Source]) -> list[str]:
    """Functions rendered as the chat template renders them, without the end token."""
    examples = [e for source in sources for e in python_corpus.functions(source)]
    return [f"{USER}{e.prompt}{ASSISTANT}{e.answer}" for e in examples]


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One stream of all texts, each ended."""
    end = np.array([tokenizer.token_to_id(END)], np.uint16)
    parts: list[np.ndarray] = []
    for start in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 1000]):
            parts += [np.asarray(encoding.ids, np.uint16), end]
    return np.concatenate(parts)


def build_corpus(settings: Pretraining, rng: np.random.Generator) -> tuple[Tokenizer, Corpus]:
    """Train the tokenizer, then encode training and held-out text in random order."""
    sources = read_corpus(settings)
    learn = [s for s in sources if not s.held_out]
    kept = list(dict.fromkeys(s for s in sources if s.held_out))
    rng.shuffle(learn)
    texts, used = [], 0
    for source in learn:
        texts.append(source.text)
        used += len(source.text)
        if used > TOKENIZER_BYTES:
            break
    if settings.start is None:
        tokenizer = train_tokenizer(texts, TINY_GLM.vocab_size)
    else:
        tokenizer = Tokenizer.from_file(str(settings.start / "tokenizer.json"))
    documents = conversations(learn) + [s.text for s in learn] * settings.whole_files
    rng.shuffle(documents)
    return tokenizer, Corpus(
        encode(tokenizer, documents),
        encode(tokenizer, [s.text for s in kept]),
        encode(tokenizer, conversations(kept)),
    )


def rows_at(stream: np.ndarray, starts: np.ndarray, length: int, end: int) -> Rows:
    """Rows cut from a stream; documents are told apart by their end tokens."""
    tokens = stream[starts[:, None] + np.arange(length)].astype(np.int32)
    begins = np.zeros_like(tokens, bool)
    begins[:, 1:] = tokens[:, :-1] == end
    order = np.broadcast_to(np.arange(length), tokens.shape)
    origin = np.maximum.accumulate(np.where(begins, order, 0), axis=1)
    return Rows(
        tokens, np.cumsum(begins, axis=1, dtype=np.int32) + 1, (order - origin).astype(np.int32)
    )


def batches(
    stream: np.ndarray, settings: Pretraining, end: int, rng: np.random.Generator
) -> Iterator[Rows]:
    """Endless shuffled passes over the stream, shifted anew each pass."""
    length, size = settings.sequence_length, settings.batch_rows
    while True:
        shift = rng.integers(length)
        starts = rng.permutation(np.arange(shift, len(stream) - length, length))
        for first in range(0, len(starts) - size + 1, size):
            yield rows_at(stream, starts[first : first + size], length, end)


def indexer_loss(choices: list[tuple[Choices, ...]]) -> Float[Array, ""]:
    """KL of every indexer's softmax from the attention of the layers it steers."""
    flat = [choice for unit in choices for choice in unit]
    owners = [i for i, choice in enumerate(flat) if choice.index_scores is not None]
    total = jnp.float32(0)
    for first, last in zip(owners, [*owners[1:], len(flat)], strict=True):
        seen = flat[first].selected
        steered = sum(flat[i].attention for i in range(first, last)) / (last - first)
        goal = jax.lax.stop_gradient(steered.astype(jnp.float32))
        scores = jnp.where(seen, flat[first].index_scores, -jnp.inf)
        log_probs = jnp.where(seen, jax.nn.log_softmax(scores, axis=-1), 0.0)
        total += jnp.mean(jnp.sum(jax.scipy.special.xlogy(goal, goal) - goal * log_probs, axis=-1))
    return total / len(owners)


def cross_entropy(
    target: Target, params: Any, rows: Rows
) -> tuple[Float[Array, ""], list[tuple[Choices, ...]]]:
    """Mean loss of predicting the next token of the same document."""
    states, choices = target.trace(params, *rows)
    logits = target.unembed(params, states.final_hidden[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.tokens[:, 1:])
    same = rows.segment[:, 1:] == rows.segment[:, :-1]
    return jnp.sum(losses * same) / jnp.sum(same), choices


def balance(params: Any, choices: list[tuple[Choices, ...]], step: float) -> Any:
    """Raise the bias of experts chosen less than their share, lower the others' (no gradient)."""
    flat = [choice for unit in choices for choice in unit]

    def change(path: Any, param: Any) -> Any:
        if path[-1] != "e_score_correction_bias":
            return param
        routing = flat[path[1] + path[2]].routing
        count = jnp.bincount(routing.expert.reshape(-1), length=param.shape[-1])
        return param.replace(param[...] + step * jnp.sign(jnp.mean(count) - count))

    flat_params = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, change(path, p)) for path, p in flat_params])


def _muon_axes(params: Any) -> Any:
    """Which parameters Muon takes: hidden matrices, every expert on its own."""
    axes = {
        "gate_proj": MuonDimensionNumbers(1, 2),
        "up_proj": MuonDimensionNumbers(1, 2),
        "down_proj": MuonDimensionNumbers(1, 2),
    }

    def choose(path: Any, param: Any) -> Any:
        if "experts" in path:
            return param.replace(axes[path[-1]])
        hidden = path[-1] == "kernel" and path[0] == "layers" and "gate" not in path
        return param.replace(MuonDimensionNumbers(0, 1) if hidden else None)

    return nnx.from_flat_state([(p, choose(p, v)) for p, v in nnx.to_flat_state(params)])


def make_optimizer(settings: Pretraining, params: Any) -> optax.GradientTransformation:
    """Clipped Muon and AdamW with learning rates that are set at every step."""

    def build(rate: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            muon(
                rate,
                adam_learning_rate=rate / 2,
                adam_b1=0.9,
                adam_b2=0.95,
                weight_decay=0.05,
                muon_weight_dimension_numbers=_muon_axes(params),
                consistent_rms=0.2,
            ),
        )

    return optax.inject_hyperparams(build)(rate=settings.learning_rate)


def make_step(target: Target, optimizer: optax.GradientTransformation, dtype: Any) -> Any:
    """One jitted update: (params, opt_state, rows, rate) -> (params, opt_state, losses)."""

    def objective(params: Any, rows: Rows) -> Any:
        lower = jax.tree.map(lambda p: p.astype(dtype), params)
        loss, choices = cross_entropy(target, lower, rows)
        imitation = indexer_loss(choices)
        return loss + imitation, (loss, imitation, choices)

    @jax.jit
    def step(params: Any, opt_state: Any, rows: Rows, rate: Any) -> Any:
        gradients, (loss, imitation, choices) = jax.grad(objective, has_aux=True)(params, rows)
        opt_state.hyperparams["rate"] = rate
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = balance(optax.apply_updates(params, updates), choices, BIAS_STEP)
        return params, opt_state, loss, imitation

    return step


def starting_params(settings: Pretraining) -> Any:
    """Fresh weights, or those of `--start`."""
    if settings.start is None:
        return init_params(TINY_GLM, settings.seed)
    return load_target(settings.start, ()).params


def evaluate(loss: Any, params: Any, stream: np.ndarray, settings: Pretraining, end: int) -> float:
    """Mean held-out cross-entropy (nats per token) over up to 128 evenly spaced rows."""
    length, size = settings.sequence_length, settings.batch_rows
    count = min(128, (len(stream) - length) // length) // size * size
    starts = np.linspace(0, len(stream) - length - 1, count).astype(int)
    rows = [rows_at(stream, starts[i : i + size], length, end) for i in range(0, count, size)]
    return float(np.mean([loss(params, r) for r in rows]))


def rounded(params: Any) -> Any:
    """The parameters as they are shipped: bfloat16, but for the router's float32 bias."""

    def ship(path: Any, param: Any) -> Any:
        if path[-1] == "e_score_correction_bias":
            return param
        return param.replace(param[...].astype(jnp.bfloat16).astype(param.dtype))

    return nnx.from_flat_state([(p, ship(p, x)) for p, x in nnx.to_flat_state(params)])


def learning_rate(progress: float, peak: float) -> float:
    """Short warm-up, then constant, then linear to zero over the last 60 % of the time."""
    return peak * min(1.0, progress / 0.01 + 0.02) * min(1.0, max(0.0, 1.0 - progress) / 0.6)


def run(settings: Pretraining) -> None:
    """Train, evaluate and save."""
    rng = np.random.default_rng(settings.seed)
    tokenizer, corpus = build_corpus(settings, rng)
    end = tokenizer.token_to_id(END)
    print(
        f"corpus {len(corpus.train):,} tokens, held out {len(corpus.held_out_code):,}", flush=True
    )
    dense = dataclasses.replace(TINY_GLM, index_topk=settings.sequence_length)
    params = starting_params(settings)
    optimizer = make_optimizer(settings, params)
    opt_state = jax.jit(optimizer.init)(params)
    dtype = jnp.dtype(settings.compute_dtype)
    steps = {c: make_step(make_target(c), optimizer, dtype) for c in (dense, TINY_GLM)}
    held_out = jax.jit(lambda params, rows: cross_entropy(make_target(TINY_GLM), params, rows)[0])
    # What is shipped is bfloat16; measure what is shipped.
    shipped = jax.jit(rounded)
    settings.output.mkdir(parents=True, exist_ok=True)
    log = (settings.output / "pretraining.jsonl").open("w")
    start = saved = time.monotonic()
    for number, rows in enumerate(batches(corpus.train, settings, end, rng)):
        progress = (time.monotonic() - start) / (60 * settings.minutes)
        config: GlmConfig = dense if progress < settings.dense_share else TINY_GLM
        rate = jnp.float32(learning_rate(progress, settings.learning_rate))
        params, opt_state, loss, imitation = steps[config](params, opt_state, rows, rate)
        final = progress >= 1
        if number % 20 == 0 or final:
            record = {
                "step": number,
                "tokens": (number + 1) * settings.batch_rows * settings.sequence_length,
                "minutes": round((time.monotonic() - start) / 60, 2),
                "loss": round(float(loss), 4),
                "indexer_loss": round(float(imitation), 4),
            }
            if final or time.monotonic() - saved > 60 * settings.save_minutes:
                saved = time.monotonic()
                weights = shipped(params)
                for name in ("held_out_code", "held_out_answers"):
                    stream = getattr(corpus, name)
                    record[name] = round(evaluate(held_out, weights, stream, settings, end), 4)
                save_target(settings.output, TINY_GLM, params, tokenizer)
            print(record, flush=True)
            print(json.dumps(record), file=log, flush=True)
        if final:
            break
    log.close()


if __name__ == "__main__":
    run(tyro.cli(Pretraining, description=__doc__))

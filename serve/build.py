"""The engine of given models and settings: sizes chosen, memory counted, programs compiled."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dspark_jax.paged_loop import init_slots
from dspark_jax.serve.batch import Batch
from dspark_jax.serve.costs import known, made_for
from dspark_jax.serve.engine import QueueLimits, ThreadedEngine
from dspark_jax.serve.grammar import Grammars
from dspark_jax.serve.layout import device_bytes, shardings_of, state_shardings
from dspark_jax.serve.metrics import Metrics
from dspark_jax.serve.models import Loaded
from dspark_jax.serve.pages import Pages
from dspark_jax.serve.policy import Policy
from dspark_jax.serve.profile import costed, measure
from dspark_jax.serve.programs import Programs, Shape, Sizes, Steps
from dspark_jax.serve.rating import Estimator, Head, Rating
from dspark_jax.serve.settings import LENGTH_LIMIT, ServeSettings, Speculation

CHUNKS = (32, 128, 512)
"""Prompt rows read at a time."""


class Built(NamedTuple):
    """An engine that waits to be started, and what it was built with."""

    engine: ThreadedEngine
    sizes: Sizes
    metrics: Metrics
    seconds: Mapping[Shape, float]
    note: str
    """Where the seconds come from."""


def choose_sizes(settings: ServeSettings, speculation: Speculation, loaded: Loaded) -> Sizes:
    """What programs are compiled for; ValueError when a number does not fit the model."""
    allowed = loaded.files.config.max_position_embeddings
    length = settings.max_model_len or min(allowed, LENGTH_LIMIT)
    if length > allowed:
        raise ValueError(
            f"--max-model-len {length} is more than the {allowed} positions that the target was "
            "trained for; give less."
        )
    page = settings.block_size
    longest = -(-length // page)
    least = longest + 1
    pages = settings.num_gpu_blocks_override or 1 + longest * settings.max_num_seqs
    if pages < least:
        raise ValueError(
            f"{pages} pages of {page} rows do not hold one sequence of {length} tokens; give "
            f"--num-gpu-blocks-override {least} or more, or a smaller --max-model-len."
        )
    drafted, asked = loaded.draft.draft_length, speculation.num_speculative_tokens
    verified = drafted if asked is None else asked
    if verified > drafted:
        raise ValueError(
            f"num_speculative_tokens {verified} is more than the {drafted} that the draft proposes "
            "in a block; give fewer, or leave it out."
        )
    chunks = tuple(c for c in CHUNKS if c < length) or (length,)
    vocabulary = loaded.files.config.vocab_size
    return Sizes(settings.max_num_seqs, page, pages, longest, verified, vocabulary, chunks)


def plan(loaded: Loaded, sizes: Sizes) -> dict[str, int]:
    """Bytes of weights and of both caches on each device."""
    dtype = loaded.weights.frozen.embed.dtype
    given = (loaded.target, loaded.draft, sizes.slots, sizes.pages, sizes.page, dtype)
    state = jax.eval_shape(lambda: init_slots(*given))
    lie = state_shardings(loaded.mesh, loaded.files.config, state)
    return {
        "weights": device_bytes(loaded.weights, shardings_of(loaded.weights)),
        "target cache": device_bytes(state.target_cache, lie.target_cache),
        "draft cache": device_bytes(state.draft_cache, lie.draft_cache),
    }


def adapts(speculation: Speculation, sizes: Sizes) -> bool:
    """Whether there are drafts, and how many are verified is chosen round by round."""
    return speculation.enable_adaptive_verification and sizes.verified > 0


def compiled(
    loaded: Loaded, sizes: Sizes, speculation: Speculation, progress: Callable[[int, int], None]
) -> Programs:
    """Compile everything; `progress(done, total)` follows the programs."""
    stopping = speculation.verification_schedule == "algorithm-1" and adapts(speculation, sizes)
    dtype = loaded.weights.frozen.embed.dtype
    models = (loaded.target, loaded.draft, loaded.weights)
    programs = Programs(*models, sizes, dtype, loaded.mesh, stopping)
    programs.compile(progress)
    return programs


def build(
    settings: ServeSettings,
    speculation: Speculation,
    loaded: Loaded,
    programs: Steps,
    count: int,
    name: str,
    kept: Path,
) -> Built:
    """Measure `count` compiled programs, or find in `kept` what they took, and make the engine."""
    sizes, adaptive = programs.sizes, adapts(speculation, programs.sizes)
    metrics = Metrics(name, sizes.verified)
    metrics.compiled(count)
    metrics.cache_config({"block_size": sizes.page, "num_gpu_blocks": sizes.pages})
    seconds, note = {}, "costs of rounds: not needed, whole blocks are verified"
    if adaptive:
        dtype = loaded.weights.frozen.embed.dtype
        facts = made_for(loaded, sizes, str(dtype), speculation.verification_schedule)
        measuring = partial(measure, programs)
        seconds, note = known(kept, facts, costed(programs), measuring, settings.profile_again)
    batch = Batch(
        programs,
        Pages(sizes.pages, sizes.page, settings.enable_prefix_caching),
        Policy("adaptive" if adaptive else "fixed", sizes.verified),
        frozenset(loaded.files.ends),
        metrics,
        seconds,
        rating(loaded),
        draft_greedily=speculation.draft_sample_method == "greedy",
    )
    limits = QueueLimits(settings.max_queued_requests, settings.max_queued_tokens)
    grammars = Grammars(loaded.files.tokenizer, sizes.vocabulary, loaded.files.ends)
    count_compilations(metrics)
    return Built(ThreadedEngine(batch, grammars, limits, metrics), sizes, metrics, seconds, note)


def rating(loaded: Loaded) -> Rating:
    """By the temperatures beside the draft; without a confidence head learnt on the way."""
    config = loaded.draft_config
    if config is not None and not config.enable_confidence_head:
        return Estimator(config.draft_length)
    fitted = loaded.temperatures
    return Head(np.ones(loaded.draft.draft_length) if fitted is None else fitted)


def count_compilations(metrics: Metrics) -> None:
    """From now on whatever is compiled in this process is counted: it ought to be nothing."""

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            metrics.compiled()

    jax.monitoring.register_event_duration_secs_listener(heard)


def told(seconds: Mapping[Shape, float], page: int) -> Iterator[str]:
    """The measured costs, a line per group and context."""
    for group, pages in sorted({(s.group, s.pages) for s in seconds}):
        costs = {s.budget: t for s, t in seconds.items() if (s.group, s.pages) == (group, pages)}
        listed = ", ".join(f"{budget}: {1e3 * t:.2f}" for budget, t in sorted(costs.items()))
        yield f"{group} sequences of up to {pages * page} tokens, ms by verified rows: {listed}"

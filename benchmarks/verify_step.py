"""Milliseconds of a target's verify step, beside the bytes and operations it cannot avoid.

    python benchmarks/verify_step.py [--shape tiny-glm|qwen3-8b-layer|glm-5.2-layer]
        [--batch 1 8] [--context 256 1024] [--verify-width 1 2 4 8] [--repeats 20]
        [--chip h100] [--json FILE]

A step is `extend` of S rows per sequence after a context of that many, then `logits` of all rows,
in one program, the cache donated. Weights are drawn; what a step costs does not depend on them but
for the experts that rows choose. Compilation and warm-up steps are not counted; one step is timed
at a time, until its results are there, and steps of all widths take turns.

The floor reads every weight needed and the filled cache rows once, or multiplies, whichever takes
longer (`dspark_jax/plan/floor.py`). Its bytes hold for any device, FP8 weights as they are stored
and all else in --dtype; its milliseconds need the peaks of one: of the device's kind, or of --chip,
or given as --bytes-per-second and --flops.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dspark_jax.checkpoints.quantisation import quantisation
from dspark_jax.config import GlmConfig, TargetConfig
from dspark_jax.plan.builtin import TARGETS
from dspark_jax.plan.chips import CHIPS
from dspark_jax.plan.floor import Needs, step_bytes, target_needs
from dspark_jax.plan.program import target_params
from dspark_jax.targets.families import make_target, read_config
from dspark_jax.targets.weights import entries
from dspark_jax.types import Rows, Target

TINY_GLM = Path(__file__).parents[1] / "dspark_jax" / "assets" / "tiny-glm" / "config.json"
WARMUP_STEPS = 3
LAYERS = 2
DRAWN = 1 << 22
"""Random numbers that large weights are made of, over and over."""


class Shape(NamedTuple):
    """A target's config.json and what is measured of it by default."""

    described: dict[str, Any]
    batch: tuple[int, ...]
    context: tuple[int, ...]
    dtype: str


def shapes(experts: int) -> dict[str, Shape]:
    """The targets by name; a GLM-5.2 layer has this many of its 256 experts."""
    tiny = json.loads(TINY_GLM.read_text())
    # One layer that chooses its keys and one that shares the choice, both sparse.
    glm = {**TARGETS["glm-5.2"]} | {
        "num_hidden_layers": LAYERS,
        "indexer_types": ["full", "shared"],
        "first_k_dense_replace": 0,
        "n_routed_experts": experts,
    }
    qwen3 = {**TARGETS["qwen3-8b"]} | {"num_hidden_layers": 1}
    return {
        "tiny-glm": Shape(tiny, (1, 4, 16), (256, 1024), "float32"),
        "qwen3-8b-layer": Shape(qwen3, (1, 4), (1024,), "bfloat16"),
        "glm-5.2-layer": Shape(glm, (1, 8), (1024, 8192), "bfloat16"),
    }


class Peaks(NamedTuple):
    """What a device moves and computes at best, per second."""

    bytes: float
    flops: float


class Measured(NamedTuple):
    """Of a step: median and fastest milliseconds, bytes and operations that it needs at least."""

    batch: int
    context: int
    verify_width: int
    median_ms: float
    fastest_ms: float
    floor_bytes: float
    floor_flops: float
    floor_ms: float | None


def main() -> None:
    """Measure every combination and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=shapes(256), default="tiny-glm")
    parser.add_argument("--batch", type=int, nargs="+", help="sequences")
    parser.add_argument("--context", type=int, nargs="+", help="rows in the cache before the step")
    parser.add_argument("--verify-width", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of each kind")
    parser.add_argument("--experts", type=int, default=32, help="of a GLM-5.2 layer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of what is not FP8")
    parser.add_argument("--chip", choices=CHIPS, help="whose peaks make the floor")
    parser.add_argument("--bytes-per-second", type=float, help="peak, instead of a chip's")
    parser.add_argument("--flops", type=float, help="peak per second, instead of a chip's")
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    shape = shapes(given.experts)[given.shape]
    config, block = read_config(shape.described), quantisation(shape.described)
    dtype = jnp.dtype(given.dtype or shape.dtype)
    target = make_target(config)
    params = jax.block_until_ready(draw(target_params(config, block), dtype))
    prepared = jax.block_until_ready(jax.jit(target.prepare)(params))
    del params
    needs = target_needs([(e.name, e.shape) for e in entries(config)], config, block)
    # The floor counts bfloat16; what FP8 layers have beside their kernels is little.
    wider = dtype.itemsize / 2 if block is None else 1.0
    peaks, found = peaks_of(given), list[Measured]()
    for batch in given.batch or shape.batch:
        for context in given.context or shape.context:
            steps = {s: step_of(target, batch, context, s) for s in given.verify_width}
            cache = target.init_cache(batch, context + max(steps), dtype)
            for s, seconds in times(steps, prepared, cache, given.repeats).items():
                least = wider * step_bytes(needs, batch * s, batch, context)
                flops = floor_flops(config, needs, batch * s, context)
                bound = peaks and 1e3 * max(least / peaks.bytes, flops / peaks.flops)
                ms = 1e3 * statistics.median(seconds), 1e3 * min(seconds)
                found.append(Measured(batch, context, s, *ms, least, flops, bound))
    report(found, given, dtype, device_name())


def draw(shapes: Any, dtype: Any) -> Any:
    """Weights of these shapes, in `dtype` where the shapes are bfloat16."""
    numbers = 0.02 * jax.random.normal(jax.random.key(0), (DRAWN,))

    def one(path: Any, leaf: Any) -> jax.Array:
        kind = leaf.dtype if leaf.dtype.itemsize != 2 else dtype
        name = jax.tree_util.keystr(path)
        if name.endswith(".scales"):
            return jnp.full(leaf.shape, 1e-2, leaf.dtype)
        if "norm" in name:
            return jnp.ones(leaf.shape, kind)
        scale = 100 if leaf.dtype.itemsize == 1 else 1
        return jnp.resize((scale * numbers).astype(kind), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, shapes)


def step_of(target: Target, batch: int, context: int, width: int) -> Callable[..., Any]:
    """The step as a function of (weights, cache): (cache, logits)."""
    key = jax.random.key(width)
    tokens = jax.random.randint(key, (batch, width), 0, target.config.vocab_size)
    rows = Rows(tokens, jnp.broadcast_to(context + jnp.arange(width), tokens.shape))

    @partial(jax.jit, donate_argnums=1)
    def step(prepared: Any, cache: Any, rows: Rows) -> tuple[Any, jax.Array]:
        cache, states = target.extend(prepared, cache, rows)
        return cache, target.logits(prepared, states.final_hidden)

    return lambda prepared, cache: step(prepared, cache, rows)


def times(
    steps: dict[int, Callable[..., Any]], prepared: Any, cache: Any, repeats: int
) -> dict[int, list[float]]:
    """Seconds of every timed step, by verify width."""
    seconds: dict[int, list[float]] = {width: [] for width in steps}
    for i in range(WARMUP_STEPS + repeats):
        for width, step in steps.items():
            started = time.perf_counter()
            cache, _ = jax.block_until_ready(step(prepared, cache))
            if i >= WARMUP_STEPS:
                seconds[width].append(time.perf_counter() - started)
    return seconds


def floor_flops(config: TargetConfig, needs: Needs, rows: int, context: int) -> float:
    """Multiplications and additions of `rows` rows: every weight they read, and attention."""
    weights = 0.0
    for entry in entries(config):
        size, used = math.prod(entry.shape), "embed_tokens" not in entry.name or is_tied(config)
        share = needs.chosen / needs.experts if ".mlp.experts." in entry.name else 1.0
        weights += size * share * used
    if isinstance(config, GlmConfig):
        # In the latent space; of the keys, those that the indexer chooses.
        read = min(context, config.index_topk)
        per_key = config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
        indexers = config.indexer_types.count("full")
        indexed = indexers * context * config.index_n_heads * config.index_head_dim
        attention = config.num_hidden_layers * read * per_key + indexed
    else:
        per_key = 2 * config.num_attention_heads * config.head_dim
        attention = config.num_hidden_layers * context * per_key
    return 2.0 * rows * (weights + attention)


def is_tied(config: TargetConfig) -> bool:
    """Whether the embedding is the head too."""
    return bool(getattr(config, "tie_word_embeddings", False))


def peaks_of(given: argparse.Namespace) -> Peaks | None:
    """The peaks asked for, or those of the device's kind, or None; products are of bfloat16."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "")
    name = given.chip or next((name for name in CHIPS if name in kind), None)
    if given.bytes_per_second and given.flops:
        return Peaks(given.bytes_per_second, given.flops)
    if name is None:
        return None
    chip = CHIPS[name]
    peaks = Peaks(chip.bytes_per_second, chip.bf16_flops)
    return Peaks(given.bytes_per_second or peaks.bytes, given.flops or peaks.flops)


def report(found: list[Measured], given: argparse.Namespace, dtype: Any, device: str) -> None:
    """Print a table in Markdown; write the same as JSON when asked to."""
    print(f"{given.shape}, {dtype}, {device}, jax {jax.__version__}, {given.repeats} steps each\n")
    print("| B | context | S | median ms | fastest ms | MB needed | GFLOP | floor ms |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in found:
        bound = "" if row.floor_ms is None else f"{row.floor_ms:.3f}"
        needed = f"{row.floor_bytes / 1e6:.1f} | {row.floor_flops / 1e9:.3f}"
        print(
            f"| {row.batch} | {row.context} | {row.verify_width} | {row.median_ms:.2f} "
            f"| {row.fastest_ms:.2f} | {needed} | {bound} |"
        )
    if given.json:
        settings = {"shape": given.shape, "dtype": str(dtype), "device": device}
        result = settings | {"jax": jax.__version__, "steps": [row._asdict() for row in found]}
        given.json.write_text(json.dumps(result, indent=1))


def device_name() -> str:
    """The accelerator's kind, or the processor's name."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()

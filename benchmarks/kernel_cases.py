"""What `kernels.py` runs: ops at shapes of Qwen3-8B and GLM-5.2, their bytes and operations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = (128, 128)


class Case(NamedTuple):
    """An op at one shape: what it is given, and what it has to move and compute."""

    op: str
    make: Callable[[Any], tuple[Any, ...]]
    """Its arrays, drawn by a NumPy generator; real lengths and sizes among them."""
    settings: dict[str, Any]
    bytes: float
    flops: float
    eight_bit: bool = False
    changed: tuple[int, ...] = ()
    """Which of the arrays it changes in place, and gives back."""


def normal(rng: Any, *shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Numbers of the size that a normed model has; a large array repeats a small one."""
    few = rng.standard_normal(min(int(np.prod(shape)), 1 << 20)).astype(np.float32)
    return jnp.resize(jnp.asarray(few, dtype), shape)


def block_attention(B: int, K: int, H: int, Hk: int, d: int, C: int, page: int) -> Case:
    """A block of every sequence over C context rows in pages."""
    wide, pages = -(-d // 128) * 128, C // page

    def make(rng: Any) -> tuple[Any, ...]:
        own = (normal(rng, B, K, Hk, d) for _ in range(2))
        context = (normal(rng, B * pages, Hk, page, wide) for _ in range(2))
        table = rng.permutation(B * pages).reshape(B, pages).astype(np.int32)
        query = normal(rng, B, K, H, d)
        return query, *own, *context, jnp.asarray(table), jnp.full(B, C, jnp.int32)

    read = 2 * B * Hk * C * wide * 2 + 2 * B * K * (2 * H + 2 * Hk) * d
    settings = {"window": None, "causal": False}
    return Case("block_attention", make, settings, read, 4 * B * H * K * (C + K) * d)


def mla_attention(B: int, S: int, H: int, C: int, page: int) -> Case:
    """The rows of a verify step over C latents of 512 numbers and 64 rotated ones."""
    pages = C // page

    def make(rng: Any) -> tuple[Any, ...]:
        asked = normal(rng, B, S, H, 512), normal(rng, B, S, H, 64)
        held = normal(rng, B * pages, page, 512), normal(rng, B * pages, page, 128)
        table = rng.permutation(B * pages).reshape(B, pages).astype(np.int32)
        position = np.tile(C - S + np.arange(S), (B, 1)).astype(np.int32)
        seen = np.arange(C) <= position[:, :, None]
        return *asked, *held, jnp.asarray(table), jnp.asarray(position), jnp.asarray(seen)

    read = B * C * (512 + 128) * 2 + B * S * H * (576 * 2 + 512 * 4) + B * S * C
    return Case("mla_attention", make, {"scale": 1 / 16}, read, 2 * B * S * H * C * (576 + 512))


def fp8_matmul(R: int, size_in: int, size_out: int, function: str = "fp8_matmul") -> Case:
    """R rows by one matrix of a stack of two."""

    def make(rng: Any) -> tuple[Any, ...]:
        values = normal(rng, 2, size_in, size_out).astype(jnp.float8_e4m3fn)
        scales = jnp.ones((2, -(-size_in // 128), -(-size_out // 128)), jnp.float32)
        return normal(rng, R, size_in), values, scales, jnp.int32(1)

    read = size_in * size_out + 2 * R * (size_in + size_out)
    flops = 2 * R * size_in * size_out
    op = "fp8_matmul" if function == "fp8_matmul" else f"fp8_matmul.{function}"
    return Case(op, make, {"block": BLOCK}, read, flops, eight_bit=function != "fp8_matmul")


def fp8_experts(R: int, E: int, size_in: int, size_out: int) -> Case:
    """R rows spread evenly over E experts."""

    def make(rng: Any) -> tuple[Any, ...]:
        values = normal(rng, E, size_in, size_out).astype(jnp.float8_e4m3fn)
        scales = jnp.ones((E, size_in // 128, size_out // 128), jnp.float32)
        sizes = jnp.full(E, R // E, jnp.int32)
        return normal(rng, R, size_in), values, scales, sizes, None

    read = min(R, E) * size_in * size_out + R * (2 * size_in + 4 * size_out)
    return Case("fp8_experts", make, {"block": BLOCK}, read, 2 * R * size_in * size_out)


def markov_step(B: int, r: int, V: int) -> Case:
    """One slot of a block: G of them are a chain."""

    def make(rng: Any) -> tuple[Any, ...]:
        words = jnp.asarray(rng.integers(0, 1 << 32, (B, 2), dtype=np.uint32))
        arrays = normal(rng, 2, B, V, dtype=jnp.float32), normal(rng, B, r), normal(rng, r, V)
        return *arrays, words, jnp.ones(B), jnp.int32(1), jnp.int32(V)

    return Case("markov.markov_step", make, {}, 2 * r * V + 4 * B * V, 2 * B * r * V)


def context_append(R: int, D: int, layers: int, Hk: int, d: int, pages: int, page: int) -> Case:
    """R rows of a draft's context, of which each is kept, into every layer's pages."""
    wide = -(-d // 128) * 128

    def make(rng: Any) -> tuple[Any, ...]:
        hidden, kernel = normal(rng, R, D), normal(rng, D, layers * 2 * Hk * d)
        cells = rng.permutation((pages - 1) * page)[:R].astype(np.int32)
        place = (jnp.asarray(cells), jnp.asarray(1 + cells // page), jnp.asarray(cells % page))
        contexts = (tuple(normal(rng, pages, Hk, page, wide) for _ in range(layers)) for _ in "kv")
        return hidden, kernel, normal(rng, layers, d), *place, *contexts

    columns = layers * 2 * Hk * d
    moved = 2 * (D * columns + R * (D + layers * 2 * Hk * wide))
    settings = {"eps": 1e-6, "theta": 1e6}
    return Case("context_append", make, settings, moved, 2 * R * D * columns, changed=(6, 7))


def row_statistics(B: int, S: int, V: int) -> Case:
    """All rows that a step verified."""

    def make(rng: Any) -> tuple[Any, ...]:
        tokens = jnp.asarray(rng.integers(0, V, (B, S), dtype=np.int32))
        return normal(rng, B, S, V, dtype=jnp.float32), tokens, jnp.ones(B)

    return Case("acceptance.row_statistics", make, {}, 4 * B * S * V, 8 * B * S * V)


def residual_draw(B: int, V: int) -> Case:
    """One row of every sequence, of which half were refused."""

    def make(rng: Any) -> tuple[Any, ...]:
        p, q = (normal(rng, B, V, dtype=jnp.float32) for _ in range(2))
        sums = (jax.nn.logsumexp(x, axis=-1) for x in (p, q))
        words = jnp.asarray(rng.integers(0, 1 << 32, (B, 2), dtype=np.uint32))
        return p, q, *sums, jnp.arange(B) % 2 == 0, words, jnp.ones(B)

    return Case("acceptance.residual_draw", make, {}, 8 * B * V, 40 * B * V)


CASES = {
    "block attention, Qwen3-8B, 4k": block_attention(64, 7, 32, 8, 128, 4096, 16),
    "block attention, Qwen3-8B, 16k": block_attention(16, 7, 32, 8, 128, 16384, 16),
    "block attention, GLM-5.2 of 8": block_attention(32, 8, 8, 4, 96, 16384, 16),
    "MLA verify, GLM-5.2 of 8, 4k": mla_attention(32, 8, 8, 4096, 16),
    "MLA verify, GLM-5.2 of 8, 16k": mla_attention(8, 8, 8, 16384, 16),
    "MLA verify, GLM-5.2, 16k": mla_attention(8, 8, 64, 16384, 16),
    "FP8 W8A16, 1 row": fp8_matmul(1, 6144, 12288),
    "FP8 W8A16, 64 rows": fp8_matmul(64, 6144, 12288),
    "FP8 W8A16, 512 rows": fp8_matmul(512, 6144, 12288),
    "FP8 W8A8, 64 rows": fp8_matmul(64, 6144, 12288, "fp8_matmul_w8a8"),
    "FP8 W8A8, 512 rows": fp8_matmul(512, 6144, 12288, "fp8_matmul_w8a8"),
    "FP8 experts, 32 of 256": fp8_experts(1024, 32, 6144, 2048),
    "FP8 experts, 32 of 256, down": fp8_experts(1024, 32, 2048, 6144),
    "Markov step, GLM-5.2, B=1": markov_step(1, 256, 154880),
    "Markov step, GLM-5.2, B=64": markov_step(64, 256, 154880),
    "context append, Qwen3-8B": context_append(448, 4096, 5, 8, 128, 4096, 16),
    "context append, GLM-5.2 of 8": context_append(256, 6144, 5, 4, 96, 4096, 16),
    "acceptance, GLM-5.2, B=8": row_statistics(8, 8, 154880),
    "acceptance, GLM-5.2, B=64": row_statistics(64, 8, 154880),
    "residual draw, GLM-5.2, B=64": residual_draw(64, 154880),
}


def chosen(part: str) -> dict[str, Case]:
    """The cases whose name has this part; ends the program where there is none."""
    found = {name: case for name, case in CASES.items() if part.lower() in name.lower()}
    if not found:
        raise SystemExit(f"no kernel is called {part!r}; there are {', '.join(CASES)}.")
    return found

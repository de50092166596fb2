"""PyTorch's best for the work of our kernels, on one GPU: what `kernels.py` is timed beside."""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false
# torch is in some benchmarks' environments only.

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def yardstick(op: str, arrays: tuple[Any, ...]) -> Callable[[], None] | None:
    """What to time beside an op on arrays of these shapes; None without a GPU or an equal."""
    if not torch.cuda.is_available():
        return None
    makers = {
        "block_attention": block_attention,
        "mla_attention": mla_attention,
        "fp8_matmul": fp8_matmul,
        "fp8_matmul.fp8_matmul_w8a8": fp8_matmul,
        "markov.markov_step": markov_step,
    }
    if op not in makers:
        return None
    work = makers[op](*arrays)

    def waited() -> None:
        work()
        torch.cuda.synchronize()

    return waited


def block_attention(query: Any, key: Any, *rest: Any) -> Callable[[], Any]:
    """Attention over a context without pages, the block behind it."""
    (B, K, H, d), Hk, C = query.shape, key.shape[2], int(rest[-1][0]) + key.shape[1]
    keys, values = tensor(B, Hk, C, d), tensor(B, Hk, C, d)
    attention = torch.nn.functional.scaled_dot_product_attention
    return partial(attention, tensor(B, H, K, d), keys, values, enable_gqa=True)


def mla_attention(latent: Any, *rest: Any) -> Callable[[], Any]:
    """One key for all heads, which are rows; its kernels want values as wide as keys."""
    B, S, H, _ = latent.shape
    keys = tensor(B, 1, rest[-1].shape[2], 576)
    attention = torch.nn.functional.scaled_dot_product_attention
    return partial(attention, tensor(B, 1, S * H, 576), keys, keys)


def fp8_matmul(x: Any, values: Any, *_: Any) -> Callable[[], Any]:
    """One scale per row and per column, which cuBLAS has; it wants sixteen rows or more."""
    size_in, size_out = values.shape[-2:]
    rows = max(16, len(x))
    weight = tensor(size_out, size_in).to(torch.float8_e4m3fn).t()
    left = tensor(rows, size_in).to(torch.float8_e4m3fn)
    ones = partial(torch.ones, dtype=torch.float32, device="cuda")
    scales = {"scale_a": ones(rows, 1), "scale_b": ones(1, size_out)}
    return partial(torch._scaled_mm, left, weight, **scales, out_dtype=torch.bfloat16)


def markov_step(base: Any, mixed: Any, w2: Any, *_: Any) -> Callable[[], Any]:
    """A compiled sampler: product, noise, argmax."""
    (_, B, V), r = base.shape, mixed.shape[1]
    logits, left, right = tensor(B, V, dtype=torch.float32), tensor(B, r), tensor(r, V)

    def draw() -> Any:
        noise = -torch.empty_like(logits).exponential_().log()
        return (logits + (left @ right).float() + noise).argmax(-1)

    return torch.compile(draw)


def tensor(*shape: int, dtype: Any = torch.bfloat16) -> Any:
    """Random numbers on the GPU."""
    return torch.randn(*shape, device="cuda").to(dtype)

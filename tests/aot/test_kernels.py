"""Without hardware: the attention and context kernels compile for every TPU, at full size."""

from functools import partial

import pytest

from dspark_jax.pallas_kernels.block_attention import tpu as block_attention
from dspark_jax.pallas_kernels.context_append import tpu as context_append
from dspark_jax.pallas_kernels.mla_attention import tpu as mla_attention
from tests.aot import schedule
from tests.aot.compile import MARKS, TOPOLOGIES, Kernel, compile_kernel, shape, vmem_bytes

pytestmark = MARKS

BATCH, CONTEXT = 64, 16384


def block(
    K: int, H: int, Hk: int, d: int, size: int, window: int | None = None, batch: int = BATCH
) -> Kernel:
    """Block attention over contexts of 16384 rows in pages of `size`."""
    cache = shape(batch * CONTEXT // size, Hk, size, -(-d // 128) * 128)
    own = shape(batch, K, Hk, d)
    table = shape(batch, CONTEXT // size, dtype="int32")
    return Kernel(
        partial(block_attention.block_attention, window=window, causal=window is not None),
        (shape(batch, K, H, d), own, own, cache, cache, table, shape(batch, dtype="int32")),
    )


def mla(
    H: int, size: int, sparse: bool, S: int = 8, context: int = CONTEXT, batch: int = BATCH
) -> Kernel:
    """GLM-5.2's latent attention: 512 numbers of a latent, 64 rotated in rows of 128."""
    B, r, p = batch, 512, 64
    held = BATCH * context // size
    table = shape(B, context // size, dtype="int32")
    selected = (shape(B, S, context, dtype="bool"),) if sparse else ()
    return Kernel(
        partial(mla_attention.mla_attention, scale=256**-0.5),
        (
            *(shape(B, S, H, r), shape(B, S, H, p)),
            *(shape(held, size, r), shape(held, size, 128)),
            *(table, shape(B, S, dtype="int32"), *selected),
        ),
    )


def append(D: int, Hk: int, d: int, size: int, batch: int = BATCH) -> Kernel:
    """Eight rows of every sequence for five layers; the contexts are donated."""
    rows = shape(batch * 8, dtype="int32")
    context = (shape(batch * CONTEXT // size, Hk, size, -(-d // 128) * 128),) * 5
    kernel = shape(D, 5 * 2 * Hk * d)
    return Kernel(
        partial(context_append.context_append, eps=1e-6, theta=1e6),
        (shape(batch * 8, D), kernel, shape(5, d), rows, rows, rows, context, context),
        donated=(6, 7),
    )


def odd_block(d: int, size: int, Hk: int, ratio: int, dtype: str, P: int = 7) -> Kernel:
    cache, own = shape(20, Hk, size, d, dtype=dtype), shape(3, 5, Hk, d, dtype=dtype)
    query, table = shape(3, 5, Hk * ratio, d, dtype=dtype), shape(3, P, dtype="int32")
    given = (query, own, own, cache, cache, table, shape(3, dtype="int32"))
    settings = {"window": 20, "causal": True}
    assert block_attention.unsupported(*given, **settings) is None
    return Kernel(partial(block_attention.block_attention, **settings), given)


def odd_mla(S: int, H: int, size: int, dtype: str, P: int = 21) -> Kernel:
    latents, turned = shape(40, size, 128, dtype=dtype), shape(40, size, 96, dtype=dtype)
    asked = shape(2, S, H, 128, dtype=dtype), shape(2, S, H, 72, dtype=dtype)
    rows = shape(2, P, dtype="int32"), shape(2, S, dtype="int32")
    given = (*asked, latents, turned, *rows, shape(2, S, P * size, dtype="bool"))
    assert mla_attention.unsupported(*given, scale=0.1) is None
    return Kernel(partial(mla_attention.mla_attention, scale=0.1), given)


def odd_append(R: int, Hk: int, d: int, size: int, dtype: str) -> Kernel:
    rows, context = shape(R, dtype="int32"), (shape(10, Hk, size, d, dtype=dtype),) * 3
    hidden, kernel = shape(R, 64, dtype=dtype), shape(64, 3 * 2 * Hk * d, dtype=dtype)
    given = (hidden, kernel, shape(3, d, dtype=dtype), rows, rows, rows, context, context)
    settings = {"eps": 1e-6, "theta": 1e4}
    assert context_append.unsupported(*given, **settings) is None
    return Kernel(partial(context_append.context_append, **settings), given, donated=(6, 7))


QWEN3 = {"K": 7, "H": 32, "Hk": 8, "d": 128}
GLM = {"K": 8, "H": 64, "Hk": 32, "d": 96, "batch": 8}
"""Its heads are 96 wide; cache rows are 128, or a call would turn the cache round."""
PROMPT = {"S": 512, "batch": 2}
"""The largest chunk that a prompt is read in, of two of the 64 sequences."""
KERNELS = {
    "block_attention, Qwen3-8B, pages": block(**QWEN3, size=16),
    "block_attention, Qwen3-8B, contiguous": block(**QWEN3, size=CONTEXT),
    "block_attention, Qwen3-8B, window": block(**QWEN3, size=16, window=2048),
    "block_attention, GLM-5.2, pages": block(**GLM, size=16),
    "block_attention, GLM-5.2, contiguous": block(**GLM, size=CONTEXT),
    "block_attention, GLM-5.2 of 8 devices": block(K=8, H=8, Hk=4, d=96, size=16),
    "mla_attention, pages": mla(64, 16, sparse=False),
    "mla_attention, contiguous": mla(64, CONTEXT, sparse=False),
    "mla_attention, sparse": mla(64, 16, sparse=True),
    "mla_attention of 8 devices, pages": mla(8, 16, sparse=False),
    "mla_attention of 8 devices, sparse": mla(8, CONTEXT, sparse=True),
    "mla_attention of 8 devices, 131072 rows": mla(8, 131072, sparse=True, context=131072),
    "mla_attention, prompt": mla(64, 16, sparse=False, **PROMPT),
    "mla_attention, sparse prompt": mla(64, 16, sparse=True, **PROMPT),
    "mla_attention of 8 devices, prompt": mla(8, CONTEXT, sparse=False, **PROMPT),
    "mla_attention of 8 devices, sparse prompt": mla(8, 16, sparse=True, **PROMPT),
    "context_append, Qwen3-8B, pages": append(4096, 8, 128, 16, batch=8),
    "context_append, Qwen3-8B, contiguous": append(4096, 8, 128, CONTEXT, batch=8),
    "context_append, GLM-5.2, pages": append(6144, 32, 96, 16, batch=2),
    "context_append, GLM-5.2 of 8 devices": append(6144, 4, 96, 16, batch=16),
}

ODD = {
    "pages of 48 rows": odd_block(128, 48, 2, 3, "float32"),
    "pages of 8 rows": odd_block(96, 8, 3, 1, "float32"),
    "one narrow head": odd_block(32, 16, 1, 8, "bfloat16"),
    "pages of several tiles": odd_block(256, 1072, 5, 1, "bfloat16", P=2),
    "latents, pages of 48 rows": odd_mla(7, 10, 48, "bfloat16"),
    "latents, pages of several tiles": odd_mla(3, 5, 1040, "bfloat16", P=2),
    "latents, a prime number of queries": odd_mla(17, 40, 8, "float32"),
    "appending a row": odd_append(1, 1, 64, 16, "bfloat16"),
    "appending five rows": odd_append(5, 3, 96, 8, "float32"),
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_fits_and_copies_no_cache(name: str, topology: str):
    compiled = compile_kernel(KERNELS[name], topology)
    held, memory = vmem_bytes(compiled), compiled.memory_analysis()
    copied = memory.temp_size_in_bytes
    print(f"{topology} {name}: {held / 2**20:.2f} MiB of vector memory, {copied} bytes copied")
    # Where there is room, the compiler of tpu7x keeps a prompt's 16 MiB of selected rows beside it.
    beside = topology.startswith("tpu7x") and "prompt" in name and "sparse" in name
    assert 0 < held <= (32 if beside else 16) << 20
    assert copied < memory.argument_size_in_bytes / 20


ATTENTION = [
    "block_attention, Qwen3-8B, pages",
    "block_attention, GLM-5.2, pages",
    "mla_attention, pages",
    "mla_attention of 8 devices, sparse",
    "mla_attention of 8 devices, prompt",
]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_what_spills_in_a_main_loop_of_attention_does_not_bound_it(topology: str):
    for name, loop in schedule.main_loops(__name__, ATTENTION, topology).items():
        full = {unit: loop.full(unit) for unit in ("MXU", "VALU", "VLOAD", "VSTORE")}
        shares = ", ".join(f"{unit} {share:.0%}" for unit, share in full.items())
        print(f"{topology} {name}: {loop.bundles} bundles, {loop.spilled} spilled; {shares}")
        assert loop.products > 0
        assert max(full["VLOAD"], full["VSTORE"]) < 0.5
        if name.startswith("block"):
            assert loop.spilled == 0


@pytest.mark.parametrize("name", ODD)
def test_odd_sizes_that_are_not_refused_compile(name: str):
    assert vmem_bytes(compile_kernel(ODD[name], "v5e:2x2")) > 0

"""The only door to `pallas_kernels`: an op runs as the kernel of the device at hand, or as its
reference.

Which of the two is settled while a program is traced, from the default device, shapes and types: a
program for a machine that is not there is traced under `jax.default_device` of one of its devices.
"""

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float8e4m3fn, Int, UInt32

from dspark_jax.sampling import largest

Choice = Literal["auto", "pallas", "reference"]
"""auto: kernels where there are some for the device and the shapes. pallas: an error where there
are none; without an accelerator, interpreted. reference: never."""

PACKAGE = "dspark_jax.pallas_kernels"
CAPABILITIES = {"9.0": "sm_90a", "10.0": "sm_100a", "10.3": "sm_103a"}
"""GPUs there are kernels for: their compute capability, and what it is compiled for."""

LANES = 128
"""Of a TPU's registers."""

_log = logging.getLogger("dspark_jax.ops")


class Backend(NamedTuple):
    """Whose kernels run, and what they are told beside their arguments; or why there are none."""

    file: str | None
    told: Mapping[str, Any]
    why_not: str = ""


class _Chosen:
    """What the process was started with, and what came of it."""

    choice: Choice = "auto"
    picked: dict[str, set[str]] = {}


def use(choice: Choice) -> None:
    """Settle the choice for this process, before any program is traced."""
    _Chosen.choice, _Chosen.picked = choice, {}


@contextlib.contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Another choice for a while; programs traced before and within do not mix."""
    before = _Chosen.choice
    jax.clear_caches()
    use(choice)
    try:
        yield
    finally:
        use(before)
        jax.clear_caches()


def picked() -> Mapping[str, str]:
    """What every op traced so far runs as: "tpu kernel", or why not; all of it where shapes differ.

    In alphabetical order, for programs may be traced side by side.
    """
    return {op: " or ".join(sorted(ways)) for op, ways in sorted(_Chosen.picked.items())}


def told(picks: Mapping[str, str]) -> str:
    """Such picks in one line."""
    return "; ".join(f"{op}: {how}" for op, how in picks.items()) or "no op was traced"


def block_attention(
    query: Float[Array, "B K H d"],
    key: Float[Array, "B K Hk d"],
    value: Float[Array, "B K Hk d"],
    context_key: Float[Array, "N Hk size wide"],
    context_value: Float[Array, "N Hk size wide"],
    pages: Int[Array, "B P"] | None,
    length: Int[Array, "B"],
    *,
    window: int | None,
    causal: bool,
) -> Float[Array, "B K H d"]:
    """What a drafted block's slots take from their context and their block: see its reference."""
    op, how = "block_attention", {"window": window, "causal": causal}
    table = jnp.arange(len(query))[:, None] if pages is None else pages
    given = (query, key, value, context_key, context_value)
    picked = pick(op, *given, table, length, **how)
    # One page per sequence, read where it lies, is no gathering of pages.
    return picked.function(*given, table if picked.is_kernel else pages, length, **how)


def context_append(
    hidden: Float[Array, "R D"],
    kernel: Float[Array, "D n"],
    key_norm: Float[Array, "L d"],
    position: Int[Array, "R"],
    cell_page: Int[Array, "R"],
    cell_place: Int[Array, "R"],
    context_keys: tuple[Float[Array, "N Hk size wide"], ...],
    context_values: tuple[Float[Array, "N Hk size wide"], ...],
    *,
    eps: float,
    theta: float,
) -> tuple[tuple[Float[Array, "N Hk size wide"], ...], tuple[Float[Array, "N Hk size wide"], ...]]:
    """A draft's context with the keys and values of new rows: see its reference."""
    given = (hidden, kernel, key_norm, position, cell_page, cell_place)
    given, how = (*given, context_keys, context_values), {"eps": eps, "theta": theta}
    return pick("context_append", *given, **how).function(*given, **how)


def fp8_matmul(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack i o"],
    scales: Float[Array, "*stack k n"],
    layer: Int[Array, ""] | None,
    *,
    block: tuple[int, int],
) -> Float[Array, "R o"]:
    """Rows times a block-scaled matrix, or one of a stack: see its reference."""
    given = (x, values, scales, layer)
    return pick("fp8_matmul", *given, block=block).function(*given, block=block)


def fp8_matmul_w8a8(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack i o"],
    scales: Float[Array, "*stack k n"],
    layer: Int[Array, ""] | None,
    *,
    block: tuple[int, int],
) -> Float[Array, "R o"]:
    """The same with the rows quantised too."""
    given = (x, values, scales, layer)
    return pick("fp8_matmul.fp8_matmul_w8a8", *given, block=block).function(*given, block=block)


def fp8_experts(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack E i o"],
    scales: Float[Array, "*stack E k n"],
    sizes: Int[Array, "E"],
    layer: Int[Array, ""] | None,
    *,
    block: tuple[int, int],
) -> Float[Array, "R o"]:
    """Rows sorted by expert times their experts' matrices: see its reference."""
    given = (x, values, scales, sizes, layer)
    return pick("fp8_experts", *given, block=block).function(*given, block=block)


def mla_attention(
    latent: Float[Array, "B S H r"],
    rope: Float[Array, "B S H p"],
    context_latent: Float[Array, "N size r"],
    context_rope: Float[Array, "N size wide"],
    pages: Int[Array, "B P"],
    position: Int[Array, "B S"],
    selected: Bool[Array, "B S C"],
    *,
    scale: float,
) -> Float[Array, "B S H r"] | None:
    """What queries take from cached latents: see its reference. None where no kernel is picked.

    XLA reads a contiguous cache where it lies, and only without a list of pages.
    """
    given = (latent, rope, context_latent, context_rope, pages, position, selected)
    picked = pick("mla_attention", *given, scale=scale)
    return picked.function(*given, scale=scale) if picked.is_kernel else None


def markov_block(
    base: Float[Array, "B G own"],
    hidden: Float[Array, "B G D"],
    anchor: Int[Array, "B"],
    state: Float[Array, "B r"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    w1: Float[Array, "V r"],
    w2: Float[Array, "r own"],
    mix_kernel: Float[Array, "m n"] | None,
    mix_bias: Float[Array, "n"] | None,
    target_id: Int[Array, "Vd"],
    *,
    head_type: str,
    first: Int[Array, ""] | int = 0,
    gather: Callable[[Array], Array] | None = None,
) -> Any:
    """A `MarkovBlock`: see its reference. None where no kernel is picked.

    Without one it is cheaper to keep the corrected logits than to read the vocabulary twice. Of a
    vocabulary that several devices share this one has its own entries, from `first` on; `gather`
    puts what they have drawn one behind the other.
    """
    picked = pick_markov_step(base.shape, base.dtype, state.dtype, w2.shape, w2.dtype)
    if not picked.is_kernel:
        return None
    reference = importlib.import_module(f"{PACKAGE}.markov.reference")
    share = None if gather is None else reference.Share(first, len(target_id), gather)
    given = (base, hidden, anchor, state, words, temperature, (w1, w2, mix_kernel, mix_bias))
    return reference.run_block(picked.function, *given, target_id, head_type, share)


def pick_markov_step(
    base: tuple[int, ...], base_type: Any, state_type: Any, w2: tuple[int, ...], w2_type: Any
) -> "Picked":
    """What draws a slot's tokens, by the shapes and types of `markov_block`."""
    (B, G, n), shaped = base, jax.ShapeDtypeStruct
    arrays = (shaped((G, B, n), base_type), shaped((B, w2[0]), state_type), shaped(w2, w2_type))
    words, slot = shaped((B, 2), jnp.uint32), shaped((), jnp.int32)
    return pick("markov.markov_step", *arrays, words, shaped((B,), jnp.float32), slot, slot)


def row_statistics(
    logits: Float[Array, "B S V"], tokens: Int[Array, "B S"], temperature: Float[Array, "B"]
) -> Any:
    """The `RowStatistics` of rows of logits: see its reference.

    XLA reads logits more than once, and of greedy sequences alone nothing but the best entries: the
    other numbers are zeros then.
    """
    given = (logits, tokens, temperature)
    picked = pick("acceptance.row_statistics", *given)
    if picked.is_kernel:
        return picked.function(*given)

    def judged() -> Any:
        return picked.function(*given)._replace(best=None)

    unknown = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(judged))
    found = jax.lax.cond(jnp.any(temperature > 0), judged, lambda: unknown)
    return found._replace(best=largest(logits))


def residual_draw(
    p_logits: Float[Array, "B V"],
    q_logits: Float[Array, "B Vd"],
    p_lse: Float[Array, "B"],
    q_lse: Float[Array, "B"],
    refused: Bool[Array, "B"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    target_id: Int[Array, "Vd"] | None,
) -> Int[Array, "B"]:
    """A draw from the positive part of p - q, or from p: see its reference."""
    given = (p_logits, q_logits, p_lse, q_lse, refused, words, temperature, target_id)
    return pick("acceptance.residual_draw", *given).function(*given)


def row_width(size: int) -> int:
    """How wide a cache row of `size` numbers is: a TPU copies none but whole registers' widths."""
    wanted = backend_of(default_device(), _Chosen.choice).file == "tpu"
    return -(-size // LANES) * LANES if wanted and default_device().platform == "tpu" else size


class Picked(NamedTuple):
    """What runs an op."""

    function: Callable[..., Any]
    is_kernel: bool


def pick(op: str, *arrays: Any, **settings: Any) -> Picked:
    """What runs `op` ("package", or "package.function") on arrays like these.

    Raises ValueError where kernels are demanded in vain.
    """
    backend = backend_of(default_device(), _Chosen.choice)
    package, _, function = op.partition(".")
    kernel, why_not = None, backend.why_not
    if backend.file is not None:
        kernel, why_not = _kernel(package, function or package, backend, arrays, settings)
    if kernel is not None:
        _say(op, f"{backend.file} kernel")
        return Picked(kernel, True)
    if _Chosen.choice == "pallas":
        raise ValueError(f"no kernel runs {op} here: {why_not}; use --kernels auto.")
    _say(op, f"reference ({why_not})")
    reference = importlib.import_module(f"{PACKAGE}.{package}.reference")
    return Picked(getattr(reference, function or package), False)


def default_device() -> Any:
    """The device that programs are traced for."""
    device = getattr(jax.config, "jax_default_device")  # noqa: B009
    return jax.devices(device)[0] if device is None or isinstance(device, str) else device


def backend_of(device: Any, choice: Choice) -> Backend:
    """Whose kernels a device runs."""
    if choice == "reference":
        return Backend(None, {}, "as asked")
    if device.platform == "tpu":
        return Backend("tpu", {})
    if device.platform in ("gpu", "cuda", "rocm"):
        capability = str(getattr(device, "compute_capability", "unknown"))
        if capability not in CAPABILITIES:
            return Backend(None, {}, f"none is for GPUs of compute capability {capability}")
        return Backend("gpu", {"arch": CAPABILITIES[capability]})
    if choice == "pallas":
        return Backend("tpu", {"interpret": True})
    return Backend(None, {}, f"none is for a {device.platform}")


def _kernel(
    package: str,
    function: str,
    backend: Backend,
    arrays: tuple[Any, ...],
    settings: Mapping[str, Any],
) -> tuple[Callable[..., Any] | None, str]:
    """The backend's kernel, or why it does not run these arrays."""
    name = f"{PACKAGE}.{package}.{backend.file}"
    if importlib.util.find_spec(name) is None:
        return None, f"none is written for a {backend.file}"
    module = importlib.import_module(name)
    unsupported = getattr(module, f"unsupported_{function}", None) or module.unsupported
    told = {k: v for k, v in backend.told.items() if k in signature(unsupported).parameters}
    why_not = unsupported(*arrays, **settings, **told)
    if why_not is not None:
        return None, why_not.rstrip(".")

    def kernel(*arrays: Any, **settings: Any) -> Any:
        return getattr(module, function)(*arrays, **settings, **backend.told)

    return kernel, ""


def _say(op: str, how: str) -> None:
    """Once for every op and way."""
    ways = _Chosen.picked.setdefault(op, set())
    if how not in ways:
        _log.info("%s: %s", op, how)
    ways.add(how)

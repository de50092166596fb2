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
from typing import Any, Literal, NamedTuple, get_args

import jax

Choice = Literal["auto", "pallas", "reference"]
"""auto: kernels where there are some for the device and the shapes. pallas: an error where there
are none; without an accelerator, interpreted. reference: never."""

PACKAGE = "dspark_jax.pallas_kernels"
CAPABILITIES = {"9.0": "sm_90a", "10.0": "sm_100a", "10.3": "sm_103a"}
"""GPUs there are kernels for: their compute capability, and what it is compiled for."""

_log = logging.getLogger("dspark_jax.ops")


class Backend(NamedTuple):
    """Whose kernels run, and what they are told beside their arguments; or why there are none."""

    file: str | None
    told: Mapping[str, Any]
    why_not: str = ""


class _Chosen:
    """What the process was started with, and what came of it."""

    choice: Choice = "auto"
    picked: dict[str, str] = {}


def use(choice: Choice) -> None:
    """Settle the choice for this process, before any program is traced. Raises ValueError."""
    if choice not in get_args(Choice):
        raise ValueError(
            f"kernels {choice!r} are unknown; use one of {', '.join(get_args(Choice))}."
        )
    _Chosen.choice = choice


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
    """What every op that was traced so far runs as, last pick first: "tpu kernel", or why not."""
    return dict(_Chosen.picked)


def run(op: str, *arrays: Any, **settings: Any) -> Any:
    """The op's result, by the kernel or the reference that `pick` names."""
    return pick(op, *arrays, **settings)(*arrays, **settings)


def pick(op: str, *arrays: Any, **settings: Any) -> Callable[..., Any]:
    """What runs the op on these arrays. Raises ValueError where kernels are demanded in vain."""
    backend = backend_of(default_device(), _Chosen.choice)
    kernel, why_not = None, backend.why_not
    if backend.file is not None:
        kernel, why_not = _kernel(op, backend, arrays, settings)
    if kernel is not None:
        _say(op, f"{backend.file} kernel")
        return kernel
    if _Chosen.choice == "pallas":
        raise ValueError(f"no kernel runs {op} here: {why_not}; use --kernels auto.")
    _say(op, f"reference ({why_not})")
    return getattr(importlib.import_module(f"{PACKAGE}.{op}.reference"), op)


def default_device() -> Any:
    """The device that programs are traced for."""
    return getattr(jax.config, "jax_default_device") or jax.devices()[0]  # noqa: B009


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
    op: str, backend: Backend, arrays: tuple[Any, ...], settings: Mapping[str, Any]
) -> tuple[Callable[..., Any] | None, str]:
    """The backend's kernel, or why it does not run these arrays."""
    name = f"{PACKAGE}.{op}.{backend.file}"
    if importlib.util.find_spec(name) is None:
        return None, f"none is written for a {backend.file}"
    module = importlib.import_module(name)
    why_not = module.unsupported(*arrays, **settings)
    if why_not is not None:
        return None, why_not.rstrip(".")

    def kernel(*arrays: Any, **settings: Any) -> Any:
        return getattr(module, op)(*arrays, **settings, **backend.told)

    return kernel, ""


def _say(op: str, how: str) -> None:
    """Once for every op and way."""
    if _Chosen.picked.get(op) != how:
        _log.info("%s: %s", op, how)
    _Chosen.picked[op] = how

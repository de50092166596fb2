"""What Pallas kernels state of themselves, read off the traced program.

Compiled TPU programs repeat these estimates, compiled GPU programs drop them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.core import subjaxprs

from dspark_jax.plan.hlo.text import Estimate, Kernel

HLO_TYPES = {"bfloat16": "bf16", "bool": "pred"}
LETTERS = {"float": "f", "int": "s", "uint": "u"}


def stated(jaxpr: Any) -> Mapping[Kernel, Estimate]:
    """The estimate of every kernel that has one, by its name and its first result."""
    return {kernel: estimate for kernel, estimate in _stated(jaxpr)}


def _stated(jaxpr: Any) -> Iterator[tuple[Kernel, Estimate]]:
    for equation in jaxpr.eqns:
        given = equation.params.get("cost_estimate")
        if equation.primitive.name == "pallas_call" and given is not None:
            first = equation.outvars[0].aval
            kernel = (str(equation.params["name"]), hlo_shape(first))
            yield kernel, Estimate(int(given.flops), int(given.bytes_accessed))
    for inner in subjaxprs(jaxpr):
        yield from _stated(inner)


def hlo_shape(aval: Any) -> str:
    """A type as HLO writes it: f32[8,128]."""
    return f"{hlo_type(str(aval.dtype))}[{','.join(map(str, aval.shape))}]"


def hlo_type(dtype: str) -> str:
    """HLO's name of a NumPy type."""
    if dtype in HLO_TYPES:
        return HLO_TYPES[dtype]
    word = dtype.rstrip("0123456789")
    if word in LETTERS:
        return LETTERS[word] + dtype[len(word) :]
    return "f" + dtype.removeprefix("float").replace("_", "")

"""Latent attention on (interpreted) GPUs: the shapes and tolerance of the other kernels.

Shapes are those of test_mla_attention.py in bfloat16, the only type that the GPU kernels take, and
some as wide as GLM-5.2's latents, whose sum is halved. Tolerance: the one explained there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels.gpu_target import plgpu
from dspark_jax.pallas_kernels.mla_attention import gpu
from tests.kernels.gpu_interpreter import ARCHITECTURES, needs_interpreter, run
from tests.kernels.test_mla_attention import CASES, SCALE, SLOW, SPECIFIED, Case, agrees, arrays

pytestmark = needs_interpreter

QUICK = {"first rows", "sparse and rare", "contiguous, tiles overlap"}
WIDE = {
    "more tiles than are held": Case(((166, 999),), pages=11, H=2, p=64, wide=128),
    "several share a context": Case(((520, 200),), size=64, pages=9, H=1, chosen=0.1),
}


def each() -> list[Any]:
    return [
        pytest.param(
            case._replace(dtype="bfloat16"),
            id=name,
            marks=() if name in QUICK else pytest.mark.slow,
        )
        for name, case in (CASES | SLOW).items()
    ]


def wide_arrays(case: Case) -> tuple[Any, ...]:
    """The same with latents of 512 numbers, sized so that scores stay as they are."""
    latent, rope, context, *rest = arrays(case)
    draw = np.random.default_rng(1)

    def normal(like: Any) -> Any:
        return jnp.asarray(draw.normal(size=(*like.shape[:-1], 512)), like.dtype)

    return (normal(latent) / 2, rope, normal(context), *rest)


def settings(arch: str) -> dict[str, Any]:
    return {"scale": SCALE, "arch": arch}


def check(case: Case, given: tuple[Any, ...], arch: str) -> None:
    assert gpu.unsupported(*given, scale=SCALE) is None
    found, fault = run(gpu.mla_attention, *given, **settings(arch))
    assert not fault and found.dtype == jnp.float32
    assert agrees(case, found, SPECIFIED(*given, scale=SCALE))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", each())
def test_the_kernel_agrees_with_the_reference(case: Case, arch: str):
    check(case, arrays(case), arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(WIDE["more tiles than are held"], id="more tiles than are held"),
        pytest.param(WIDE["several share a context"], id="splits", marks=pytest.mark.slow),
    ],
)
def test_latents_of_two_halves_agree_with_the_reference(case: Case, arch: str):
    check(case, wide_arrays(case), arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_a_row_does_not_see_does_not_touch_it(arch: str):
    """Padding gives zeros, unseen rows may be anything finite, unreached pages even NaN."""
    case = Case(((17, 999),), size=32, pages=2)
    latent, rope, *context, pages, position = arrays(case)
    used, beyond = pages[0, 0], jnp.arange(32)[:, None] > 17
    other = [
        jnp.full_like(x, jnp.nan).at[used].set(jnp.where(beyond, 1e4, x[used])) for x in context
    ]
    found, _ = run(gpu.mla_attention, latent, rope, *other, pages, position, **settings(arch))
    wanted = SPECIFIED(latent, rope, *context, pages, position, scale=SCALE)
    assert agrees(case, found, wanted) and not np.any(np.asarray(found[0, 1]))


def test_what_cannot_be_run_is_said():
    for wrong in (
        Case(((3,),), dtype="float32"),
        Case(((3,),), p=48, wide=48),
        Case(((3,),), size=48),
        Case(((3,),), size=12),
    ):
        shapes = jax.eval_shape(lambda wrong=wrong: arrays(wrong))
        said = gpu.unsupported(*shapes, scale=SCALE)
        assert said is not None and said.endswith(".")
    latent, *rest = arrays(Case(((3,),)))
    assert "576" in str(gpu.unsupported(jnp.zeros((1, 1, 4, 576), latent.dtype), *rest, scale=1.0))


# Hopper's commit is between shares and wgmma, the one reader that the interpreter does not follow.
@pytest.mark.parametrize(
    ("forgotten", "arch"),
    [("barrier_wait", "sm_90a"), ("barrier_wait", "sm_100a"), ("commit_smem", "sm_100a")],
)
def test_what_is_not_waited_for_is_noticed(
    forgotten: str, arch: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plgpu, forgotten, lambda *_: None)
    given = arrays(Case(((150,),), size=32, pages=5, H=1))
    _, fault = run(gpu.mla_attention, *given, **settings(arch))
    assert fault

"""How devices are grouped: how many of them share the work of one sequence."""

from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from dspark_jax import draft, sharding
from dspark_jax.fp8 import BlockScaled
from dspark_jax.plan.models import Models
from dspark_jax.plan.program import target_params
from dspark_jax.sharding import DATA, TENSOR
from dspark_jax.targets.load import SCALES, check_blocks
from dspark_jax.targets.mesh import check_mesh, family

USUAL = 8
"""Devices of a group when nothing asks for more or fewer: the GPUs of a host."""


def tensor_size(asked: int | None, devices: int, batch: int, models: Models) -> int:
    """Devices per sequence: what is asked for, if target and draft can be shared so.

    When nothing is asked for, the smallest number from 8 up whose groups can share the batch too,
    else the largest below. ValueError says what cannot be shared.
    """
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    if asked is not None:
        if asked not in divisors:
            raise ValueError(
                f"tensor_parallel {asked} does not divide {devices} devices; use one of "
                f"{', '.join(map(str, divisors))}."
            )
        check_groups(asked, devices, models)
        return asked
    fitting = [n for n in divisors if fits(n, devices, models)]
    even = [n for n in fitting if batch % (devices // n) == 0] or fitting[-1:]
    return next((n for n in even if n >= USUAL), even[-1])


def fits(tensor: int, devices: int, models: Models) -> bool:
    """Whether groups of so many devices can share both models; groups of one always can."""
    try:
        check_groups(tensor, devices, models)
    except ValueError:
        return False
    return True


def check_groups(tensor: int, devices: int, models: Models) -> None:
    """Raise ValueError on what groups of `tensor` devices cannot share evenly."""
    sizes, names = (devices // tensor, tensor), (DATA, TENSOR)
    mesh = AbstractMesh(sizes, names, axis_types=(AxisType.Auto, AxisType.Auto))
    check_mesh(models.target, mesh)
    draft.check_mesh(models.draft, mesh)
    if models.block is None:
        return
    kept, places = {}, {}
    flat = nnx.to_flat_state(target_params(models.target, models.block))
    scaled = {
        path: p.get_raw_value() for path, p in flat if isinstance(p.get_raw_value(), BlockScaled)
    }
    for path, kernel in scaled.items():
        kept |= {path: (kernel.values.shape, kernel.values.dtype)}
        kept |= {(*path, SCALES): (kernel.scales.shape, kernel.scales.dtype)}
    for path, (shape, _) in kept.items():
        spec = sharding.spec(mesh, [*map(str, path)], shape, family(models.target))
        places[path] = NamedSharding(mesh, spec)
    check_blocks(mesh, scaled, kept, places, models.block)

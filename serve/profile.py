"""What every round costs on this device: measured at the start, when nobody waits."""

import time

import jax
import numpy as np

from dspark_jax.paged_words import views
from dspark_jax.serve.programs import Shape, Steps

REPEATS, TOGETHER = 3, 4


def costed(programs: Steps) -> list[Shape]:
    """The shapes that are measured. Edited rounds cost what others do."""
    sizes = programs.sizes
    return [
        Shape(group, budget, pages, False)
        for group in sizes.groups
        for pages in sizes.contexts
        for budget in sizes.budgets(group)
    ]


def measure(programs: Steps) -> dict[Shape, float]:
    """Seconds of every kind of round: the least of a few, as others may use the machine too.

    The rounds serve sequences without pages, so they leave nothing behind: they cost what any
    others do, since shapes alone decide.
    """
    seconds = {}
    for shape in costed(programs):
        program = programs.program(shape)
        told = programs.told(shape.group, shape.pages)
        known = views(programs.columns(shape.pages), np.asarray(told.words))
        known["slot"][:] = range(shape.group)
        known["fresh"][:], known["cap"][:] = 1, programs.sizes.verified
        if programs.chooses(program):
            told = told._replace(seconds=up_to(shape.budget, program.budget))
        taken = []
        jax.block_until_ready(programs.round(program, told, None))
        for _ in range(REPEATS):
            begin = time.perf_counter()
            # One after another, as in serving: the host is not waited for.
            rounds = [programs.round(program, told, None) for _ in range(TOGETHER)]
            jax.block_until_ready(rounds)
            taken.append((time.perf_counter() - begin) / TOGETHER)
        seconds[shape] = min(taken)
    return seconds


def up_to(budget: int, most: int) -> np.ndarray:
    """Seconds with which Algorithm 1 takes so many rows, whatever drafts promise."""
    rows = np.arange(1 + most, dtype=np.float32)
    return np.where(rows <= budget, 1 / (1 + rows), np.inf).astype(np.float32)

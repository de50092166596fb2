"""What every round costs on this device: measured at the start, when nobody waits."""

import time

import jax

from dspark_jax.serve.programs import Programs, Shape

REPEATS, TOGETHER = 3, 4


def costed(programs: Programs) -> list[Shape]:
    """The shapes that are measured. Edited rounds cost what others do."""
    return [shape for shape in programs.shapes() if not shape.edited]


def measure(programs: Programs) -> dict[Shape, float]:
    """Seconds of every kind of round: the least of a few, as others may use the machine too.

    The rounds serve sequences without pages, so they leave nothing behind: they cost what any
    others do, since shapes alone decide.
    """
    seconds = {}
    for shape in costed(programs):
        control = programs.control(shape.group, shape.pages)
        control.slot[:] = range(shape.group)
        control.fresh[:], control.cap[:] = True, programs.sizes.verified
        taken = []
        jax.block_until_ready(programs.round(shape, control, None))
        for _ in range(REPEATS):
            begin = time.perf_counter()
            # One after another, as in serving: the host is not waited for.
            rounds = [programs.round(shape, control, None) for _ in range(TOGETHER)]
            jax.block_until_ready(rounds)
            taken.append((time.perf_counter() - begin) / TOGETHER)
        seconds[shape] = min(taken)
    return seconds

"""The command line of a run as it can be typed again."""

import shlex
from collections.abc import Sequence

ONCE = ("--fresh", "--no-resume")
"""Flags that begin a run; given again they would delete it or refuse to go on with it."""
ANEW = ("--steps", "--output", "--warm-start")
"""Flags, each with a value, that the next run gives anew."""


def command(arguments: Sequence[str]) -> str:
    """What to type."""
    return shlex.join(["python", "-m", "dspark_jax.train", *arguments])


def going_on(arguments: Sequence[str]) -> list[str]:
    """The flags that go on with a run which has begun."""
    return [word for word in arguments if flag(word) not in ONCE]


def repeated(arguments: Sequence[str]) -> list[str]:
    """The flags that go on, but those that the next run gives anew."""
    kept, skip = [], False
    for word in going_on(arguments):
        anew = flag(word) in ANEW
        if not (anew or skip):
            kept.append(word)
        skip = anew and "=" not in word
    return kept


def flag(word: str) -> str:
    """The name of a flag without its value; tyro takes _ for - in it."""
    return word.split("=")[0].replace("_", "-")

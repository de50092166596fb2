"""`python -m dspark_jax.convert`: the command line of conversions."""

import sys
from collections.abc import Callable
from typing import Any

import tyro

from dspark_jax.convert.settings import Command, Export, Import


def main() -> int:
    """Exit code 0; 2 with one sentence for what the user can mend."""
    given = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="python -m dspark_jax.convert",
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    try:
        print(job(given)(given))
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def job(given: Any) -> Callable[[Any], str]:
    """What does it; jax is imported only once the flags are right."""
    if isinstance(given, Export):
        from dspark_jax.convert.exporting import export_draft

        return export_draft
    if isinstance(given, Import):
        from dspark_jax.convert.importing import import_draft

        return import_draft
    from dspark_jax.convert.inspecting import inspect_draft

    return inspect_draft


if __name__ == "__main__":
    sys.exit(main())

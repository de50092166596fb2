"""`python -m dspark_jax.convert`: the command line of conversions."""

import sys
from collections.abc import Callable
from typing import Any

import tyro

from dspark_jax.convert.settings import Command, Doctor, Export, Import, Target


def main() -> int:
    """Exit code 0, 1 for a draft that does not fit; 2 with one sentence for what can be mended."""
    given = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="python -m dspark_jax.convert",
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    try:
        told = job(given)(given)
        said, code = told if isinstance(told, tuple) else (told, 0)
        print(said)
        return code
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def job(given: Any) -> Callable[[Any], str | tuple[str, int]]:
    """What does it; jax is imported only once the flags are right."""
    if isinstance(given, Export):
        from dspark_jax.convert.exporting import export_draft

        return export_draft
    if isinstance(given, Import):
        from dspark_jax.convert.importing import import_draft

        return import_draft
    if isinstance(given, Doctor):
        from dspark_jax.convert.doctor import examine

        return examine
    if isinstance(given, Target):
        from dspark_jax.convert.target import convert_target

        return convert_target
    from dspark_jax.convert.inspecting import inspect_draft

    return inspect_draft


if __name__ == "__main__":
    sys.exit(main())

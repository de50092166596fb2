"""`python -m dspark_jax.serve`: the command line of serving."""

import os
import sys

import tyro

from dspark_jax.leaving import leave
from dspark_jax.serve.settings import ServeSettings, check, read_speculation


def main() -> int:
    """Exit code 0, also after SIGTERM; 1 when the engine failed; 2 with one sentence otherwise."""
    return leave(outcome())


def outcome() -> int:
    """Serve, and say in one line why not."""
    given = tyro.cli(
        ServeSettings,
        prog="python -m dspark_jax.serve",
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    try:
        speculation = read_speculation(given.speculative_config)
        check(given, speculation)
        # Only tokenizers are used; without this, transformers warns that torch is missing.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from dspark_jax.hosts import join  # jax is imported only once the flags are right
        from dspark_jax.serve.run import run

        join(given.hosts)
        return run(given, speculation)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""`python -m dspark_jax.plan`: the command line."""

import sys

import tyro

from dspark_jax.plan.settings import PlanSettings
from dspark_jax.plan.topology import set_environment


def parse(arguments: list[str]) -> PlanSettings:
    """The command line."""
    return tyro.cli(PlanSettings, args=arguments, prog="python -m dspark_jax.plan")


def main() -> int:
    """Exit code 0, also when the plan does not fit; 2 with one sentence for what can be mended."""
    try:
        settings = parse(sys.argv[1:])
        set_environment()
        from dspark_jax.plan.run import run  # jax is imported only once the flags are right

        run(settings)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

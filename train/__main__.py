"""`python -m dspark_jax.train`: the command line of training."""

import argparse
import sys

import tyro

from dspark_jax.train.settings import PRESETS, TrainSettings


def parse(arguments: list[str]) -> TrainSettings:
    """Settings from the command line: `--preset` first, then every other flag on top of it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    chosen, rest = first.parse_known_args(arguments)
    return tyro.cli(
        TrainSettings,
        args=rest,
        default=PRESETS[chosen.preset],
        prog="python -m dspark_jax.train",
        description=f"{TrainSettings.__doc__}\n\n--preset NAME sets the defaults; names: "
        f"{', '.join(sorted(PRESETS))} (default tiny).",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def main() -> int:
    """Exit code 0; 1 when the proof failed; 2 with one sentence for what the user can mend."""
    settings = parse(sys.argv[1:])
    from dspark_jax.train.run import run  # jax is imported only once the flags are right

    try:
        return 0 if run(settings, sys.argv[1:]) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

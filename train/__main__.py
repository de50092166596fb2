"""`python -m dspark_jax.train`: the command line of training."""

import argparse
import sys
from pathlib import Path

import tyro

from dspark_jax.train.config_file import read_config
from dspark_jax.train.presets import PRESETS
from dspark_jax.train.settings import Command


def parse(arguments: list[str]) -> Command:
    """The command line: `--preset` or `--config` first, then every other flag on top of it.

    Raises ValueError when the given config cannot be used.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    first.add_argument("--config", type=Path)
    chosen, _ = first.parse_known_args(arguments)
    settings = PRESETS[chosen.preset] if chosen.config is None else read_config(chosen.config)
    return tyro.cli(
        Command,
        args=arguments,
        default=Command(settings),
        prog="python -m dspark_jax.train",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def main() -> int:
    """Exit code 0; 1 when the proof failed; 2 with one sentence for what the user can mend.

    Training that is stopped by Ctrl-C or SIGTERM saves what it has and ends with 0.
    """
    arguments = sys.argv[1:]
    try:
        command = parse(arguments)
        from dspark_jax.train.run import run  # jax is imported only once the flags are right

        return 0 if run(command, arguments) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; once that is mended, the same command goes on.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

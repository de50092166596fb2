"""`python -m dspark_jax.train`: the command line of training."""

import argparse
import sys
import traceback
from pathlib import Path

import tyro

from dspark_jax.leaving import leave
from dspark_jax.train.command_line import command
from dspark_jax.train.config_file import read_config
from dspark_jax.train.presets import PRESETS
from dspark_jax.train.settings import Command
from dspark_jax.train.stopping import Stop, Stopped, stoppable


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

    What Ctrl-C or SIGTERM stops has saved what it has and ends with 0; the second one in the same
    step does not wait for it to save and ends with 130.
    """
    with stoppable() as stop:
        try:
            code = outcome(sys.argv[1:], stop)
        except Exception:
            traceback.print_exc()
            code = 1
    return leave(code)


def outcome(arguments: list[str], stop: Stop) -> int:
    """Run, and say in one line why it ended early."""
    stop.command = command(arguments)
    try:
        given = parse(arguments)
        from dspark_jax.hosts import join  # jax is imported only once the flags are right
        from dspark_jax.train.run import run

        join(given.hosts)
        return 0 if run(given, arguments) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; once that is mended, go on: {stop.command}", file=sys.stderr)
        return 2
    except Stopped:
        if stop.speaks:
            print(stop.line())
        return 0


if __name__ == "__main__":
    sys.exit(main())

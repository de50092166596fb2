"""What a run says at its start and its end."""

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from dspark_jax.config import DraftConfig
from dspark_jax.target_folder import TargetFiles
from dspark_jax.targets.load import params_shapes
from dspark_jax.train.command_line import command, repeated
from dspark_jax.train.devices import Meshes, gigabytes
from dspark_jax.train.draft_files import WarmStart
from dspark_jax.train.proof import holds
from dspark_jax.train.settings import TrainSettings


def summary(
    found: TargetFiles,
    start: WarmStart,
    config: DraftConfig,
    meshes: Meshes,
    needed: Mapping[str, int],
) -> str:
    """The models and where they run; `needed` is in bytes per device."""
    mesh = meshes.draft
    return (
        f"target {found.folder.name}: {count(params_shapes(found.config, None, 'float32')):,} "
        f"parameters; draft {count(start.params):,} ({config.draft_length} tokens a round, Markov "
        f"rank {config.markov_rank}); {mesh.size} of {jax.device_count()} "
        f"{mesh.devices.flat[0].platform} device(s), at least "
        f"{gigabytes(sum(needed.values()))} each"
    )


def closing(
    console: Console,
    settings: TrainSettings,
    report: dict[str, Any],
    arguments: Sequence[str],
) -> None:
    """The last lines: what came out, where it is, what to type next."""
    for name, part in report["served"].items():
        console.print(
            f"{name}: acceptance length {part['acceptance_length']:.2f}, "
            f"{part['tokens_per_second']:.0f} tokens/s against "
            f"{part['plain_tokens_per_second']:.0f} plain ({part['speedup']:.2f}x)"
            + fastest(part["by_verify_length"])
        )
    elsewhere = report["served"]["greedy"].get("transformers")
    if elsewhere is not None:
        console.print(
            f"transformers' generate on the same files: "
            f"{elsewhere['tokens_per_second']:.0f} tokens/s"
        )
    same = "yes" if holds(report["served"]) else "NO, see the report"
    console.print(f"greedy answers identical to plain decoding: {same}")
    checkpoint = report["checkpoint"]
    console.print(f"checkpoint {checkpoint}")
    console.print(f"report     {settings.output / 'report.md'}")
    console.print(f"serve it   python -m dspark_jax.serve --checkpoint {settings.output}")
    console.print(
        "next       "
        + command(
            [*repeated(arguments), "--warm-start", checkpoint, "--steps", "2000"]
            + ["--output", f"{settings.output}-longer"]
        )
    )


def fastest(lengths: Mapping[str, Mapping[str, float]]) -> str:
    """What verifying less of a block brings, if it brings anything."""
    best, whole = max(lengths, key=lambda n: lengths[n]["speedup"]), max(map(int, lengths))
    if int(best) == whole:
        return ""
    return f"; {lengths[best]['speedup']:.2f}x where {best} of {whole} drafts are verified"


def machine() -> str:
    """What the numbers were taken on."""
    device = jax.devices()[0]
    return (
        f"{jax.device_count()} {device.device_kind} ({device.platform}), {os.cpu_count()} CPU "
        f"cores, Python {platform.python_version()}, jax {jax.__version__}"
    )


def count(params: Any) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))

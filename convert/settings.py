"""What the commands of `python -m dspark_jax.convert` are told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dspark_jax.config import MarkovHeadType
from dspark_jax.draft_formats.formats import FormatName

EngineName = Literal["vllm", "sglang"]


@dataclass(frozen=True)
class Export:
    """Write a trained or imported draft in a published format, with a model card."""

    checkpoint: Path
    """Folder of a training run, of its draft, or of an imported draft."""
    output: Path
    """Folder to make; it may exist if it is empty."""
    target_name: str
    """Hub id (ORG/MODEL) of the target that the draft is served with."""
    format: FormatName = "speculators"
    engine: EngineName = "vllm"
    """Engine that is to serve it; what it cannot serve is refused."""
    allow_unservable: bool = False
    """Write even what the engine cannot serve."""
    target: str | None = None
    """Target's folder or hub id, where its embedding or head has to be copied; the run's own when
    not given."""


@dataclass(frozen=True)
class Import:
    """Make a published draft ready to be trained on, served, or exported again."""

    source: str
    """Folder or hub id (org/name[@revision]): speculators, DeepSpec, SpecForge or DFlash."""
    output: Path
    """Folder to make; it may exist if it is empty."""
    target_name: str | None = None
    """Hub id of the target, for formats that do not name it."""
    markov_rank: int = 256
    """Rank of the Markov head that a DFlash draft gets; 0 for none."""
    markov_head_type: MarkovHeadType = "vanilla"
    """Kind of the Markov head that a DFlash draft gets."""
    confidence_head: bool = True
    """Whether a DFlash draft gets a confidence head."""
    seed: int = 0
    """Draws the heads that a DFlash draft gets."""


@dataclass(frozen=True)
class Inspect:
    """Say what a draft checkpoint is, who can serve it, and what is suspicious about it."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder or hub id (org/name[@revision])."""


Command = (
    Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)

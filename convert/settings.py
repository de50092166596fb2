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


@dataclass(frozen=True)
class Doctor:
    """Say whether a draft really fits its target, and if not, what in its files is wrong.

    Exit code 0 only when the draft works and no other reading of its files is better; 1 when one
    is, or the draft is of no use.
    """

    draft: str
    """Folder or hub id (org/name[@revision]) of a draft in any format, or a run's folder."""
    target: str
    """Folder or hub id of its target."""
    prompts: Path | None = None
    """A prompt a line, or a JSON object with `prompt` or `turns`; 32 built-in ones if not given."""
    prompt_tokens: int = 256
    """Longest prompt; of a longer one the last tokens are kept."""
    answer_tokens: int = 64
    """Longest answer of the target, greedy."""
    blocks: int = 24
    """Blocks judged of every answer."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the target runs."""
    tensor_parallel: int = 1
    """Devices that share the target."""
    json: Path | None = None
    """File for the same as an object."""


@dataclass(frozen=True)
class Target:
    """Write a target's weights as Orbax arrays, which load faster and onto any mesh.

    Configuration, tokenizer and chat template are copied beside them: give the folder as --target.
    """

    source: str
    """Folder or hub id (org/name[@revision]) of a GLM-5 or Qwen3 in safetensors."""
    output: Path
    """Folder to make; it may exist if it is empty."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the weights, as they are stored when not given; FP8 ones stay as they are. Narrowed
    weights are another target: drafts made for the source are not taken for theirs."""
    devices: int | None = None
    """Devices that read and write; all when not given."""
    tensor_parallel: int = 1
    """Of these, devices that share each layer."""


Command = (
    Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Target, tyro.conf.subcommand("target")]
)

"""One training step of dspark-jax against one of speculators 0.9.0, on this machine's CPU.

    python benchmarks/train_step.py [--shape tiny|qwen] [--steps 10] [--repeats 5] [--threads 2]

A step starts from the target's hidden states in memory (no side runs the target): draw anchors, run
the draft, loss {ce 0.1, tv 0.9} + confidence, decay 4, backward, clip at 1, Muon and AdamW update,
metrics. Both sides get the same weights, the same packed row and as many anchors, in float32
(both run Muon's Newton-Schulz in bfloat16), and must agree on the loss of the first step, which
takes the same anchors. Compilation and warm-up steps are not counted.

Sides take turns, each time in a process of its own with the same two cores; speculators with every
attention it has, and, for information, under the bfloat16 autocast it trains with by default. In
the same environment: `pip install -e . torch==2.13.0 transformers==5.19.0 speculators==0.9.0`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from dspark_jax.config import DraftConfig

HERE = Path(__file__).parent
WARMUP_STEPS = 3
DOCUMENTS = 6
AGREEMENT = 1e-4
"""Largest relative difference between the sides' losses in float32."""


class Shape(NamedTuple):
    """A draft, and the packed row it is trained on."""

    draft: DraftConfig
    tokens: int
    anchors: int


SHAPES = {
    # The `tiny` preset's draft for tiny-glm; its two rows of 512 with 96 anchors each are one row
    # here, because speculators takes one packed row per step.
    "tiny": Shape(
        DraftConfig(
            vocab_size=512,
            draft_vocab_size=512,
            hidden_size=384,
            intermediate_size=384,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=96,
            aux_layer_ids=(1, 2, 3),
            mask_token_id=511,
            markov_rank=64,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
        ),
        tokens=1024,
        anchors=192,
    ),
    "qwen": Shape(
        DraftConfig(
            vocab_size=32_000,
            draft_vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=2,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=64,
            aux_layer_ids=(1, 2, 3),
            mask_token_id=31_999,
            markov_rank=256,
        ),
        tokens=1024,
        anchors=64,
    ),
}

OURS, AUTOCAST = "dspark-jax", "speculators sdpa, bfloat16 autocast"
THEIRS = {
    "speculators sdpa": ["--attention", "sdpa"],
    "speculators eager": ["--attention", "eager"],
    "speculators simple_flex_attention": ["--attention", "simple_flex_attention"],
    AUTOCAST: ["--attention", "sdpa", "--precision", "bfloat16"],
}
"""Arguments of `speculators_step.py` for every configuration."""


class Side(NamedTuple):
    """What the processes of a side measured: seconds of their steps, the loss of the first one."""

    seconds: list[list[float]]
    loss: float
    phases: dict[str, float]
    """Median seconds in the last process; ours is one program and has none."""

    @property
    def median(self) -> float:
        """Seconds per step, over all steps of all processes."""
        return statistics.median(second for process in self.seconds for second in process)


def main() -> None:
    """Measure all sides in turn and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a process")
    parser.add_argument("--repeats", type=int, default=5, help="processes per side")
    parser.add_argument("--threads", type=int, default=2, help="cores of a process")
    parser.add_argument("--ours-on", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    if given.ours_on:
        seconds, loss = jax_step(shape, given.ours_on, given.steps)
        print(json.dumps({"seconds": seconds, "loss": loss}))
        return
    # XLA and torch make as many threads as they have cores; children inherit the choice.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), shape)
        sides = measure(Path(folder), given)
    report(sides, shape, given)


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Side]:
    """Run every side `repeats` times, in turn; what speculators cannot run here is left out."""
    steps = ["--steps", str(given.steps)]
    theirs = [str(HERE / "speculators_step.py"), str(folder), "--threads", str(given.threads)]
    ours = [str(Path(__file__)), "--shape", given.shape, "--ours-on", str(folder)]
    commands = {OURS: ours} | {name: [*theirs, *flags] for name, flags in THEIRS.items()}
    sides: dict[str, Side] = {}
    for _ in range(given.repeats):
        for name in list(commands):
            done = child([*commands[name], *steps])
            if done.returncode:
                if name == OURS:
                    raise SystemExit(done.stderr)
                print(f"{name} does not run here: {last_line(done.stderr)}")
                del commands[name]
                continue
            found = json.loads(last_line(done.stdout))
            before = sides[name].seconds if name in sides else []
            seconds = [*before, found["seconds"]]
            sides[name] = Side(seconds, found["loss"], found.get("phases", {}))
    return sides


def child(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a script with this interpreter, on the CPU."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return text.strip().rpartition("\n")[2]


def report(sides: dict[str, Side], shape: Shape, given: argparse.Namespace) -> None:
    """Print the machine, a line per side and the ratio; exit when the losses disagree."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "speculators"))
    print(f"{cpu()}, {given.threads} threads, Python {platform.python_version()}, {versions}")
    print(
        f"one step of {shape.tokens} tokens and {shape.anchors} anchors ({given.shape}), "
        f"{given.repeats} processes of {given.steps} steps per side"
    )
    print(f"{'':36}  median ms  (of a process)   first loss")
    for name, side in sides.items():
        medians = [1e3 * statistics.median(process) for process in side.seconds]
        phases = ", ".join(f"{phase} {1e3 * s:.1f}" for phase, s in side.phases.items())
        spread = f"({min(medians):.1f} to {max(medians):.1f})"
        print(f"{name:36} {1e3 * side.median:10.1f}  {spread:16} {side.loss:10.6f}  {phases}")
    float32 = {name: side for name, side in sides.items() if name not in (OURS, AUTOCAST)}
    rivals = [min(float32, key=lambda name: float32[name].median), AUTOCAST]
    for rival in rivals:
        if rival in sides:
            print(f"{OURS} is {sides[rival].median / sides[OURS].median:.2f}x as fast as {rival}")
    for name, side in float32.items():
        if abs(side.loss / sides[OURS].loss - 1) > AGREEMENT:
            raise SystemExit(f"{name} has another loss than {OURS}: not the same step.")


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write_inputs(folder: Path, shape: Shape) -> None:
    """What both sides read: draft/ and verifier/ in Hugging Face layout, and batch.npz."""
    rng = np.random.default_rng(0)
    write_verifier(folder / "verifier", shape.draft, rng)
    write_draft(folder / "draft", folder / "verifier", shape.draft, rng)
    np.savez(folder / "batch.npz", **packed_row(shape, rng))


def write_verifier(folder: Path, config: DraftConfig, rng: np.random.Generator) -> None:
    """The target's embedding, head and final norm, and the config speculators looks up."""
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": normal(rng, 0.02, config.vocab_size, config.hidden_size),
        "lm_head.weight": normal(rng, 0.1, config.vocab_size, config.hidden_size),
        "model.norm.weight": 1 + normal(rng, 0.1, config.hidden_size),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    described |= {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}
    (folder / "config.json").write_text(json.dumps(described))


def write_draft(
    folder: Path, verifier: Path, config: DraftConfig, rng: np.random.Generator
) -> None:
    """A draft checkpoint as published, with drawn weights."""
    from dspark_jax.draft_formats.speculators import config_to_json
    from dspark_jax.draft_weights import parameter_table

    def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return 1 + normal(rng, 0.1, *shape) if "norm" in name else normal(rng, 0.02, *shape)

    folder.mkdir()
    tensors = {row.name: drawn(row.name, row.shape) for row in parameter_table(config)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = config_to_json(config, str(verifier), ["Qwen3ForCausalLM"], "float32")
    (folder / "config.json").write_text(json.dumps(described))


def packed_row(shape: Shape, rng: np.random.Generator) -> dict[str, Any]:
    """Documents of random tokens and states, a third of each a prompt, then some padding."""
    T, D, A = shape.tokens, shape.draft.hidden_size, len(shape.draft.aux_layer_ids)
    lengths = rng.multinomial(T - T // 32, np.full(DOCUMENTS, 1 / DOCUMENTS))
    padding = T - lengths.sum()
    document = np.repeat([*range(DOCUMENTS), -1], [*lengths, padding])
    position = np.concatenate([*map(np.arange, lengths), np.zeros(padding, int)])
    answer = np.concatenate([np.arange(n) >= n // 3 for n in lengths])
    loss_mask = np.concatenate([answer, np.zeros(padding, bool)])
    eligible = np.flatnonzero(loss_mask[: -shape.draft.block_size])
    return {
        "aux_hidden": normal(rng, 1.0, 1, T, A * D),
        "final_hidden": normal(rng, 1.0, 1, T, D),
        "tokens": rng.integers(0, shape.draft.mask_token_id, (1, T), np.int32),
        "loss_mask": loss_mask[None],
        "document": document[None].astype(np.int32),
        "position": position[None].astype(np.int32),
        "anchor": np.sort(rng.choice(eligible, shape.anchors, False))[None].astype(np.int32),
    }


def normal(rng: np.random.Generator, std: float, *shape: int) -> np.ndarray:
    """Float32 numbers from N(0, std²)."""
    return np.float32(std) * rng.standard_normal(shape, np.float32)


def jax_step(shape: Shape, folder: Path, steps: int) -> tuple[list[float], float]:
    """Seconds of every step of the trainer on FOLDER's inputs, and the loss of the first one."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dspark_jax.anchors import make_blocks
    from dspark_jax.draft import dspark_draft
    from dspark_jax.draft_weights import params_from_tensors
    from dspark_jax.layers import rms_norm
    from dspark_jax.train.devices import make_meshes
    from dspark_jax.train.hidden_states import HiddenStates
    from dspark_jax.train.settings import OptimizerSettings, TrainSettings
    from dspark_jax.train.trainer import Job, init_state, make_objective, make_step, on_mesh
    from dspark_jax.types import Batch, Frozen, Target, TargetStates

    def unembed(verifier: Any, hidden: Any) -> Any:
        normed = rms_norm(hidden, verifier["norm"], shape.draft.rms_norm_eps)
        return jnp.matmul(normed, verifier["head"])

    unused: dict[str, Any] = dict.fromkeys(Target._fields)
    arrays = np.load(folder / "batch.npz")
    tensors = load_file(folder / "verifier" / "model.safetensors")
    head = jnp.asarray(tensors["lm_head.weight"].T)
    verifier = {"norm": jnp.asarray(tensors["model.norm.weight"]), "head": head}
    embed = jnp.asarray(tensors["model.embed_tokens.weight"])
    job = Job(
        TrainSettings(
            sequence_length=shape.tokens,
            batch_rows=1,
            max_anchors=shape.anchors,
            optimizer=OptimizerSettings(),  # speculators' defaults
        ),
        shape.draft,
        Target(**unused | {"unembed": unembed}),
        dspark_draft(shape.draft),
        HiddenStates(lambda packed: (packed, None), lambda params, batch, fetched: fetched),
        make_meshes(TrainSettings()),
        verifier,
        Frozen(embed, head, jnp.arange(shape.draft.vocab_size)),
    )
    segment = arrays["document"] + 1
    batch = Batch(arrays["tokens"], arrays["loss_mask"], segment, arrays["position"])
    states = TargetStates(arrays["aux_hidden"], arrays["final_hidden"])
    weights = load_file(folder / "draft" / "model.safetensors")
    params = nnx.state(params_from_tensors(shape.draft, weights), nnx.Param)

    anchor = jnp.asarray(arrays["anchor"])
    valid = jnp.ones(anchor.shape, bool)
    blocks = make_blocks(  # supervised across documents, as in speculators
        anchor, valid, *batch[:3], shape.draft, mask_cross_document=False
    )
    objective = jax.jit(make_objective(job))
    loss, _ = objective(params, job.target_params, job.frozen, batch, states, blocks)

    step, state, seconds = make_step(job), init_state(job, params), []
    given = (job.target_params, job.frozen, *on_mesh(job, (batch, states)))
    for _ in range(WARMUP_STEPS + steps):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, *given))
        seconds.append(time.perf_counter() - started)
    return seconds[WARMUP_STEPS:], float(loss)


if __name__ == "__main__":
    main()

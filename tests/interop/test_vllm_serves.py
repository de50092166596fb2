"""vLLM serves our drafts: at temperature 0 it answers as we do and accepts as much in every step.

`tests/interop/set-up-server` makes the environment of a real server, DSPARK_JAX_VLLM_SERVER names
its folder; without it these tests are skipped. A small Qwen3 and three drafts for it are trained
and exported by the commands that users type, the server is started as the draft's card says. With
DSPARK_JAX_VLLM_WORK=FOLDER the models, logs and the table stay there and are used again.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from dspark_jax.target_folder import find_target
from dspark_jax.train.conversations import prompt_tokens
from dspark_jax.train.prompts import fitting, library_prompts
from tests.interop.our_answers import Answer, make_answerer
from tests.interop.vllm_server import Served, serving

HERE = Path(__file__).resolve().parent
ENVIRONMENT = os.environ.get("DSPARK_JAX_VLLM_SERVER")
TARGET_NAME = "local/small-qwen3"
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 60, 96, 32
AT_ONCE = 8
NEAR_TIE, LARGEST_SHARE_LEFT_OUT = 1e-3, 0.02
TRAINING = (
    *("--steps", "300", "--sequence-length", "256", "--batch-rows", "4", "--max-anchors", "48"),
    *("--num-layers", "2", "--save-every", "150", "--serve-prompts", "4"),
    *("--prompt-tokens", str(PROMPT_TOKENS), "--answer-tokens", "64"),
)
DRAFTS = {
    "all slots predict": (),
    "1+N": ("--no-sample-from-anchor",),
    "256 of 512 tokens": ("--draft-vocab-size", "256"),
}
"""What tells each draft's training from the others'."""
COLUMNS = (
    *("draft", "drafts a step", "prompts", "tokens", "steps", "accepted, ours", "accepted, vLLM"),
    *("acceptance length, ours", "vLLM", "left out", "differing"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        ENVIRONMENT is None or not (Path(ENVIRONMENT) / "bin" / "vllm").exists(),
        reason="no vLLM server: tests/interop/set-up-server makes one, "
        "DSPARK_JAX_VLLM_SERVER names its folder",
    ),
]


class Compared(NamedTuple):
    """The answers to one prompt."""

    prompt: list[int]
    ours: Answer
    theirs: Served

    @property
    def near_tie(self) -> bool:
        return self.ours.gap < NEAR_TIE

    @property
    def same(self) -> bool:
        return self.ours[:2] == self.theirs[:2]


def command(*words: object) -> None:
    """Run one of this package's commands in a process of its own, on one device."""
    given = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=given
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models, logs and the table are."""
    given = os.environ.get("DSPARK_JAX_VLLM_WORK")
    return Path(given).resolve() if given else tmp_path_factory.mktemp("vllm-serves")


@pytest.fixture(scope="module")
def target(work: Path) -> Path:
    """The small Qwen3."""
    folder = work / "target"
    if not (folder / "generation_config.json").exists():
        command(HERE / "small_qwen3.py", "--output", folder)
    return folder


@pytest.fixture(scope="module")
def exports(work: Path, target: Path) -> dict[str, Path]:
    """Every draft trained and exported; all learn from the answers made for the first."""
    made, data = {}, ()
    for name, flags in DRAFTS.items():
        run, output = work / "runs" / name, work / "exports" / name
        if not (output / "model.safetensors").exists():
            training = ("dspark_jax.train", "--target", target, "--output", run)
            command("-m", *training, *TRAINING, *(data or ("--conversations", 512)), *flags)
            export = ("dspark_jax.convert", "export", "--checkpoint", run, "--output", output)
            command("-m", *export, "--target-name", TARGET_NAME)
        made[name] = output
        data = data or ("--data", run / "data" / "train.jsonl")
    return made


@pytest.fixture(scope="module")
def prompts(target: Path) -> list[list[int]]:
    """Functions of files that neither the target nor the drafts have seen."""
    tokenizer = find_target(target, ()).tokenizer
    texts = fitting(tokenizer, library_prompts(0).held_out, PROMPT_TOKENS, PROMPTS)
    asked = [[{"role": "user", "content": text}] for text in texts]
    return [prompt_tokens(tokenizer, messages).tolist() for messages in asked]


@pytest.fixture(scope="module")
def table(work: Path) -> Iterator[list[str]]:
    """Rows of what was compared, written and shown when all are there."""
    rows = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    yield rows
    (work / "table.md").write_text("\n".join(rows) + "\n")
    print("\n" + "\n".join(rows))


def accepted(compared: Sequence[Compared]) -> tuple[list[list[int]], list[list[int]]]:
    """Accepted drafts of every step of every answer, ours and theirs."""
    return [c.ours.accepted for c in compared], [c.theirs.accepted for c in compared]


def row(name: str, compared: Sequence[Compared]) -> str:
    """One draft's numbers, over the prompts that were not left out."""
    kept = [c for c in compared if not c.near_tie]
    steps, their_steps = (sum(map(len, x)) for x in accepted(kept))
    ours, theirs = (sum(map(sum, x)) for x in accepted(kept))
    cells = (
        *(name, compared[0].theirs.drafted[0], len(compared)),
        *(sum(len(c.ours.tokens) for c in kept), steps, ours, theirs),
        *(f"{1 + ours / steps:.3f}", f"{1 + theirs / their_steps:.3f}"),
        *(len(compared) - len(kept), sum(not c.same for c in kept)),
    )
    return f"| {' | '.join(map(str, cells))} |"


def told(number: int, one: Compared) -> str:
    """Where two answers part."""
    return (
        f"prompt {number}, gap {one.ours.gap:.1e}, {'same' if one.same else 'other'} answer\n"
        f"  prompt {one.prompt}\n  tokens ours {one.ours.tokens}\n       vLLM {one.theirs.tokens}\n"
        f"  accepted ours {one.ours.accepted}\n         vLLM {one.theirs.accepted}"
    )


@pytest.mark.parametrize("name", DRAFTS)
def test_vllm_answers_and_accepts_as_we_do(
    name: str,
    work: Path,
    target: Path,
    exports: dict[str, Path],
    prompts: list[list[int]],
    table: list[str],
):
    answer = make_answerer(target, exports[name], PROMPT_TOKENS, ANSWER_TOKENS)
    ours = [answer(prompt) for prompt in prompts]
    log = work / f"vllm, {name}.log"
    with (
        serving(Path(ENVIRONMENT or "").resolve(), target, exports[name], log) as server,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        theirs = list(pool.map(lambda p: server.complete(p, ANSWER_TOKENS), prompts))
    compared = [Compared(*each) for each in zip(prompts, ours, theirs, strict=True)]
    table.append(row(name, compared))
    left_out = [told(i, c) for i, c in enumerate(compared) if c.near_tie]
    print(f"\n{name}: left out", *left_out, sep="\n")
    differing = [told(i, c) for i, c in enumerate(compared) if not c.near_tie and not c.same]
    assert not differing, "\n".join(differing)
    assert len(left_out) <= LARGEST_SHARE_LEFT_OUT * len(prompts)
    drafted = {n for c in compared for n in c.theirs.drafted}
    counts = {n for answer in accepted(compared)[1] for n in answer}
    assert len(drafted) == 1 and min(counts) == 0 and max(counts) == max(drafted)

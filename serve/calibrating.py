"""`--calibrate`: temperatures of a draft's confidences, fitted to rounds as the server has them.

Every prompt is answered by the engine greedily and at temperature 1, with whole blocks verified.
"""

import os
import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
from huggingface_hub import constants
from jaxtyping import Float
from rich.console import Console

from dspark_jax import calibration_file
from dspark_jax.calibrate import Calibration, Rounds, calibrate
from dspark_jax.serve.build import Built
from dspark_jax.serve.messages import Delta, SamplingParams, Work
from dspark_jax.serve.models import Loaded, Named
from dspark_jax.serve.programs import Sizes
from dspark_jax.serve.questions import Prompts, find_prompts
from dspark_jax.serve.settings import ServeSettings, Speculation

MOST_PROMPTS = 256
TEMPERATURES = (0.0, 1.0)


class Recorder:
    """A rating that takes the draft at its word and keeps what became of whole blocks."""

    def __init__(self, draft_length: int):
        self.slope, self.intercept = np.ones(draft_length), np.zeros(draft_length)
        self.half = 0
        self._kept: list[tuple[np.ndarray, int, int]] = []

    def learn(self, confidence: Float[np.ndarray, "G"], accepted: int, verified: int) -> None:
        """Blocks cut short, before the end of an answer, would count for less than they are."""
        if verified == len(self.slope):
            self._kept.append((confidence, accepted, self.half))

    def rounds(self) -> Rounds:
        """All of them; the two halves of the prompts are told apart, not the prompts."""
        if not self._kept:
            none = np.zeros(0, int)
            return Rounds(np.zeros((0, len(self.slope))), none, none)
        confidence, accepted, half = zip(*self._kept, strict=True)
        return Rounds(np.stack(confidence), np.array(accepted), np.array(half))


def prepared(
    settings: ServeSettings, speculation: Speculation
) -> tuple[ServeSettings, Speculation]:
    """The settings to build the engine with: everything is drafted for, verified and queued."""
    everything = replace(
        speculation, num_speculative_tokens=None, enable_adaptive_verification=False
    )
    room = replace(settings, max_queued_requests=2 * MOST_PROMPTS, max_queued_tokens=1 << 40)
    return room, everything


def check_draft(settings: ServeSettings, named: Named) -> Path:
    """The draft's folder; ValueError when there is none or nothing may be written to it."""
    folder = named.draft
    if folder is None:
        raise ValueError(
            f"target {settings.target} is served without a draft, so there is nothing to "
            "calibrate; give its --checkpoint."
        )
    if Path(constants.HF_HUB_CACHE).resolve() in folder.resolve().parents:
        raise ValueError(
            f"draft {folder} lies in the hub's cache, which is not ours to write to; copy it to a "
            "folder of your own and calibrate it there."
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"draft {folder} may not be written to; copy it to a folder of your own and calibrate "
            "it there."
        )
    return folder


def prompts_of(settings: ServeSettings, folder: Path, loaded: Loaded, sizes: Sizes) -> Prompts:
    """What will be asked; ValueError when there is too little, or nothing to calibrate."""
    if loaded.draft_config is None or not loaded.draft_config.enable_confidence_head:
        raise ValueError(
            f"draft {folder} has no confidence head to calibrate; the server learns what its "
            "drafts are worth while it serves, so start it without --calibrate."
        )
    room = sizes.longest * sizes.page - 1
    given = find_prompts(settings.data, folder, loaded.files.tokenizer)
    prompts = [prompt for prompt in given if 0 < len(prompt) <= room][:MOST_PROMPTS]
    if len(prompts) < 2:
        raise ValueError(
            f"{len(prompts)} of {len(given)} prompts have at most {room} tokens, and a fit is "
            "tried on two at least; give more with --data, or a larger --max-model-len."
        )
    return prompts


def run_calibration(
    settings: ServeSettings,
    folder: Path,
    built: Built,
    prompts: Prompts,
    console: Console,
    progress: Callable[[int, int], None],
) -> int:
    """Answer, fit, write and say what was found; 1 when an answer failed."""
    recorder = Recorder(built.sizes.verified)
    built.engine.batch.rating = recorder
    done, total = count(1), len(TEMPERATURES) * len(prompts)
    built.engine.start()
    try:
        for half in range(2):
            recorder.half = half
            if not answered(settings, built, prompts[half::2], lambda: progress(next(done), total)):
                console.print("an answer failed, so nothing was written; the log says why.")
                return 1
    finally:
        built.engine.stop()
    found = calibrate(recorder.rounds())
    path = calibration_file.write(folder, found)
    for line in table(found):
        console.print(line)
    console.print(f"wrote {path}, which the server reads beside the draft", soft_wrap=True)
    return 0


def answered(
    settings: ServeSettings, built: Built, prompts: Prompts, tick: Callable[[], None]
) -> bool:
    """Answer every prompt at every temperature; False when one failed."""
    heard: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    room = built.sizes.longest * built.sizes.page
    works = [
        Work(
            f"{number}.{temperature}",
            prompt,
            min(settings.max_tokens, room - len(prompt)),
            SamplingParams(temperature=temperature, seed=settings.seed + number),
        )
        for number, prompt in enumerate(prompts)
        for temperature in TEMPERATURES
    ]
    for work in works:
        built.engine.submit(work, heard.put)
    ended: list[str] = []
    while len(ended) < len(works):
        finish = heard.get().finish
        if finish is not None:
            ended.append(finish)
            tick()
    return "error" not in ended


def table(found: Calibration) -> Iterator[str]:
    """What was found, a line per position."""
    yield f"{found.rounds} rounds; expected calibration error of a draft's survival, as the head"
    yield "has it and with temperatures fitted to the other half of the prompts:"
    yield "position  temperature  before  after"
    rows = zip(found.temperatures, found.before, found.after, strict=True)
    for number, (temperature, before, after) in enumerate(rows, 1):
        yield f"{number:8}  {temperature:11.3f}  {before:6.4f}  {after:6.4f}"
    yield f"{'mean':>8}  {'':11}  {found.before.mean():6.4f}  {found.after.mean():6.4f}"

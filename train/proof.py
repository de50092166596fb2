"""What a draft is worth: validation on held-out conversations, then real decoding of prompts."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dspark_jax.calibrate import Rounds, calibrate
from dspark_jax.config import DraftConfig
from dspark_jax.loop import Weights, prepare_weights
from dspark_jax.sharding import tree_shardings
from dspark_jax.target_folder import LoadedTarget
from dspark_jax.train.data import Data, held_out_batches
from dspark_jax.train.divergence import NEAR_TIE, explain
from dspark_jax.train.progress import Bar
from dspark_jax.train.served import Programs, make_programs, measure
from dspark_jax.train.trainer import Job
from dspark_jax.train.validation import make_validator
from dspark_jax.types import Frozen


def prove(
    job: Job, loaded: LoadedTarget, params: Any, data: Data, console: Console
) -> dict[str, Any]:
    """Validation, then real decoding of held-out prompts, greedy and at temperature 1."""
    settings, config, target = job.settings, job.config, job.target
    validation = make_validator(job)(params, held_out_batches(settings, data))
    programs = make_programs(
        target,
        job.draft,
        weights(job, params),
        settings.prompt_tokens,
        settings.answer_tokens,
        loaded.ends,
        settings.seed,
        settings.compute_dtype,
    )
    served, rounds = serve(programs, config, data, console)
    for width, found in divergences(served["greedy"]):
        prompt = served["greedy"]["prompts"][found["prompt"]]
        parting = explain(
            target,
            loaded.params,
            np.array(prompt["prompt_token_ids"], np.int32),
            prompt["answer_token_ids"],
            found["position"],
            config.draft_length + 1,
            other=width,
        )
        # In a narrow type two programs differ in every row: nothing tells a near tie from a fault.
        exact = settings.compute_dtype == "float32"
        found |= parting._asdict() | {"near_tie": parting.margin < NEAR_TIE if exact else None}
    for part in served.values():
        for prompt in part["prompts"]:
            for name in ("prompt", "answer"):
                prompt[name] = loaded.tokenizer.decode(prompt[f"{name}_token_ids"])
    # On real rounds, as a server has them: validation's blocks begin at any token and follow the
    # true text, a server's begin after a bonus token and follow their own drafts.
    calibration = calibrate(rounds) if config.enable_confidence_head else None
    return {
        "validation": validation.table,
        "served": served,
        "reliability": validation.reliability,
        "calibration": calibration,
    }


def weights(job: Job, params: Any) -> Weights:
    """Target and draft laid out for decoding, both in the type they were trained in."""

    def prepare(target_params: Any, params: Any, frozen: Frozen) -> Weights:
        cast = jax.tree.map(lambda x: x.astype(job.settings.compute_dtype), params)
        return prepare_weights(job.target, job.draft, target_params, cast, frozen)

    # Tables lie as decoding reads them, not as training does: else they would move in every round.
    tables = tree_shardings(job.meshes.target, job.frozen, "draft")
    return jax.jit(prepare)(job.target_params, params, jax.device_put(job.frozen, tables))


def holds(served: dict[str, Any]) -> bool:
    """Whether greedy answers are plain decoding's by the same program.

    Where another program, which reads one token at a time or shorter blocks, answers otherwise in
    float32, its choice must have been a near tie.
    """
    greedy = served["greedy"]
    near = [found["near_tie"] for _, found in divergences(greedy)]
    return greedy["identical_to_plain"] and False not in near


def divergences(greedy: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(rows of a pass, where it parted) of every answer that another program gave otherwise."""
    for found in greedy["one_token_program_divergences"]:
        yield 1, found
    for length, table in greedy["by_verify_length"].items():
        for found in table.get("whole_block_divergences", ()):
            yield int(length) + 1, found


def serve(
    programs: Programs, config: DraftConfig, data: Data, console: Console
) -> tuple[dict[str, Any], Rounds]:
    """Both parts of the proof, and the rounds of both: a server drafts for either."""
    parts, rounds = {}, []
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        with Bar(console, f"serving, {name}", ()) as bar:
            done = iter(range(len(data.prompts) + 1))
            parts[name], made = measure(
                programs,
                data.prompts,
                temperature,
                config.draft_length,
                lambda bar=bar, done=done: bar.show(next(done), len(data.prompts), {}),
            )
        rounds.append(made)
    return parts, Rounds(*map(np.concatenate, zip(*rounds, strict=True)))

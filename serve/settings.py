"""Flags of `python -m dspark_jax.serve`, named as vLLM's users know them."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from dspark_jax.config import HostOptions

LENGTH_LIMIT = 4096
"""Of prompt and answer together, where neither the flag nor the model says less."""


@dataclass(frozen=True)
class ServeSettings:
    """Serve a target with its draft behind the OpenAI API, or answer one --prompt."""

    checkpoint: str | None = None
    """A training run, an imported draft, or a draft's folder or hub id; else the embedded one."""
    target: str | None = None
    """Folder or hub id; by default the one that the checkpoint was made for."""
    speculative_config: str | None = None
    """vLLM's JSON: method, model, num_speculative_tokens (0: plain decoding), draft_sample_method
    (greedy or probabilistic), dspark_draft_topk, enable_adaptive_verification,
    verification_schedule (asynchronous or algorithm-1)."""
    prompt: str | None = None
    """Answer this in the terminal instead of serving."""
    calibrate: bool = False
    """Fit temperatures to the draft's confidences and write them beside it, instead of serving."""
    data: Path | None = None
    """Conversations for --calibrate, JSONL; by default the prompts that the draft's run served."""
    max_tokens: int = 256
    """Of the answer to --prompt, and of every one for --calibrate."""
    temperature: float = 0.0
    """Of the answer to --prompt."""
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    max_model_len: int | None = None
    """Prompt and answer together, in tokens; by default what the model allows, 4,096 at most."""
    max_num_seqs: int = 8
    """Sequences decoded at the same time; a program is compiled for every power of two up to it."""
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    block_size: int = 16
    """Rows of a cache page."""
    num_gpu_blocks_override: int | None = None
    """Cache pages; by default enough for every sequence at its longest."""
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    """Devices that share every layer of the target and the draft."""
    data_parallel_size: int = 1
    """Groups of such devices; all of them share the target's experts."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: as stored, float32 on a CPU."""
    kernels: Literal["auto", "pallas", "reference"] = "auto"
    """auto: kernels where there are some for the device; pallas: an error where there are none (on
    a CPU they are interpreted, very slowly); reference: what XLA makes of the plain formulas."""
    seed: int = 0
    """Of the answer to --prompt; requests name their own, or get one by chance."""
    api_key: str | None = None
    """Better in DSPARK_API_KEY, which other users of the machine cannot list."""
    api_key_file: Path | None = None
    """A key a line."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages of other origins that browsers may call from."""
    per_request_spec_decode_metrics: Literal["none", "summary", "detailed"] = "none"
    request_timeout: float | None = None
    """Seconds in the queue and running; then 504."""
    shutdown_timeout: float = 30.0
    """Seconds that answers may take to finish after SIGTERM."""
    compilation_cache: Path | None = None
    """Where compiled programs are kept for the next start; else in the user's cache folder."""
    profile_again: bool = False
    """Measure what rounds cost although it is known from an earlier start, as after one on a busy
    machine."""
    hosts: HostOptions = HostOptions()


@dataclass(frozen=True)
class Speculation:
    """What `--speculative-config` says."""

    model: str | None = None
    num_speculative_tokens: int | None = None
    """None: as many as the draft was trained for."""
    draft_sample_method: Literal["greedy", "probabilistic"] = "probabilistic"
    dspark_draft_topk: int | None = None
    """Tokens with the largest base logits that each drafted one is drawn among; None: all."""
    enable_adaptive_verification: bool = True
    verification_schedule: str = "asynchronous"
    """asynchronous: how much is verified is settled by blocks drafted before (paper §5.2);
    algorithm-1: by the very blocks, within the round (§3.2.2)."""
    method: str = "dspark"


METHODS = ("dspark", "dflash")
SCHEDULES = ("asynchronous", "algorithm-1")


def read_speculation(text: str | None) -> Speculation:
    """The JSON of `--speculative-config`; ValueError names what cannot be used."""
    if text is None:
        return Speculation()
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--speculative-config is no JSON ({error}): {text}") from error
    if not isinstance(given, dict):
        raise ValueError(f"--speculative-config must be a JSON object, not {text}.")
    known = {f.name: f.type for f in fields(Speculation)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"--speculative-config has {', '.join(unknown)}, which means nothing here; it may have "
            f"{', '.join(sorted(known))}."
        )
    config = Speculation(**given)
    if config.model is not None and not isinstance(config.model, str):
        raise ValueError(f"model {config.model!r} is no folder or hub id.")
    if config.method not in METHODS:
        raise ValueError(
            f"method {config.method!r} is not served; served are {' and '.join(METHODS)}."
        )
    if config.draft_sample_method not in ("greedy", "probabilistic"):
        raise ValueError(
            f"draft_sample_method {config.draft_sample_method!r} is neither greedy nor "
            "probabilistic."
        )
    if config.verification_schedule not in SCHEDULES:
        raise ValueError(
            f"verification_schedule {config.verification_schedule!r} is neither "
            f"{' nor '.join(SCHEDULES)}."
        )
    count = config.num_speculative_tokens
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise ValueError(f"num_speculative_tokens {count!r} is no number of tokens.")
    among = config.dspark_draft_topk
    if among is not None and (not isinstance(among, int) or isinstance(among, bool) or among < 1):
        raise ValueError(
            f"dspark_draft_topk {among!r} is no number of tokens; give 1 or more, or leave it out."
        )
    if among is not None and count == 0:
        raise ValueError(
            f"dspark_draft_topk {among} is for drafts, and num_speculative_tokens 0 never drafts; "
            "leave one of them out."
        )
    if not isinstance(config.enable_adaptive_verification, bool):
        raise ValueError("enable_adaptive_verification must be true or false.")
    return config


def check(settings: ServeSettings, speculation: Speculation) -> None:
    """Raise ValueError on settings that cannot work, before anything is loaded."""
    named = {name for name in (settings.checkpoint, speculation.model) if name is not None}
    if len(named) > 1:
        raise ValueError(
            f"--checkpoint {settings.checkpoint} and the model {speculation.model} of "
            "--speculative-config are two drafts; give one."
        )
    positive = ("max_num_seqs", "block_size", "max_tokens", "max_queued_requests")
    positive += ("max_queued_tokens", "tensor_parallel_size", "data_parallel_size")
    for name in positive:
        if getattr(settings, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(settings, name)} must be 1 or more."
            )
    if settings.request_timeout is not None and not settings.request_timeout > 0:
        raise ValueError(f"--request-timeout {settings.request_timeout} must be more than 0.")
    if not settings.shutdown_timeout >= 0:
        raise ValueError(f"--shutdown-timeout {settings.shutdown_timeout} must be 0 or more.")
    key = settings.api_key
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("--api-key is empty or holds other characters than printable ASCII.")
    if settings.max_model_len is not None and settings.max_model_len < 2:
        raise ValueError(f"--max-model-len {settings.max_model_len} must be 2 or more.")
    if not 0 <= settings.port < 65536:
        raise ValueError(f"--port {settings.port} must be from 0 to 65535.")
    if settings.prompt is not None and settings.calibrate:
        raise ValueError("--prompt and --calibrate are two things to do; give one.")
    if settings.data is not None and not settings.calibrate:
        raise ValueError(f"--data {settings.data} is for --calibrate only; give both or neither.")
    if settings.prompt == "":
        raise ValueError("--prompt is empty; say something to answer.")
    if not 0 <= settings.temperature <= 2:
        raise ValueError(f"--temperature {settings.temperature} must be from 0 to 2.")

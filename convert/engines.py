"""What the engines can serve of a draft, and how they are started with it."""

import json
import shlex
from collections.abc import Mapping
from types import MappingProxyType

from dspark_jax.config import DraftConfig
from dspark_jax.convert.settings import EngineName
from dspark_jax.draft_formats.formats import FormatName

ENGINES: Mapping[EngineName, str] = MappingProxyType({"vllm": "vLLM 0.33", "sglang": "SGLang"})


def obstacles(engine: EngineName, format: FormatName, config: DraftConfig) -> list[str]:
    """Why an engine cannot serve a draft; empty when it can."""
    found = []
    if config.markov_rank == 0:
        found.append("markov_rank is 0, and it always builds a Markov head")
    elif config.markov_head_type != "vanilla" and engine == "vllm":
        found.append(
            f"its loader has no {config.markov_head_type} Markov head, only the vanilla one"
        )
    if config.sliding_window_non_causal and "sliding_attention" in config.layer_types:
        found.append("it serves sliding windows causally, and those of this draft are not causal")
    if engine == "sglang" and format == "speculators":
        found.append("it reads DeepSpec's and SpecForge's formats, not that of speculators")
    return found


def serve_commands(
    format: FormatName, config: DraftConfig, target_name: str, draft: str
) -> dict[EngineName, str]:
    """The command of every engine that can serve a draft in this format."""
    options = {
        "method": "dspark",
        "model": draft,
        "num_speculative_tokens": config.draft_length,
        "draft_sample_method": "probabilistic",
    }
    vllm = ["vllm", "serve", target_name, "--speculative-config", json.dumps(options)]
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", target_name]
    sglang += ["--speculative-algorithm", "DSPARK", "--speculative-draft-model-path", draft]
    sglang += ["--speculative-dspark-block-size", str(config.draft_length)]
    commands: dict[EngineName, list[str]] = {"vllm": vllm, "sglang": sglang}
    return {e: shlex.join(c) for e, c in commands.items() if not obstacles(e, format, config)}

"""vLLM's own verdict on exported drafts, on a CPU: config, draft length, weights, head numerics.

Runs in the environment that `tests/interop/set-up` makes, without anything of ours:

    judge.py --target TARGET --inputs INPUTS.npz --output FOLDER DRAFT...

For every draft FOLDER/<number>.json tells what vLLM made of it or how it failed, and
FOLDER/<number>.npz holds what its heads compute from the arrays hidden, aux and tokens in INPUTS.
"""

# pyright: reportMissingImports=false

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import re
import socket
import sys
import types
from pathlib import Path

STUBS = ("llguidance", "xgrammar")
"""Grammar libraries that vLLM imports at module level and loading a draft never calls."""
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}
UNWRITTEN = {"model.mask_embedding"}
"""Placeholders that no draft fills."""
SHARED = {"model.embed_tokens.weight", "lm_head.weight"}
"""Tables that vLLM takes from the target where a draft has none."""


class Stub(types.ModuleType):
    """A module whose every name is an empty class."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stubs, after everything that is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STUBS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


def prepare() -> None:
    """Make vLLM believe in a CPU build; the published wheel holds none."""
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    sys.meta_path.append(Stubs())
    import torch
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float32)
    platform = CpuPlatform()
    vllm.platforms._current_platform = vllm.platforms.current_platform = platform
    import vllm.model_executor.models.registry as registry

    registry._run_in_subprocess = lambda function: function()


def start_group() -> None:
    """A distributed group of one, which parallel layers insist on."""
    from vllm.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
    )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    init_distributed_environment(1, 0, address, 0, "gloo")
    initialize_model_parallel(1, 1)


def options(draft: str) -> dict:
    """The speculative options of the `vllm serve` command in the draft's card."""
    card = Path(draft, "README.md").read_text()
    (command,) = re.findall(r"--speculative-config '(.*?)'$", card, re.MULTILINE)
    return json.loads(command)


def configure(draft: str, target: str):
    """vLLM's configuration for serving the target with the draft, as its command line makes it."""
    from vllm.config import (
        CacheConfig,
        CompilationConfig,
        DeviceConfig,
        LoadConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.config.speculative import SpeculativeConfig

    model = ModelConfig(
        model=target,
        tokenizer=target,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
    )
    parallel = ParallelConfig()
    speculative = SpeculativeConfig(
        **{**options(draft), "model": draft},
        target_model_config=model,
        target_parallel_config=parallel,
    )
    return VllmConfig(
        model_config=model,
        parallel_config=parallel,
        cache_config=CacheConfig(),
        scheduler_config=SchedulerConfig(
            max_model_len=64, is_encoder_decoder=False, max_num_batched_tokens=64, max_num_seqs=2
        ),
        device_config=DeviceConfig(device="cpu"),
        load_config=LoadConfig(),
        speculative_config=speculative,
        compilation_config=CompilationConfig(mode=0),
    )


def told(draft: str) -> int | None:
    """The draft length that `vllm serve DRAFT` takes from a speculators config.json."""
    raw = json.loads(Path(draft, "config.json").read_text())
    if "speculators_config" not in raw:
        return None
    from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

    return SpeculatorsConfig.extract_vllm_speculative_config(raw)["num_speculative_tokens"]


def load(config, draft: str):
    """The draft model filled by vLLM's loader, and the parameters that nothing was written to."""
    import torch
    from safetensors import safe_open
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.models.registry import ModelRegistry

    described = config.speculative_config.draft_model_config
    with set_current_vllm_config(config):
        kind, name = ModelRegistry.resolve_model_cls(described.architectures, described)
        model = kind(vllm_config=config)
        for param in model.parameters():
            param.data.fill_(float("nan") if param.is_floating_point() else -12345)
        given = {}
        for path in sorted(Path(draft).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                given |= {key: file.get_tensor(key) for key in file.keys()}
        model.load_weights(iter(given.items()))

    def untouched(param: torch.Tensor) -> bool:
        return bool((param.isnan() if param.is_floating_point() else param == -12345).any())

    return model, name, [n for n, p in model.named_parameters() if untouched(p)]


def compute(model, config, inputs):
    """What the loaded heads make of the inputs."""
    import torch
    import torch.nn.functional as functional
    from vllm.config import set_current_vllm_config

    for module in model.modules():  # the wheel holds no compiled product for CPUs
        if hasattr(module, "quant_method"):
            module.cpu_linear = lambda x, weight, bias=None: functional.linear(x, weight, bias)
    hidden, aux, tokens = (torch.from_numpy(inputs[name]) for name in ("hidden", "aux", "tokens"))
    with torch.no_grad(), set_current_vllm_config(config):
        embedding = model.markov_embed(tokens)
        result = {
            "fc": model.combine_hidden_states(aux),
            "embedding": embedding,
            "bias": model.markov_bias(embedding),
        }
        if model.model.confidence_head is not None:
            result["confidence"] = model.compute_confidence(hidden, embedding)
        if getattr(model, "has_own_lm_head", False):
            result["logits"] = model.compute_draft_logits(hidden)
        if model.draft_id_to_target_id is not None:
            ids = torch.arange(len(model.draft_id_to_target_id))
            result["target_id"] = model.map_draft_to_target(ids)
    return {name: value.numpy() for name, value in result.items()}


def judge(draft: str, target: str, inputs) -> tuple[dict, dict]:
    """(verdict, arrays) on one draft."""
    from types import SimpleNamespace

    from vllm.model_executor.models.qwen3_dflash import _dflash_layer_causal
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config
    from vllm.v1.worker.gpu.spec_decode.utils import get_parallel_drafting_token_id

    config = configure(draft, target)
    speculative = config.speculative_config
    described = speculative.draft_model_config.hf_config
    spec = SimpleNamespace(draft_model_config=speculative.draft_model_config)
    model, name, untouched = load(config, draft)
    optional = {"model.embed_tokens.weight"}
    if not getattr(model, "has_own_lm_head", False):
        optional |= SHARED
    verdict = {
        "architecture": name,
        "num_speculative_tokens": speculative.num_speculative_tokens,
        "told_tokens": told(draft),
        "sample_from_anchor": getattr(described, "sample_from_anchor", None),
        "aux_layers": get_eagle3_aux_layers_from_config(spec),
        "mask_token": get_parallel_drafting_token_id(described),
        "causal": [_dflash_layer_causal(described, i) for i in range(described.num_hidden_layers)],
        "rope_theta": described.rope_parameters["rope_theta"],
        "confidence_head": model.model.confidence_head is not None,
        "unwritten": sorted(set(untouched) - UNWRITTEN - optional),
    }
    return verdict, compute(model, config, inputs)


def main() -> None:
    """Judge every draft; one that fails says how and does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafts", nargs="+")
    parser.add_argument("--target", required=True)
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    prepare()
    import numpy as np
    from vllm.config import set_current_vllm_config

    inputs = np.load(given.inputs)
    started = False
    for number, draft in enumerate(given.drafts):
        try:
            if not started:
                with set_current_vllm_config(configure(draft, given.target)):
                    start_group()
                started = True
            verdict, arrays = judge(draft, given.target, inputs)
            np.savez(given.output / f"{number}.npz", **arrays)
        except Exception as error:
            verdict = {"failed": f"{type(error).__name__}: {error}"}
        (given.output / f"{number}.json").write_text(json.dumps(verdict))


if __name__ == "__main__":
    main()

"""What vLLM lacks on a CPU to run DSpark; Python imports this by itself from PYTHONPATH.

Triton's wheels hold backends for GPUs alone, and vLLM runs DSpark only where it finds an active
one: here is one named "cpu". It compiles nothing; TRITON_INTERPRET=1 makes every kernel run as
Python. Two faults are mended, of Triton's interpreter and of vLLM's norm on CPUs.
"""

# pyright: reportMissingImports=false

import importlib.abc
import importlib.util
import sys
from types import SimpleNamespace

import triton.backends
from triton.runtime.interpreter import InterpreterBuilder


class CpuDriver:
    """What Triton and vLLM ask of a driver before a kernel runs."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 1)

    def get_current_device(self) -> int:
        return 0


def store(self, ptrs, value, mask, policy, plain=InterpreterBuilder.create_masked_store):
    """A masked store; the interpreter makes integers of `mask & scalar` and then refuses them."""
    mask.data = mask.data.astype(bool)
    return plain(self, ptrs, value, mask, policy)


class Mending(importlib.abc.MetaPathFinder):
    """Mends vllm._custom_ops when it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "vllm._custom_ops":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_mend(module):
            run(module)
            mend_norm(module)

        spec.loader.exec_module = run_and_mend
        return spec


def mend_norm(ops) -> None:
    """The context's keys are normed with a row of weights per draft layer.

    vLLM's kernel for CPUs takes the first row for all of them.
    """
    plain = ops.rms_norm

    def rms_norm(out, x, weight, epsilon):
        if weight is None or weight.dim() == 1:
            plain(out, x, weight, epsilon)
        else:
            for part, own in enumerate(weight):
                plain(out[part], x[part], own, epsilon)

    ops.rms_norm = rms_norm


InterpreterBuilder.create_masked_store = store
triton.backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=CpuDriver)
sys.meta_path.insert(0, Mending())

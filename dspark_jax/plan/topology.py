"""The devices of a machine that is not there, as its compiler describes them."""

import importlib.util
import os
from typing import Any

from dspark_jax.plan.chips import Machine

ENVIRONMENT = {
    # The plan needs no device, and must not wait for one.
    "JAX_PLATFORMS": "cpu",
    # libtpu would ask Google Cloud about the machine and refuse a second process.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Neither compiler finds hardware, which it would report on stderr.
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin")}
GPUS = {
    # compute capability, streaming multiprocessors, L2 cache in bytes, clock in GHz
    "h100": ((9, 0), 132, 52428800, 1.98),
    "h200": ((9, 0), 132, 52428800, 1.98),
    "b200": ((10, 0), 148, 132644864, 1.965),
    "b300": ((10, 3), 148, 132644864, 1.92),
}


def set_environment() -> None:
    """Call it before jax is imported."""
    os.environ.update(ENVIRONMENT)


def devices_of(machine: Machine) -> list[Any]:
    """JAX devices to compile for; ValueError without that compiler or on what it does not know."""
    platform = machine.chip.platform
    if not any(importlib.util.find_spec(name) for name in COMPILERS[platform]):
        raise ValueError(
            f"planning for {machine.name} needs the {platform.upper()} compiler, which is not "
            f"installed; pip install -e '.[{platform}]' (no {platform.upper()} is needed)."
        )
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        if platform == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=machine.name)
        else:
            found = topologies.get_topology_desc(
                platform="cuda",
                target_config=gpu_description(machine),
                topology="x".join(map(str, (1, *machine.shape))),
            )
    except (JaxRuntimeError, RuntimeError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"mesh {machine.name!r} cannot be compiled for ({said}); use a size that exists."
        ) from error
    return list(found.devices)


def gpu_description(machine: Machine) -> str:
    """What XLA's GPU compiler must know of a GPU: its GpuTargetConfigProto, as text.

    Fields: openxla/xla, stream_executor/device_description.proto; limits: CUDA programming guide.
    """
    chip = machine.chip
    (major, minor), cores, cache, clock = GPUS[chip.name]
    name = f"NVIDIA {chip.name.upper()}"
    return f"""gpu_device_info {{
  name: "{name}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES
  }}
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock}
  memory_bandwidth: {chip.bytes_per_second:.0f} device_memory_size: {chip.memory_bytes:.0f}
  l2_cache_size: {cache}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""

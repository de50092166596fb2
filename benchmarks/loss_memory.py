"""Compiled temporary memory of the loss at GLM-5.2's size.

    python benchmarks/loss_memory.py                       # compiled for this CPU, float32
    python benchmarks/loss_memory.py --topology v6e:2x2    # for a TPU, bfloat16; needs jax[tpu]

Compiles value and gradient of the chunked loss for 8,192 slots over a vocabulary of 154,880 at
hidden size 6,144 and Markov rank 256, and prints what XLA needs beside inputs and outputs, next to
one float32 array of all logits (5.1 GB). Nothing is run: neither memory of that size nor the TPU
is needed. A CPU computes bfloat16 products in float32 and keeps a float32 copy of the head for
them, 4.7 GB; figures of bfloat16 there say nothing about an accelerator.
"""

import argparse
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.chunked import Given, Trained, slot_losses
from dspark_jax.config import LossConfig

ROWS, VOCABULARY, HIDDEN, RANK, BLOCK, TOKENS = 8192, 154_880, 6144, 256, 8, 4096


@dataclass(frozen=True)
class Memory:
    """Bytes of one compiled program."""

    temporary: int
    arguments: int
    outputs: int


def inputs(dtype: Any, device: Any) -> tuple[Trained, Given]:
    """Shapes of one packed row with 1,024 blocks of 8."""
    blocks = (1, ROWS // BLOCK, BLOCK)
    place = jax.sharding.SingleDeviceSharding(device)

    def shape(*sizes: int, of: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(sizes, of, sharding=place)

    trained = Trained(shape(*blocks, HIDDEN), shape(*blocks, RANK), shape(RANK, VOCABULARY))
    head = shape(HIDDEN, VOCABULARY)
    slots = (shape(*blocks, of=jnp.int32), shape(*blocks, of=jnp.int32))
    mask, weight = shape(*blocks, of=jnp.bool_), shape(*blocks, of=jnp.float32)
    return trained, Given(head, head, shape(1, TOKENS, HIDDEN), *slots, mask, weight)


def measure(chunk_blocks: int | None, dtype: Any, device: Any) -> Memory:
    """Compile value and gradient for a device and ask XLA what it needs."""

    def unembed(head: jax.Array, hidden: jax.Array) -> jax.Array:
        return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)

    loss = partial(slot_losses, unembed, LossConfig(chunk_blocks=chunk_blocks))
    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    with jax.default_device(device):
        compiled = program.lower(*inputs(dtype, device)).compile()
    found: Any = compiled.memory_analysis()
    return Memory(
        found.temp_size_in_bytes, found.argument_size_in_bytes, found.output_size_in_bytes
    )


def chip(topology: str) -> Any:
    """One device of a TPU topology, without the TPU."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--topology", help="compile for a TPU that is not there, such as v6e:2x2")
    given = parser.parse_args()
    device = chip(given.topology) if given.topology else jax.devices()[0]
    dtype = jnp.dtype(given.dtype or ("bfloat16" if given.topology else "float32"))
    logits = ROWS * VOCABULARY * 4
    print(f"{device.device_kind}, jax {jax.__version__}, {dtype}; all logits in float32:")
    print(f"{logits / 1e9:.2f} GB")
    for blocks in (None, 8, 16, 32, 64):
        memory = measure(blocks, dtype, device)
        name = "default" if blocks is None else f"{blocks * BLOCK} slots"
        print(
            f"chunk {name:10}  temporary {memory.temporary / 1e9:6.3f} GB = "
            f"1/{logits / memory.temporary:.1f} of it  (outputs {memory.outputs / 1e9:.3f} GB)"
        )


if __name__ == "__main__":
    main()

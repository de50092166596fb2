"""More than one host: a process each runs the same program, and process 0 alone speaks and writes.

Every process reads its files for itself, holds its devices' share of a batch and of the weights,
and runs every program in step with the others. A process that fails ends at once, and those that
wait for it with it.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping
from threading import Timer
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dspark_jax.config import HostOptions

T = TypeVar("T")


def join(options: HostOptions) -> None:
    """Meet the other processes, when flags or environment say that there are any.

    Raises ValueError on flags that cannot be meant. Ends the process with exit code 2 when the
    others do not come within `join_seconds`: jax would abort it with a trace of C++.
    """
    given = check_options(options)
    if given is None and not announced(os.environ):
        return
    # The notifier would take SIGTERM away from `stopping`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    place = "the others" if given is None else f"coordinator {given['coordinator_address']}"
    late = Timer(options.join_seconds, give_up, (place, options.join_seconds))
    late.daemon = True
    late.start()
    try:
        patience = 2 * int(options.join_seconds) + 60
        jax.distributed.initialize(**(given or {}), initialization_timeout=patience)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{place} cannot be joined: {said}; look at its address.") from error
    finally:
        late.cancel()


def check_options(options: HostOptions) -> dict[str, Any] | None:
    """What jax asks for, None when no flag is given; ValueError on flags that cannot be meant."""
    given = (options.coordinator, options.processes, options.process_id)
    if given == (None, None, None):
        return None
    address, processes, number = given
    if address is None or processes is None or number is None:
        raise ValueError(
            f"coordinator {address}, processes {processes} and process_id {number} belong "
            "together; give all of --coordinator HOST:PORT, --processes and --process-id, or none."
        )
    if not 0 <= number < processes:
        raise ValueError(
            f"process_id {number} is none of {processes} processes; number them from 0 to "
            f"{processes - 1}."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator {address!r} is no address; write HOST:PORT of process 0.")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
        if number == 0:
            socket.create_server(("", int(port))).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"coordinator {address} cannot be used: {error}; give the address of process 0 and a "
            "free port there."
        ) from error
    return {"coordinator_address": address, "num_processes": processes, "process_id": number}


def announced(environment: Mapping[str, str]) -> bool:
    """Whether SLURM, a TPU pod or Open MPI started this process as one of several.

    A shell or batch script within a SLURM job of many tasks is one process.
    """

    def several(name: str) -> bool:
        return environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1

    step = "SLURM_JOB_ID" in environment and "SLURM_STEP_NODELIST" in environment
    alone = environment.get("SLURM_STEP_NUM_TASKS") == "1"
    return (
        (step and several("SLURM_NTASKS") and not alone)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or ("OMPI_MCA_orte_hnp_uri" in environment and several("OMPI_COMM_WORLD_SIZE"))
    )


def give_up(place: str, seconds: float) -> None:
    """End the process: the thread that meets the others cannot be interrupted."""
    line = (
        f"error: {place} did not answer within {seconds:g} s; start all processes, and let "
        "--coordinator be an address of process 0 that the others reach.\n"
    )
    os.write(2, line.encode())
    os._exit(2)


def leading() -> bool:
    """Whether this is the process that speaks and writes."""
    return jax.process_index() == 0


def said_by_all(text: str) -> list[str]:
    """What every process says, in their order; all of them have to ask."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.pad(own, (0, sizes.max() - len(own)))
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def together(look: Callable[[], T]) -> T:
    """What each process finds for itself; where one cannot, all raise ValueError with its reason.

    `look` asks nothing of other processes.
    """
    found, own = attempt(look)
    failed = [(i, said) for i, said in enumerate(said_by_all(str(own or ""))) if said]
    if own is not None:
        raise own
    if failed:
        raise ValueError(f"process {failed[0][0]}: {failed[0][1]}")
    assert found is not None
    return found[0]


def from_first(look: Callable[[], T]) -> T:
    """What process 0 finds, as JSON keeps it; where it cannot, all raise its ValueError or OSError.

    The others only listen.
    """
    if jax.process_count() == 1:
        return look()
    found, own = attempt(look) if leading() else (None, None)
    told = json.dumps([found, str(own or ""), isinstance(own, OSError)])
    found, reason, of_system = json.loads(said_by_all(told)[0])
    if own is not None:
        raise own
    if found is None:
        raise (OSError if of_system else ValueError)(f"process 0: {reason}")
    return found[0]


def attempt(look: Callable[[], T]) -> tuple[tuple[T] | None, Exception | None]:
    """What is found, or what the user can mend."""
    try:
        return (look(),), None
    except (ValueError, OSError) as error:
        return None, error


def check_same(values: Mapping[str, Any]) -> None:
    """Raise ValueError in all processes unless they were given the same."""
    first, *others = (json.loads(said) for said in said_by_all(json.dumps(dict(values))))
    for number, other in enumerate(others, 1):
        for name in first:
            if first[name] != other[name]:
                raise ValueError(
                    f"process {number} has {name} {other[name]} but process 0 has {first[name]}; "
                    "start all processes with the same flags and the same files."
                )


def wait(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """A host copy of arrays; what is spread over processes is gathered in all of them."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(copy, tree)


def any_process(wish: bool) -> bool:
    """Whether any process has it; all of them have to ask."""
    return any(said == "yes" for said in said_by_all("yes" if wish else ""))

"""Who is one of several processes, and what a single one makes of asking the others."""

import socket

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import HostOptions
from dspark_jax.hosts import (
    announced,
    any_process,
    check_options,
    check_same,
    fetch,
    from_first,
    said_by_all,
    together,
)
from dspark_jax.train.agreement import Agreement
from dspark_jax.train.stopping import Stop

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
    ids=str,
)
def test_only_an_environment_of_several_processes_is_joined(
    environment: dict[str, str], several: bool
):
    assert announced(environment) is several


def test_a_port_in_use_is_refused_by_the_process_that_would_listen_there():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"coordinator {address} cannot be used"):
            check_options(HostOptions(address, 2, 0))
        assert check_options(HostOptions(address, 2, 1)) == {
            "coordinator_address": address,
            "num_processes": 2,
            "process_id": 1,
        }


def test_a_single_process_asks_itself():
    assert said_by_all("é") == ["é"] and any_process(True) and not any_process(False)
    assert from_first(lambda: (1, None)) == (1, None) and together(lambda: None) is None
    check_same({"data": "a"})
    np.testing.assert_array_equal(fetch((jnp.arange(3),))[0], [0, 1, 2])
    with pytest.raises(OSError, match="full"):
        together(full_disk)


def full_disk() -> None:
    raise OSError("full")


def test_a_single_process_stops_before_the_very_next_step():
    stop = Stop()
    agreement = Agreement(stop)
    assert not agreement.reached()
    stop.wanted = True
    assert agreement.reached()

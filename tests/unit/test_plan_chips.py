"""Chips, how they are arranged, and what bounds a step."""

import importlib.util
from dataclasses import replace

import pytest

from dspark_jax.plan.bounds import bound, remedies
from dspark_jax.plan.chips import CHIPS, parse_machine
from dspark_jax.plan.memory import Memory, refused_bytes
from dspark_jax.plan.settings import PlanSettings, check
from dspark_jax.plan.topology import GPUS, devices_of, gpu_description


@pytest.mark.parametrize(
    ("text", "devices"),
    [("tpu7x:4x4x4", 128), ("v5p:2x2x1", 4), ("v6e:8x8", 64), ("h200:1x8", 8), ("b300:2x8", 16)],
)
def test_a_machine_has_its_devices(text: str, devices: int):
    machine = parse_machine(text)
    assert (machine.devices, machine.name) == (devices, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h300:1x8", "chip 'h300' of mesh 'h300:1x8' is unknown; use v5e, v5p"),
        ("tpu7x", "write it like tpu7x:4x4x4"),
        ("h200:8", "write it like h200:1x8"),
        ("v6e:0x8", "does not say how its chips are arranged"),
        ("v6e:4x-4", "does not say how its chips are arranged"),
    ],
)
def test_a_bad_mesh_is_refused_in_one_sentence(text: str, said: str):
    with pytest.raises(ValueError, match=said):
        parse_machine(text)


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[tpu\]'"):
        devices_of(parse_machine("v5p:2x2x1"))
    with pytest.raises(ValueError, match=r"pip install -e '.\[cuda\]'"):
        devices_of(parse_machine("b300:1x8"))


def test_every_gpu_can_be_described_to_its_compiler():
    gpus = {name for name, chip in CHIPS.items() if chip.platform == "cuda"}
    assert gpus == GPUS.keys()
    text = gpu_description(parse_machine("b300:1x8"))
    assert "major: 10 minor: 3" in text and "device_memory_size: 287000000000" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 0}, "batch is 0; use at least 1"),
        ({"context": -1}, "context is -1; use at least 1"),
        ({"acceptance_length": 0.5}, "acceptance_length is 0.5; a step always yields"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(change: dict, said: str):
    with pytest.raises(ValueError, match=said):
        check(replace(PlanSettings("glm-5.2", "tpu7x:4x4x4"), **change))


def test_a_step_takes_the_slower_of_moving_and_computing_and_its_exchanges():
    chip = CHIPS["h200"]
    limit = bound(chip, 4.8e12, 989.5e12 / 2, 0, 450e9 / 4)
    assert limit.moving == 1 and limit.computing == 0.5
    assert limit.seconds == 1.25
    assert bound(chip, 0, 1979e12, 1979e12, 0).seconds == 1


def test_what_would_fit_does():
    weights, cache, temporaries, available = 60.0, 50.0, 10.0, 100.0
    found = remedies(available, weights, cache, temporaries, (8, 64, 1000))
    assert found.devices == 16
    assert weights + (cache + temporaries) * found.batch / 64 <= available
    assert weights + temporaries + cache * found.context / 1000 <= available


def test_weights_that_are_too_large_leave_nothing_to_lower():
    assert remedies(100.0, 150.0, 50.0, 10.0, (8, 64, 1000)) == (32, 0, 0)


def test_memory_fits_only_when_the_compiler_took_it():
    assert Memory(10, 20, 5, 40).fits
    assert not Memory(10, 20, 15, 40).fits
    assert not Memory(10, 20, None, 40).fits


def test_a_refusal_is_read():
    said = "the total memory required for HLO temporaries (85.03G) exceeds available HBM (15.75G)."
    assert refused_bytes(said) == round(85.03 * 2**30)
    assert refused_bytes("Ran out of memory. Used 36.24G of 31.24G hbm.") == round(36.24 * 2**30)
    assert refused_bytes("out of registers") is None

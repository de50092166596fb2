"""A checkpoint in sharded arrays is the checkpoint, however it is cut, in little host memory."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from dspark_jax.checkpoints.rounds import Parameters, Placement, parts, plan_rounds
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.checkpoints.stream import stream, writer

pytestmark = pytest.mark.optimised

ROOT = Path(__file__).parents[2]
BF16, FP8 = jnp.bfloat16, jnp.float8_e4m3fn


class Case(NamedTuple):
    """A parameter: its shape, how it is spread, its type and the checkpoint's."""

    shape: tuple[int, ...]
    spec: PartitionSpec
    dtype: jnp.dtype | type
    stored: jnp.dtype | type
    stacked: tuple[int, ...]
    """Axes on which the checkpoint has one tensor each."""
    transpose: bool


P = PartitionSpec
CASES = {
    "embed": Case((64, 24), P("model", None), BF16, BF16, (), False),
    "replicated": Case((24, 16), P(), np.float32, np.float32, (), True),
    "lm_head": Case((24, 64), P(None, "model"), np.float32, BF16, (), True),
    "both_axes": Case((24, 64), P("data", "model"), BF16, np.float32, (), True),
    "one_axis": Case((64, 8), P(("data", "model")), np.float16, np.float16, (), False),
    "norm": Case((3, 24), P(), np.float32, BF16, (0,), False),
    "bias": Case((3, 24), P(None, "model"), np.float32, np.float32, (0,), False),
    "layers": Case((3, 24, 32), P(None, "data", "model"), BF16, BF16, (0,), True),
    "spread_layers": Case((4, 24, 32), P("data", None, "model"), BF16, BF16, (0,), True),
    "experts_out": Case((2, 8, 16, 24), P(None, "model", None, "data"), FP8, FP8, (0, 1), True),
    "experts_in": Case((2, 24, 16, 8), P(None, None, ("data", "model")), FP8, FP8, (0, 2), True),
    "spread_twice": Case((2, 8, 6, 10), P("data", "model"), np.float32, BF16, (0, 1), False),
    "scale": Case((), P(), np.float32, np.float32, (), False),
    "counts": Case((5,), P(), np.int32, np.int64, (), False),
}


def mesh() -> jax.sharding.Mesh:
    """Eight devices as 2 x 4."""
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def parameters(cases: dict[str, Case]) -> Parameters:
    """Shapes, types and shardings of the cases."""
    return {
        ("model", name): jax.ShapeDtypeStruct(
            case.shape, case.dtype, sharding=NamedSharding(mesh(), case.spec)
        )
        for name, case in cases.items()
    }


def tensors(cases: dict[str, Case]) -> dict[str, tuple[np.ndarray, str, tuple[int | slice, ...]]]:
    """Every tensor of a checkpoint of the cases, with its case and place."""
    found, rng = {}, np.random.default_rng(0)
    for name, case in cases.items():
        counts = [case.shape[i] if i in case.stacked else 1 for i in range(len(case.shape))]
        for spot in np.ndindex(*counts):
            depth = max(case.stacked, default=-1) + 1
            place = tuple(
                s if i in case.stacked else slice(None) for i, s in enumerate(spot[:depth])
            )
            kept = [n for i, n in enumerate(case.shape) if i not in case.stacked]
            values = rng.integers(-16, 16, kept[::-1] if case.transpose else kept)
            key = ".".join(map(str, (name, *spot)))
            found[key] = (np.asarray(values).astype(case.stored), name, place)
    return found


def save(folder: Path, cases: dict[str, Case]) -> list[Placement]:
    """Write the cases as a checkpoint of two files; where everything goes."""
    made = tensors(cases)
    for i in range(2):
        chosen = {name: made[name][0] for name in list(made)[i::2]}
        save_file(chosen, folder / f"{i}.safetensors")
    where = stored_tensors(folder)
    return [
        Placement(where[name], ("model", case), place, cases[case].transpose)
        for name, (_, case, place) in made.items()
    ]


def expected(cases: dict[str, Case], name: str) -> np.ndarray:
    """The parameter as numpy puts it together."""
    case = cases[name]
    whole = np.zeros(case.shape, case.dtype)
    for tensor, owner, place in tensors(cases).values():
        if owner == name:
            whole[place] = tensor.T if case.transpose else tensor
    return whole


def test_every_parameter_is_the_checkpoints_in_its_own_type_and_sharding(tmp_path: Path):
    params, placements = parameters(CASES), save(tmp_path, CASES)
    seen: list[tuple[int, int]] = []
    loaded = stream(placements, params, lambda done, total: seen.append((done, total)))
    assert list(loaded) == list(params)
    for (_, name), array in loaded.items():
        param = params["model", name]
        assert (array.dtype, array.sharding) == (param.dtype, param.sharding), name
        wanted = expected(CASES, name)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), wanted[shard.index], name)
    stored_bytes = sum(placement.stored.nbytes for placement in placements)
    assert {total for _, total in seen} == {stored_bytes}, "each byte is read once"
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == stored_bytes


def test_a_device_gets_only_the_experts_it_holds(tmp_path: Path):
    cases = {"experts": Case((8, 4, 64), P("model", None, "data"), FP8, FP8, (0,), True)}
    rounds = plan_rounds(save(tmp_path, cases), parameters(cases))
    assert [round_.start for round_ in rounds] == [(0,), (1,)], "two experts per shard"
    owners = mesh().devices
    for round_ in rounds:
        for part in parts(round_):
            expert = int(part.stored.name.split(".")[1])
            column = expert // 2
            assert set(part.cuts) <= set(owners[:, column])
            assert part.nbytes == part.stored.nbytes // 2, "its rows are the sharded outputs"


def compilations(placements: Sequence[Placement], params: Parameters) -> int:
    """How many programs a load compiles."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: object) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    stream(placements, params)
    jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)


def test_layers_and_experts_share_one_program(tmp_path: Path):
    counts = []
    for layers, experts in ((2, 8), (6, 16)):
        case = Case((layers, experts, 8, 8), P(None, "model"), BF16, BF16, (0, 1), True)
        folder = tmp_path / str(layers)
        folder.mkdir()
        counts.append(compilations(save(folder, {"e": case}), parameters({"e": case})))
    assert counts == [2, 2], "one makes zeros, one writes"


@pytest.mark.parametrize("kind", [FP8, BF16, np.float32])
def test_a_write_touches_only_the_place_that_it_writes(tmp_path: Path, kind: jnp.dtype | type):
    case = Case((6, 8, 16, 24), P(None, "model", None, "data"), kind, kind, (0, 1), True)
    params = parameters({"e": case})
    [param] = params.values()
    first = plan_rounds(save(tmp_path, {"e": case}), params)[0]
    update = jax.ShapeDtypeStruct(first.shape, kind, sharding=first.sharding)
    program = writer(param.sharding, first.sharding, first.axes, first.transpose)
    compiled = program.lower(param, update, jax.ShapeDtypeStruct((2,), np.int32)).compile()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert "input_output_alias={ {}: (0" in text, "the parameter's memory is taken"
    assert " convert(" not in text, "nothing is widened and narrowed again"
    assert memory is not None
    assert memory.temp_size_in_bytes < 6 * 2 * 16 * 12, "smaller than the parameter"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -1.5])
def test_scales_that_cannot_be_are_refused_before_anything_is_allocated(tmp_path: Path, bad: float):
    scales = np.ones((16, 4), np.float32)
    scales[13, 2] = bad
    save_file({"q.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)["q.weight_scale_inv"]
    case = Case((4, 16), P(None, "model"), np.float32, np.float32, (), True)
    before = len(jax.live_arrays())
    sentence = f"tensor q.weight_scale_inv of .*model.safetensors holds {bad} where scales are"
    with pytest.raises(ValueError, match=sentence):
        stream([Placement(stored, ("model", "q"), (), True)], parameters({"q": case}))
    assert len(jax.live_arrays()) == before


def test_a_file_that_shrinks_meanwhile_is_one_sentence(tmp_path: Path):
    cases = {"layers": CASES["layers"]}
    placements = save(tmp_path, cases)
    path = tmp_path / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read: the file ends at byte"):
        stream(placements, parameters(cases))


MEASURE = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.checkpoints.stream import Placement, stream

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
def param(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
def load(folder):
    stored = stored_tensors(Path(folder))
    n, (rows, columns) = len(stored) - 1, stored["0"].shape
    params = {
        ("e",): param((n, columns, rows), P("model", None, "data")),
        ("h",): param(stored["h"].shape[::-1], P("data", "model")),
    }
    where = [Placement(stored[str(i)], ("e",), (i,), True) for i in range(n)]
    return stream([*where, Placement(stored["h"], ("h",), (), True)], params)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
load(sys.argv[1])
before = resident()
jax.block_until_ready(load(sys.argv[2]))
# Not getrusage: a child begins with its parent's largest size there.
(peak,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
print(int(peak.split()[1]) * 1024 - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_stays_below_twice_the_largest_tensor_plus_a_constant(tmp_path: Path):
    mebibyte = 1 << 20
    sizes = {"small": (8, 64, 64), "large": (64, 2048, 1024)}
    for name, (count, rows, columns) in sizes.items():
        (tmp_path / name).mkdir()
        made = {str(i): np.ones((rows, columns), BF16) for i in range(count)}
        made["h"] = np.ones((16 * rows, columns), BF16)
        save_file(made, tmp_path / name / "model.safetensors")
        del made
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, check=True)
    total, largest = (64 * 4 + 64) * mebibyte, 64 * mebibyte
    host_bytes = int(done.stdout) - total  # on this platform the arrays are host memory as well
    print(f"{host_bytes / mebibyte:.0f} MiB beside the parameters")
    assert host_bytes < 2 * largest + 128 * mebibyte

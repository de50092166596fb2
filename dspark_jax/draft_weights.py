"""The published names of a drafter's parameters, read and written.

One table of rows is walked in either direction: reading fills a Drafter from named tensors,
writing gives the tensors back. Checkpoint weights are [out, in], ours [in, out].
All published formats share these names (reference: dspark.md §4.1); their config.json differ, see
`draft_formats`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dspark_jax.config import DraftConfig
from dspark_jax.drafter import Drafter
from dspark_jax.heads import ConfidenceHead, MarkovHead

Path = tuple[Any, ...]
Tensors = Mapping[str, Any]

TABLES = frozenset(
    {"embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight"}
)
"""Tensors a checkpoint may hold that are its target's."""
NOT_TRAINED = TABLES | {"d2t", "t2d"}
"""Those, and the map between the vocabularies."""

ENDINGS = {
    "kernel": ("weight", True),
    "weight": ("weight", False),
    "bias": ("bias", False),
    "markov_w1": ("markov_w1.weight", False),
}
"""Last step of a parameter's path: (last part of the published name, whether transposed)."""

HEADS = {"markov_head": MarkovHead, "confidence_head": ConfidenceHead}


class Row(NamedTuple):
    """One published tensor and the parameter, or the layer of a stacked one, that it is."""

    name: str
    shape: tuple[int, ...]
    path: Path
    transposed: bool
    repeat: int | None


@lru_cache(maxsize=8)
def parameter_table(config: DraftConfig) -> tuple[Row, ...]:
    """Every tensor of a drafter; the names follow from the modules' attribute names."""
    drafter = abstract_drafter(config)
    return tuple(
        row
        for path, leaf in nnx.to_flat_state(nnx.state(drafter))
        for row in _rows(drafter, path, leaf.shape)
    )


def abstract_drafter(config: DraftConfig) -> Drafter:
    """The drafter with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Drafter(config, nnx.Rngs(0)))


def _rows(drafter: Drafter, path: Path, shape: tuple[int, ...]) -> Iterable[Row]:
    ending, transposed = ENDINGS[path[-1]]
    if path[0] != "layers":
        name = ".".join((*path[:-1], ending))
        yield Row(name, shape[::-1] if transposed else shape, path, transposed, None)
        return
    group, member = drafter.groups[path[1]], path[2]
    stacked = group.repeats > 1
    shape = shape[1:] if stacked else shape
    for repeat in range(group.repeats):
        name = ".".join(("layers", str(group.layer(member, repeat)), *path[3:-1], ending))
        at = repeat if stacked else None
        yield Row(name, shape[::-1] if transposed else shape, path, transposed, at)


def tensors_from_params(drafter: Drafter) -> dict[str, np.ndarray]:
    """The drafter's parameters under their published names and in their published layout."""
    values = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(drafter))}
    tensors = {}
    for row in parameter_table(drafter.config):
        value = values[row.path] if row.repeat is None else values[row.path][row.repeat]
        tensors[row.name] = np.ascontiguousarray(value.T if row.transposed else value)
    return tensors


def params_from_tensors(
    config: DraftConfig, tensors: Tensors, dtype: DTypeLike = jnp.float32
) -> Drafter:
    """The drafter that a checkpoint describes.

    Tensors of the target and of the vocabulary map are passed over. Raises ValueError naming every
    tensor that is missing, unknown or of another shape.
    """
    table = parameter_table(config)
    check_tensors(table, tensors)
    return _assemble(config, table, tensors, dtype)


def warm_start(
    config: DraftConfig, tensors: Tensors, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
) -> tuple[Drafter, tuple[str, ...]]:
    """As `params_from_tensors`, but a head that is absent as a whole is drawn afresh.

    Returns the names that were drawn too. So a DFlash draft starts a DSpark one; a confidence head
    that is to read features of a new Markov head is drawn with it.
    """
    table = parameter_table(config)
    absent = [h for h in HEADS if not any(name.startswith(f"{h}.") for name in tensors)]
    if "markov_head" in absent and config.needs_markov_features:
        absent = list(HEADS)  # a confidence head without the Markov features reads other inputs
        tensors = {n: t for n, t in tensors.items() if not n.startswith("confidence_head.")}
    drawn = drawn_heads(config, absent, rngs)
    completed = {**tensors, **drawn}
    check_tensors(table, completed)
    return _assemble(config, table, completed, dtype), tuple(drawn)


def drawn_heads(config: DraftConfig, heads: Iterable[str], rngs: nnx.Rngs) -> dict[str, np.ndarray]:
    """Those of these heads that the draft has, drawn afresh, under their published names."""
    fresh = [row for row in parameter_table(config) if row.path[0] in heads]
    values = {
        (head, *path): np.asarray(leaf[...])
        for head in sorted({str(row.path[0]) for row in fresh})
        for path, leaf in nnx.to_flat_state(nnx.state(HEADS[head](config, rngs=rngs)))
    }
    return {row.name: values[row.path].T if row.transposed else values[row.path] for row in fresh}


def check_tensors(table: Iterable[Row], tensors: Tensors) -> None:
    """Raise one ValueError that names every missing, unknown and mis-shaped tensor."""
    shapes = {row.name: row.shape for row in table}
    problems = [f"missing {name} {list(shapes[name])}" for name in shapes if name not in tensors]
    problems += [f"unknown {n}" for n in tensors if n not in shapes and n not in NOT_TRAINED]
    for name in shapes:
        if name in tensors and tuple(tensors[name].shape) != shapes[name]:
            found, needed = list(tensors[name].shape), list(shapes[name])
            problems.append(f"mis-shaped {name}: found {found}, the config needs {needed}")
    if problems:
        raise ValueError(
            "the draft's tensors do not fit its config.json; use the pair that was saved together: "
            + "; ".join(problems)
        )


def _assemble(
    config: DraftConfig, table: Iterable[Row], tensors: Tensors, dtype: DTypeLike
) -> Drafter:
    pieces = defaultdict(list)
    for row in table:
        tensor = np.asarray(tensors[row.name])
        pieces[row.path].append(tensor.T if row.transposed else tensor)
    graphdef, abstract = nnx.split(abstract_drafter(config))
    leaves = []
    for path, leaf in nnx.to_flat_state(abstract):
        value = np.stack(pieces[path]) if leaf.ndim > pieces[path][0].ndim else pieces[path][0]
        leaves.append((path, leaf.replace(jnp.asarray(value, dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))

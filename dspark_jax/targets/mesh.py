"""A target's functions over a mesh of data x tensor devices, and which meshes a target fits."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from dspark_jax.config import GlmConfig, TargetConfig
from dspark_jax.sharding import DATA, TENSOR, Family, page_specs, tree_specs, zeros
from dspark_jax.spread import over, rows, run
from dspark_jax.targets import glm, qwen3
from dspark_jax.types import Rows, TargetStates

Functions = dict[str, Callable[..., Any]]


def family(config: TargetConfig) -> Family:
    """The table of `sharding.py` that belongs to a target."""
    return "glm" if isinstance(config, GlmConfig) else "qwen3"


def spread_forward(
    config: TargetConfig, model: Callable[[Any], Any], mesh: Mesh | None
) -> Functions:
    """`forward` and `trace` of a target."""

    def spread_over(split: bool, part: Callable[..., Any], params: Any, *given: Any) -> Any:
        spread = over(mesh, len(given[0]), split)
        specs = () if mesh is None else (tree_specs(mesh, params, family(config)),)

        def forward(params: Any, *given: Any) -> Any:
            return part(model(params).forward(*given, spread))

        ins = (*specs, *(rows(spread),) * len(given))
        return run(mesh, forward, ins, rows(spread), params, *given)

    def forward(params: Any, *given: Any) -> TargetStates:
        return spread_over(True, lambda found: found[0], params, *given)

    def trace(params: Any, *given: Any) -> Any:
        # Of choices, which are stacked where layers are, every device returns all rows.
        return spread_over(False, lambda found: found, params, *given)

    return {"forward": forward, "trace": trace}


def spread_decoding(
    config: TargetConfig, model: Callable[[Any], Any], mesh: Mesh | None
) -> Functions:
    """What a target decodes with; its weights stay as they are."""

    def specs(tree: Any) -> Any:
        return None if mesh is None else tree_specs(mesh, tree, family(config))

    def paged_specs(cache: Any) -> Any:
        return None if mesh is None else page_specs(mesh, cache, family(config))

    def empty(batch: int, capacity: int, dtype: Any) -> Any:
        if isinstance(config, GlmConfig):
            return glm.init_cache(config, batch, capacity, dtype)
        return qwen3.init_cache(config, batch, capacity, dtype)

    def init_cache(batch: int, capacity: int, dtype: Any = jnp.float32) -> Any:
        if mesh is None:
            return empty(batch, capacity, dtype)
        shapes = jax.eval_shape(lambda: empty(batch, capacity, dtype))
        return zeros(shapes, mesh, family(config))

    def extend(params: Any, cache: Any, given: Rows) -> tuple[Any, TargetStates]:
        # In pages, which all groups hold, all groups write all rows.
        paged = given.pages is not None
        spread = over(mesh, len(given.tokens), not paged)
        held, lie = paged_specs(cache) if paged else specs(cache), rows(spread)

        def part(params: Any, cache: Any, given: Rows) -> tuple[Any, TargetStates]:
            return model(params).extend(cache, given, spread)

        return run(mesh, part, (specs(params), held, lie), (held, lie), params, cache, given)

    def logits(params: Any, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        spread = over(mesh, len(hidden))

        def part(params: Any, hidden: Any) -> Any:
            with jax.named_scope("unembed"):
                return spread.columns(model(params).unembed(hidden))

        return run(mesh, part, (specs(params), rows(spread)), rows(spread), params, hidden)

    return {
        "prepare": lambda params: params,
        "init_cache": init_cache,
        "extend": extend,
        "logits": logits,
    }


def check_mesh(config: TargetConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError when a target's parts cannot be shared evenly; it names all of them."""
    problems = [
        f"{count} {what} by {devices}"
        for what, count, devices in shares(config, mesh)
        if count % devices
    ]
    if problems:
        raise ValueError(
            f"a mesh of {mesh.shape[DATA]} x {mesh.shape[TENSOR]} (data x tensor) devices cannot "
            f"share {', '.join(problems)} evenly; use another mesh or tensor_parallel."
        )


def shares(config: TargetConfig, mesh: Mesh | AbstractMesh) -> Iterator[tuple[str, int, int]]:
    """(what, how many, by how many devices) of everything that is shared out."""
    group = mesh.shape[TENSOR]
    yield "vocabulary rows", config.vocab_size, group
    yield "attention heads", config.num_attention_heads, group
    if not isinstance(config, GlmConfig):
        yield "key-value heads", config.num_key_value_heads, group
    if any("dense" in kind for kind in config.layer_kinds):
        yield "MLP columns", config.intermediate_size, group
    if isinstance(config, GlmConfig):
        shared = config.moe_intermediate_size * config.n_shared_experts
        yield "columns of the shared expert", shared, group

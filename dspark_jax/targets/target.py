"""A GLM model as the rest of the package sees it: a record of pure functions."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetConfig
from dspark_jax.targets.glm import Glm, frozen_tables
from dspark_jax.types import Target


def glm_target(config: TargetConfig) -> Target:
    """The functions of a GLM target; parameters come from `init_params` or a checkpoint."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Glm(config, rngs=nnx.Rngs(0))))

    def model(params: Any) -> Glm:
        return nnx.merge(graphdef, params, copy=True)

    return Target(
        config=config,
        forward=lambda params, *rows: model(params).forward(*rows)[0],
        init_cache=lambda batch, capacity, dtype=jnp.float32: _shell(graphdef, config).init_cache(
            batch, capacity, dtype
        ),
        extend=lambda params, cache, rows: model(params).extend(cache, rows)[:2],
        unembed=lambda params, hidden: model(params).unembed(hidden),
        frozen=lambda params, target_id=None: frozen_tables(model(params), target_id),
        trace=lambda params, *rows: model(params).forward(*rows),
        trace_extend=lambda params, cache, rows: model(params).extend(cache, rows),
    )


def init_params(config: TargetConfig, seed: int) -> Any:
    """Freshly drawn parameters."""
    return nnx.state(Glm(config, rngs=nnx.Rngs(seed)), nnx.Param)


def _shell(graphdef: Any, config: TargetConfig) -> Glm:
    return nnx.eval_shape(lambda: Glm(config, rngs=nnx.Rngs(0)))

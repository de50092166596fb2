"""A GLM model as the rest of the package sees it: a record of pure functions."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetConfig
from dspark_jax.targets.decoder import prepare
from dspark_jax.targets.extend import extend, init_cache, logits
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
        trace=lambda params, *rows: model(params).forward(*rows),
        unembed=lambda params, hidden: model(params).unembed(hidden),
        frozen=lambda params, target_id=None: frozen_tables(model(params), target_id),
        prepare=lambda params: prepare(model(params)),
        init_cache=lambda batch, capacity, dtype=jnp.float32: init_cache(
            config, batch, capacity, dtype
        ),
        extend=partial(extend, config),
        logits=partial(logits, config),
    )


def init_params(config: TargetConfig, seed: int) -> Any:
    """Freshly drawn parameters."""
    return nnx.state(Glm(config, rngs=nnx.Rngs(seed)), nnx.Param)

"""Models with arbitrary numbers in them, which take no time to initialise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fmbench.models import MODELS, split_model


def arbitrary_state(name: str, **arguments: Any) -> tuple[nnx.GraphDef, Any, Any]:
    """Structure, parameters and the rest of a model of MODELS."""
    graphdef, *shapes = split_model(nnx.eval_shape(lambda: MODELS[name](rngs=nnx.Rngs(0), **arguments)))
    rng = np.random.default_rng(0)
    params, rest = jax.tree.map(lambda x: jnp.asarray(rng.uniform(-0.1, 0.1, x.shape).astype(x.dtype)), shapes)
    return graphdef, params, jax.tree.map(abs, rest)  # variances are positive


def arbitrary_model(name: str, **arguments: Any) -> Any:
    """A model of MODELS; of type Any, because its layers are its own."""
    return nnx.merge(*arbitrary_state(name, **arguments))

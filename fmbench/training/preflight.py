"""What a run's set-up would refuse, found before any run has begun: by shapes, nothing is trained or compiled."""

import functools
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import config_dict

from fmbench import config as config_lib
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.models import split_model
from fmbench.system import runtime
from fmbench.training import augment, input_pipeline, parallel, steps
from fmbench.training.optimizer import make_optimizer


def check(configs: Mapping[str, config_dict.ConfigDict]) -> None:
    """Goes through what `run` does before its first step, for each of many configs.

    Args:
        configs: From `fmbench.entries.finalize`, by what to call them.

    Raises:
        UserError: Of the first that cannot be trained here; says which it is, and why.
    """
    mesh = parallel.make_mesh(runtime.find_devices())
    load = functools.cache(lambda data: fashion_mnist.of_config(json.loads(data)))
    traced: set[str] = set()  # models and optimizers, of which each takes a second
    for name, config in configs.items():
        flat = config_lib.to_json(config)
        kind = json.dumps([flat["model"], flat["features"], flat["dtype"], flat["optimizer"]["name"]])
        place = {key: flat["data"][key] for key in ("source", "dir", "unproven", "pipeline")}
        try:
            parallel.check_batch_size("batch_size", config.batch_size, mesh)
            parallel.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
            train, _ = input_pipeline.split(config, load(json.dumps(place)), mesh)
            tx, _ = make_optimizer(config, input_pipeline.count_steps(config, len(train)))
            for stage in config_lib.stages(config):
                _check_augment(stage.augment)
            if kind not in traced:
                model = nnx.eval_shape(functools.partial(steps.make_model, config, parallel.AXIS, 0))
                jax.eval_shape(tx.init, split_model(model)[1])
            traced.add(kind)
        except UserError as error:
            raise UserError(f"{name} cannot be trained: {error}") from error
        except (TypeError, ValueError) as error:  # what Optax and JAX say of numbers and shapes
            first_line, *_ = str(error).splitlines()
            raise UserError(f"{name} cannot be trained: {type(error).__name__}: {first_line}") from error


def _check_augment(settings: augment.Settings) -> None:
    if settings["function"]:
        keys = augment.example_keys(jax.random.key(0), np.arange(2))
        jax.eval_shape(lambda: augment.augment(keys, jnp.zeros((2, 784)), settings))

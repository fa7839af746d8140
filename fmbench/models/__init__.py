"""The registry of models, and what is asked of one.

A model is an `nnx.Module` built by `Model(rngs=..., dtype=..., axis_name=..., **arguments)` and called by
`model(images, train=False, rngs=None) -> logits`, images (batch, 28, 28, 1), logits (batch, 10). Parameters are
float32; `dtype` is the type of the computation. `axis_name` names the mapped axis over which the batch is
split, if there is one: batch norm and dropout need it. The one that takes features instead of images is
`transfer_head`.

The last dense layer is called `head`, which two things ask for: Muon, which leaves it to Adam, and
`fmbench.embed` without --layer, which shows what it is given.

A model of somebody else's is named by its import path, 'mypackage.nets:Little'.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.errors import UserError
from fmbench.models.cnn import CNN1, CNN2, CNN3, CNN4, Baseline
from fmbench.models.mlp import MLP, BatchNormMLP, FullyConnected
from fmbench.models.resnet import ResNet, ResNet18
from fmbench.models.shake_shake import ShakeShake
from fmbench.models.speedrun import Speedrun
from fmbench.models.tiny import Tiny
from fmbench.models.transfer import TransferHead
from fmbench.models.vgg import VGGLike
from fmbench.models.wide_resnet import PreActResNet, WideResNet
from fmbench.system import import_path

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": MLP,
    "fully_connected": FullyConnected,
    "mlp_bn": BatchNormMLP,
    "baseline": Baseline,
    "cnn1": CNN1,
    "cnn2": CNN2,
    "cnn3": CNN3,
    "cnn4": CNN4,
    "vgg_like": VGGLike,
    "resnet": ResNet,
    "resnet18": ResNet18,
    "wide_resnet": WideResNet,
    "preact_resnet": PreActResNet,
    "shake_shake": ShakeShake,
    "tiny": Tiny,
    "speedrun": Speedrun,
    "transfer_head": TransferHead,
}


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """Structure, trainable parameters and the rest (batch-norm statistics), as plain nested dictionaries."""
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, model_state = map(nnx.to_pure_dict, states)
    return graphdef, params, model_state


def split_arguments(model: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """{'name': 'resnet', 'depth': 20} -> ('resnet', {'depth': 20})."""
    return model["name"], {key: value for key, value in model.items() if key != "name"}


def build_model(
    model: dict[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, axis_name: str | None = None
) -> nnx.Module:
    """The model that config.model describes: a name in MODELS or an import path, and arguments.

    Nothing that an import path leads to is called before it is known to be a class of models.

    Raises:
        UserError: If there is no such model, or it is not built as said above.
    """
    name, arguments = split_arguments(model)
    given = {"rngs": rngs, "dtype": jnp.dtype(dtype), "axis_name": axis_name} | arguments
    model_class = _find(name)
    if misfit := import_path.misfit(model_class, given=given):
        raise UserError(
            f"model '{name}' cannot be built from config.model: its constructor {misfit}; it must take rngs, "
            "dtype and axis_name, and the further fields of config.model."
        )
    try:
        return model_class(**given)
    except UserError:
        raise
    except Exception as error:  # whatever their constructor may raise, its author wants to read it
        said = import_path.describe(error, model_class)
        raise UserError(f"model '{name}' cannot be built from config.model: {said}.") from error


def check_model(model: dict[str, Any], dtype: DTypeLike = jnp.float32, shape: Sequence[int] = (28, 28, 1)) -> None:
    """Builds and calls a model without computing anything, in training and in evaluation.

    Args:
        model: config.model.
        dtype: Of the computation.
        shape: Of an input without the batch.

    Raises:
        UserError: If it cannot be built, or is not called as said above; says what is missing.
    """
    name, model_class = model["name"], _find(model["name"])

    def call(inputs: jax.Array, train: bool) -> Any:
        built: Any = build_model(model, rngs=nnx.Rngs(0), dtype=dtype)
        misfit = "is missing"
        if callable(built):
            misfit = import_path.misfit(type(built).__call__, given=("train", "rngs"), places=2)
        if misfit:
            raise UserError(
                f"model '{name}' cannot be called: its __call__ {misfit}; it must be "
                "__call__(self, images, *, train=False, rngs=None)."
            )
        return built(inputs, train=True, rngs=nnx.Rngs(dropout=0)) if train else built(inputs)

    inputs = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    for train in (False, True):
        how = "in training" if train else "in evaluation"
        try:
            logits = nnx.eval_shape(functools.partial(call, train=train), inputs)
        except UserError:
            raise
        except Exception as error:
            said = import_path.describe(error, model_class)
            raise UserError(f"model '{name}' fails {how} on inputs {inputs.shape}: {said}.") from error
        found = (getattr(logits, "shape", None), getattr(logits, "dtype", jnp.dtype(bool)))
        if found[0] != (2, 10) or not jnp.issubdtype(found[1], jnp.floating):
            what = f"{found[1]} {found[0]}" if found[0] is not None else f"a {type(logits).__name__}"
            raise UserError(
                f"model '{name}' returns {what} {how} for inputs {inputs.shape}; it must return logits, floating "
                "point (2, 10)."
            )


def _find(name: str) -> Callable[..., nnx.Module]:
    if not import_path.is_import_path(name):
        if name not in MODELS:
            raise import_path.unknown("config.model.name", name, MODELS)
        return MODELS[name]
    found = import_path.load(name, "config.model.name")
    if not (isinstance(found, type) and issubclass(found, nnx.Module)):
        raise UserError(
            f"config.model.name is '{name}', which is no model: it must be a subclass of flax.nnx.Module."
        )
    return found

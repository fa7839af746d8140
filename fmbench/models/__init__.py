"""The registry of models.

A model is an `nnx.Module` built by `Model(rngs=..., dtype=..., axis_name=..., **arguments)` and called by
`model(images, train=False, rngs=None) -> logits`, images (batch, 28, 28, 1), logits (batch, 10). Parameters are
float32; `dtype` is the type of the computation. `axis_name` names the mapped axis over which the batch is
split, if there is one: batch norm and dropout need it. The one that takes features instead of images is
`transfer_head`.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx

from fmbench.models.cnn import CNN1, CNN2, CNN3, CNN4, Baseline
from fmbench.models.mlp import MLP, BatchNormMLP, FullyConnected
from fmbench.models.resnet import ResNet, ResNet18
from fmbench.models.speedrun import Speedrun
from fmbench.models.tiny import Tiny
from fmbench.models.transfer import TransferHead
from fmbench.models.vgg import VGGLike
from fmbench.models.wide_resnet import WideResNet

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

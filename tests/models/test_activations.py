"""What layers return, caught in the forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import arbitrary_model
from flax import nnx

from fmbench.models import activations

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(size=(2, 28, 28, 1)), jnp.float32)


@pytest.mark.parametrize(
    ("name", "arguments", "shapes"),
    [
        ("cnn1", {}, {"conv1": (26, 26, 32)}),
        ("cnn3", {}, {"conv1": (26, 26, 32), "conv2": (11, 11, 64), "conv3": (3, 3, 128)}),
        (
            "cnn4",
            {},
            {"conv1": (26, 26, 32), "conv2": (24, 24, 32), "conv3": (10, 10, 64), "conv4": (8, 8, 128)},
        ),
        (
            "vgg_like",
            {},
            {"conv1": (28, 28, 32), "conv2": (28, 28, 64), "conv3": (14, 14, 128), "conv4": (12, 12, 256)},
        ),
        (
            "resnet",
            {"depth": 8},
            {
                "stem": (28, 28, 16),
                "blocks.0.conv1": (28, 28, 16),
                "blocks.0.conv2": (28, 28, 16),
                "blocks.1.conv1": (14, 14, 32),
                "blocks.1.conv2": (14, 14, 32),
                "blocks.2.conv1": (7, 7, 64),
                "blocks.2.conv2": (7, 7, 64),
            },
        ),
    ],
)
def test_every_convolution_of_every_net_is_caught(name, arguments, shapes, images):
    caught = activations.of_convolutions(arbitrary_model(name, **arguments), images[:1])
    assert {path: maps.shape for path, maps in caught.items()} == {
        path: (1, *shape) for path, shape in shapes.items()
    }


def test_what_is_caught_is_what_the_layers_return(images):
    model = arbitrary_model("cnn3", dtype=jnp.bfloat16)
    logits = np.asarray(model(images), np.float32)
    caught = activations.of_layers(model, images)
    assert all(output.dtype == np.float32 for output in caught.values())
    np.testing.assert_allclose(caught["head"], logits, atol=0.02)
    np.testing.assert_allclose(caught["conv1"], np.asarray(model.conv1(images), np.float32), atol=0.02)
    assert (caught["conv1"] < 0).any()
    # This one ends in a ReLU of its own.
    assert (caught["conv3"] >= 0).all()
    assert (caught["conv3"] > 0).any()
    # Afterwards the model is as it was.
    np.testing.assert_array_equal(np.asarray(model(images), np.float32), logits)
    assert not any(hasattr(module, "__captures__") for _, module in nnx.iter_modules(model))


def test_a_net_without_convolutions_is_not_run():
    assert activations.of_convolutions(arbitrary_model("mlp"), jnp.zeros((1, 3))) == {}

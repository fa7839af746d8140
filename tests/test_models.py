"""Every model: its exact size, its shapes, its types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fmbench.models import MODELS, split_model
from fmbench.models.cnn import CNN4
from fmbench.models.vgg import VGGLike
from fmbench.steps import count

# name, arguments -> parameters with running statistics (as Keras counts), and trainable ones.
SIZES = {
    ("mlp", ()): (384_854, 384_854),
    ("fully_connected", (("widths", (128, 64)), ("num_dropouts", 1))): (109_386, 109_386),
    ("fully_connected", (("widths", (392, 196, 98, 49)), ("num_dropouts", 3))): (409_405, 409_405),
    ("baseline", ()): (542_230, 542_230),
    ("baseline", (("padding", "SAME"),)): (628_630, 628_630),
    ("baseline", (("filters", 64), ("padding", "SAME"))): (1_256_150, 1_256_150),
    ("cnn2", ()): (45_066, 45_066),
    ("cnn1", ()): (693_962, 693_962),
    ("cnn3", ()): (241_546, 241_546),
    ("cnn4", ()): (1_221_546, 1_219_754),
    ("vgg_like", ()): (1_505_034, 1_505_034),
    # The paper's 272,474 on colour images, less the stem's two more input channels (2 * 9 * 16), and with neither
    # biases nor projections; 688 channels have running means and variances.
    ("resnet", (("depth", 20),)): (269_434 + 2 * 688, 269_434),
    ("transfer_head", (("num_features", 8192),)): (4_199_946, 4_199_946),
    ("transfer_head", (("num_features", 1280),)): (661_002, 661_002),
}


@pytest.fixture(params=SIZES, ids=str)
def size(request):
    return request.param


def test_registry_is_covered():
    assert {name for name, _ in SIZES} == set(MODELS)


def test_parameter_counts(size):
    name, arguments = size
    model = nnx.eval_shape(lambda: MODELS[name](rngs=nnx.Rngs(0), **dict(arguments)))
    _, params, model_state = split_model(model)
    assert (count(params) + count(model_state), count(params)) == SIZES[size]
    assert {leaf.dtype for leaf in jax.tree.leaves((params, model_state))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits(size, dtype):
    name, arguments = size
    arguments = [("depth", 8)] if name == "resnet" else arguments  # compiles sooner
    shape = (dict(arguments)["num_features"],) if name == "transfer_head" else (28, 28, 1)
    images = np.random.default_rng(0).random((3, *shape), np.float32)

    @jax.jit
    def logits(images):
        model = MODELS[name](rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), **dict(arguments))
        return model(images), model(images, train=True, rngs=nnx.Rngs(dropout=1))

    plain, training = logits(images)
    assert plain.shape == training.shape == (3, 10)
    assert plain.dtype == training.dtype == jnp.dtype(dtype)
    assert np.isfinite(plain).all()
    # Three different images, three different answers; and with dropout or batch norm training isn't inference.
    assert len(np.unique(np.asarray(plain, np.float32), axis=0)) == 3
    assert np.array_equal(plain, training) == (name == "baseline")


def test_keras_batch_norm_constants():
    model = nnx.eval_shape(lambda: CNN4(rngs=nnx.Rngs(0)))
    assert (model.norm1.momentum, model.norm1.epsilon) == (0.99, 1e-3)


@pytest.mark.parametrize("depth", [18, 2, 21])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match="6n \\+ 2"):
        MODELS["resnet"](rngs=nnx.Rngs(0), depth=depth)


def test_glorot_uniform_initialisation():
    kernel = np.asarray(jax.jit(lambda: VGGLike(rngs=nnx.Rngs(0)).conv4.kernel[...])())
    limit = np.sqrt(6 / (9 * 128 + 9 * 256))
    assert np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.01)

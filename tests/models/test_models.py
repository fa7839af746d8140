"""Every model: its exact size, its shapes, its types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import arbitrary_model
from flax import nnx

from fmbench.layers import Dropout
from fmbench.models import MODELS, activations, split_model
from fmbench.models.cnn import CNN4
from fmbench.models.resnet import BasicBlock, residual_layers
from fmbench.models.vgg import VGGLike
from fmbench.models.wide_resnet import WideBlock
from fmbench.training.steps import count

pytestmark = pytest.mark.usefixtures("strict_dtypes")

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
    # The 11,173,962 that it has everywhere on colour images, less the stem's two more input channels (2 * 9 * 64).
    ("resnet18", ()): (11_172_810 + 2 * 4_800, 11_172_810),
    # By `wide_resnet_size`, below.
    ("wide_resnet", (("depth", 16), ("width", 4))): (2_748_602 + 2 * 1_808, 2_748_602),
    ("wide_resnet", (("depth", 28), ("width", 10))): (36_478_906 + 2 * 8_976, 36_478_906),
    ("wide_resnet", (("depth", 40), ("width", 4))): (8_948_922 + 2 * 5_392, 8_948_922),
    ("tiny", (("widths", (16, 24, 32)),)): (98_458, 98_458 - 2 * 448),
    ("tiny", (("widths", (10, 16, 24)),)): (49_316, 49_316 - 2 * 310),
    ("tiny", (("widths", (8, 10, 14)),)): (19_778, 19_778 - 2 * 200),
    # The stem, what follows, batch norm of 460 channels or of 920, the head.
    ("speedrun", (("stem_width", 4), ("widths", (32, 64, 128)))): (
        9 * (36 + 4 * 32 + 32 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 128 * 128) + 4 * 460 + 1_290,
        289_382,
    ),
    ("speedrun", (("stem_width", 8), ("widths", (64, 128, 256)))): (
        9 * (136 + 8 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256) + 4 * 920 + 2_570,
        1_153_026,
    ),
    # Weights 784 * 1024 + 1024 * 1024 + 1024 * 512, scales, biases, means and variances of 2,560 units, the head.
    ("mlp_bn", (("widths", (1024, 1024, 512)), ("dropout", 0.2))): (2_375_680 + 4 * 2_560 + 5_130, 2_385_930),
    ("transfer_head", (("num_features", 8192),)): (4_199_946, 4_199_946),
    ("transfer_head", (("num_features", 1280),)): (661_002, 661_002),
}

# What stands for the deep ones where a net is compiled.
SMALLER = {
    "resnet": (("depth", 8),),
    "wide_resnet": (("depth", 10), ("width", 2)),
    "tiny": (("widths", (4, 6, 8)),),
}
COMPILES_SOONER = {"xla_backend_optimization_level": 0}


@pytest.fixture(params=SIZES, ids=str)
def size(request):
    return request.param


def test_registry_is_covered():
    assert {name for name, _ in SIZES} == set(MODELS), "SIZES needs the exact parameter counts of every model"


def test_parameter_counts(size):
    name, arguments = size
    model = nnx.eval_shape(lambda: MODELS[name](rngs=nnx.Rngs(0), **dict(arguments)))
    _, params, model_state = split_model(model)
    assert (count(params) + count(model_state), count(params)) == SIZES[size]
    assert {leaf.dtype for leaf in jax.tree.leaves((params, model_state))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "arguments"), dict.fromkeys((name, SMALLER.get(name, arguments)) for name, arguments in SIZES)
)
def test_logits(name, arguments, dtype):
    shape = (dict(arguments)["num_features"],) if name == "transfer_head" else (28, 28, 1)
    images = np.random.default_rng(0).random((3, *shape), np.float32)

    @functools.partial(jax.jit, compiler_options=COMPILES_SOONER)
    def logits(images):
        model = MODELS[name](rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), **dict(arguments))
        return model(images), model(images, train=True, rngs=nnx.Rngs(dropout=1))

    plain, training = logits(images)
    assert plain.shape == training.shape == (3, 10)
    assert plain.dtype == training.dtype == jnp.dtype(dtype)
    assert np.isfinite(plain).all()
    # Three different images, three different answers; and with dropout or batch norm training isn't inference.
    assert len(np.unique(np.asarray(plain, np.float32), axis=0)) == 3
    model = nnx.eval_shape(lambda: MODELS[name](rngs=nnx.Rngs(0), **dict(arguments)))
    is_other = any(isinstance(module, Dropout | nnx.BatchNorm) for _, module in nnx.iter_modules(model))
    assert np.array_equal(plain, training) == (not is_other)


def test_keras_batch_norm_constants():
    model = nnx.eval_shape(lambda: CNN4(rngs=nnx.Rngs(0)))
    assert (model.norm1.momentum, model.norm1.epsilon) == (0.99, 1e-3)


@pytest.mark.parametrize("depth", [18, 2, 21])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match="6n \\+ 2"):
        MODELS["resnet"](rngs=nnx.Rngs(0), depth=depth)


def wide_resnet_size(depth: int, width: int, channels: int) -> tuple[int, int]:
    """Trainable parameters and normalised channels, by hand from table 1 and section 3 of Zagoruyko & Komodakis.

    With k the width, stages lead from 16 channels to 16k, 32k and 64k, in n blocks of two 3x3 convolutions. The
    first convolution of a stage and the 1x1 shortcut beside it have 10 weights for each pair of channels; the
    other 2n - 1 convolutions map a stage's channels onto themselves. A batch norm stands before every 3x3
    convolution but the stem, and before the head.
    """
    n, k = (depth - 4) // 6, width
    convolutions = 9 * 16 * channels
    convolutions += 10 * (16 * 16 * k + 16 * 32 * k**2 + 32 * 64 * k**2)
    convolutions += 9 * (2 * n - 1) * (16**2 + 32**2 + 64**2) * k**2
    normalised = (16 + 16 * k + 32 * k) + (2 * n - 1) * (16 + 32 + 64) * k + 64 * k
    return convolutions + 2 * normalised + (64 * k + 1) * 10, normalised


@pytest.mark.parametrize(
    ("depth", "width", "millions"),  # as published, for colour images
    [(16, 4, 2.7), (28, 10, 36.5), (40, 4, 8.9)],
)
def test_wide_resnet_sizes_are_the_papers(depth, width, millions):
    assert round(wide_resnet_size(depth, width, channels=3)[0] / 1e6, 1) == millions
    params, normalised = wide_resnet_size(depth, width, channels=1)
    assert SIZES["wide_resnet", (("depth", depth), ("width", width))] == (params + 2 * normalised, params)


@pytest.mark.parametrize("depth", [18, 4, 20])
def test_wide_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match="6n \\+ 4"):
        MODELS["wide_resnet"](rngs=nnx.Rngs(0), depth=depth, width=2)


@pytest.mark.parametrize(
    ("name", "arguments", "num_convolutions", "shapes"),
    [
        # Weighted layers less the head; beside them, 1x1 convolutions where the channels change.
        ("wide_resnet", {"depth": 10, "width": 2}, 1 + 6 + 3, {(28, 16), (28, 32), (14, 64), (7, 128)}),
        ("resnet18", {}, 1 + 16 + 3, {(28, 64), (14, 128), (7, 256), (4, 512)}),
        ("tiny", {"widths": (8, 10, 14)}, 1 + 18, {(28, 8), (14, 10), (7, 14)}),
    ],
)
def test_residual_nets_halve_the_image_between_stages(name, arguments, num_convolutions, shapes):
    maps = activations.of_convolutions(arbitrary_model(name, **arguments), jnp.zeros((1, 28, 28, 1)))
    assert len(maps) == num_convolutions
    assert {(output.shape[1], output.shape[3]) for output in maps.values()} == shapes


def shortcut_of(block_class, inputs, outputs, strides, **arguments):
    """A block whose residual branch gives zeros: random images, what it makes of them, kernels of its 1x1."""
    images = np.random.default_rng(0).standard_normal((2, 6, 6, inputs)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=COMPILES_SOONER)
    def call(images):
        make_conv, batch_norm = residual_layers(jnp.float32, None, nnx.Rngs(0))
        block = block_class(inputs, outputs, strides, conv=make_conv, batch_norm=batch_norm, **arguments)
        block.conv2.kernel[...] *= 0
        convolutions = [module for _, module in nnx.iter_modules(block) if isinstance(module, nnx.Conv)]
        kernels = [conv.kernel[...][0, 0] for conv in convolutions if tuple(conv.kernel_size) == (1, 1)]
        return block(images, train=False), kernels

    return images, *call(images)


def test_wide_blocks_normalise_before_they_convolve():
    # Nothing, no ReLU either, lies on the way past a block.
    images, result, kernels = shortcut_of(WideBlock, 4, 4, 1)
    np.testing.assert_array_equal(result, images)
    assert not kernels
    # Where the channels change, the shortcut starts from what the first convolution sees.
    images, result, (kernel,) = shortcut_of(WideBlock, 4, 8, 2)
    normalised = np.maximum(images / np.sqrt(1 + 1e-5), 0)[:, ::2, ::2]
    np.testing.assert_allclose(result, normalised @ kernel, rtol=1e-4, atol=1e-5)


def test_basic_blocks_project_where_channels_change():
    images, result, (kernel,) = shortcut_of(BasicBlock, 4, 8, 2, project=True)
    projected = (images[:, ::2, ::2] @ kernel) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(result, np.maximum(projected, 0), rtol=1e-4, atol=1e-5)
    images, result, kernels = shortcut_of(BasicBlock, 4, 4, 1, project=True)
    np.testing.assert_array_equal(result, np.maximum(images, 0))
    assert not kernels


def test_the_stem_of_the_speed_records_has_a_shortcut():
    stem = arbitrary_model("speedrun", stem_width=4, widths=(4, 8, 12)).stem
    images = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    first = stem.norm1(stem.conv1(images), train=False, relu=True)
    assert np.abs(stem(images, train=False) - first).max() > 0.01
    stem.norm3.scale[...] = stem.norm3.bias[...] = jnp.zeros(4)
    np.testing.assert_array_equal(stem(images, train=False), first)


def test_glorot_uniform_initialisation():
    kernel = np.asarray(jax.jit(lambda: VGGLike(rngs=nnx.Rngs(0)).conv4.kernel[...])())
    limit = np.sqrt(6 / (9 * 128 + 9 * 256))
    assert np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.01)

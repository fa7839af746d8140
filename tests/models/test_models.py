"""Every model: its exact size, its shapes, its types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import arbitrary_model, arbitrary_state
from flax import nnx

from fmbench.layers import Dropout
from fmbench.models import MODELS, activations, split_model
from fmbench.models.cnn import CNN4
from fmbench.models.resnet import BasicBlock, residual_layers
from fmbench.models.shake_shake import ShakeBlock, Skip, draw, shake
from fmbench.models.vgg import VGGLike
from fmbench.models.wide_resnet import WideBlock
from fmbench.training import parallel
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
    # By `preact_resnet_size` and `shake_shake_size`, below.
    ("preact_resnet", (("depth", 20), ("width", 4))): (4_325_834 + 2 * 2_752, 4_325_834),
    ("preact_resnet", (("depth", 50), ("width", 4))): (12_076_234 + 2 * 7_232, 12_076_234),
    ("shake_shake", (("depth", 26), ("width", 32))): (2_922_874 + 2 * 3_824, 2_922_874),
    ("shake_shake", (("depth", 26), ("width", 64))): (11_653_690 + 2 * 7_632, 11_653_690),
    ("shake_shake", (("depth", 26), ("width", 96))): (26_192_634 + 2 * 11_440, 26_192_634),
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
    "preact_resnet": (("depth", 8), ("width", 1)),
    "shake_shake": (("depth", 8), ("width", 8)),
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


def preact_resnet_size(depth: int, width: int, channels: int) -> tuple[int, int]:
    """Trainable parameters and normalised channels, by hand from the appendix of He et al.

    A stem and three stages of n blocks of two 3x3 convolutions with 16k, 32k and 64k channels, which differ from
    WRN-(6n + 4)-k in what leads into the first stage: the stem has 16k channels for 16 already, so there is no
    shortcut, and the first convolution has 16k for 16 to sum over, which a batch norm has to normalise.
    """
    params, normalised = wide_resnet_size(depth + 2, width, channels)
    more = 16 * width - 16
    return params + 9 * channels * more + 9 * more * 16 * width - 16 * 16 * width + 2 * more, normalised + more


def test_preact_resnet_sizes():
    # Depth 110 on colour images, by table 4 of Zagoruyko & Komodakis.
    assert round(preact_resnet_size(110, 1, channels=3)[0] / 1e6, 1) == 1.7
    for depth in (20, 50):
        params, normalised = preact_resnet_size(depth, 4, channels=1)
        assert SIZES["preact_resnet", (("depth", depth), ("width", 4))] == (params + 2 * normalised, params)


def shake_shake_size(depth: int, width: int, channels: int) -> tuple[int, int]:
    """Trainable parameters and normalised channels, by hand from section 2 of Gastaldi.

    Stages lead from 16 channels to w, 2w and 4w, in n blocks of two branches of two 3x3 convolutions, with a batch
    norm behind each. The first convolutions of a stage and the two halves of the 1x1 skip beside them, which has a
    batch norm too, have 2 * 9 + 1 weights for each pair of channels.
    """
    n, w = (depth - 2) // 6, width
    convolutions = 9 * 16 * channels
    convolutions += 19 * (16 * w + w * 2 * w + 2 * w * 4 * w)
    convolutions += 2 * 9 * (2 * n - 1) * (w**2 + (2 * w) ** 2 + (4 * w) ** 2)
    normalised = 16 + (2 * 2 * n + 1) * (w + 2 * w + 4 * w)
    return convolutions + 2 * normalised + (4 * w + 1) * 10, normalised


@pytest.mark.parametrize(("width", "millions"), [(32, 2.9), (64, 11.7), (96, 26.2)])  # as published, for colour
def test_shake_shake_sizes_are_the_papers(width, millions):
    assert round(shake_shake_size(26, width, channels=3)[0] / 1e6, 1) == millions
    params, normalised = shake_shake_size(26, width, channels=1)
    assert SIZES["shake_shake", (("depth", 26), ("width", width))] == (params + 2 * normalised, params)


@pytest.mark.parametrize(
    ("name", "form", "depths"),
    [
        ("wide_resnet", "6n \\+ 4", [18, 4, 20]),
        ("preact_resnet", "6n \\+ 2", [18, 2, 22]),
        ("shake_shake", "6n \\+ 2", [18, 2, 27]),
    ],
)
def test_other_depths_are_refused(name, form, depths):
    for depth in depths:
        with pytest.raises(ValueError, match=form):
            MODELS[name](rngs=nnx.Rngs(0), depth=depth, width=2)


@pytest.mark.parametrize(
    ("name", "arguments", "num_convolutions", "shapes"),
    [
        # Weighted layers less the head; beside them, 1x1 convolutions where the channels change.
        ("wide_resnet", {"depth": 10, "width": 2}, 1 + 6 + 3, {(28, 16), (28, 32), (14, 64), (7, 128)}),
        ("preact_resnet", {"depth": 8, "width": 2}, 1 + 6 + 2, {(28, 32), (14, 64), (7, 128)}),
        # Two convolutions of half the channels past the first block of each stage.
        (
            *("shake_shake", {"depth": 8, "width": 8}, 1 + 12 + 6),
            {(28, 16), (28, 8), (28, 4), (14, 16), (14, 8), (7, 32), (7, 16)},
        ),
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
    # Behind the stem of a pre-activation net both ways do.
    images, result, kernels = shortcut_of(WideBlock, 4, 4, 1, follows_stem=True)
    np.testing.assert_allclose(result, np.maximum(images / np.sqrt(1 + 1e-5), 0), rtol=1e-6)
    assert not kernels
    follow = [block.follows_stem for block in arbitrary_model("preact_resnet", depth=14, width=1).blocks]
    assert follow == [True] + 5 * [False]


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


# Shake-shake.


def test_shaking_blends_and_its_gradient_blends_otherwise():
    first, second, gradient = (jnp.array([pair], jnp.float32) for pair in ((2, 4), (10, 20), (1, 3)))
    blended, pullback = jax.vjp(shake, first, second, jnp.float32(0.25), jnp.float32(0.75))
    np.testing.assert_array_equal(blended, [[8, 16]])
    to_first, to_second, *to_coefficients = pullback(gradient)
    np.testing.assert_array_equal(to_first, [[0.75, 2.25]])
    np.testing.assert_array_equal(to_second, [[0.25, 0.75]])
    assert to_coefficients == [0, 0]


def test_coefficients_are_uniform_and_independent():
    """Of each other: of blocks, of forward and backward, of images, of keys."""
    drawn = np.stack([draw(key, 3, 2000) for key in jax.random.split(jax.random.key(0))])
    assert drawn.shape == (2, 3, 2, 2000)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    np.testing.assert_allclose([drawn.mean(), drawn.var()], [1 / 2, 1 / 12], rtol=0.02)
    rows = drawn.reshape(12, 2000)
    assert np.abs(np.corrcoef(np.vstack([rows, np.roll(rows, 1, axis=1)])) - np.eye(24)).max() < 0.1


def test_evaluation_takes_the_mean_of_the_branches_and_training_a_share_of_each():
    images = np.random.default_rng(0).standard_normal((3, 6, 6, 4)).astype(np.float32)
    shares = jnp.array([[0, 1, 0.25], [0.5, 0.5, 0.5]])

    @functools.partial(jax.jit, compiler_options=COMPILES_SOONER)
    def call(images):
        make_conv, batch_norm = residual_layers(jnp.float32, None, nnx.Rngs(0))
        block = ShakeBlock(4, 4, 1, conv=make_conv, batch_norm=batch_norm)
        branches = block.branch1(images, train=False), block.branch2(images, train=False)
        return branches, block(images, None, train=False), block(images, shares, train=False)

    (first, second), evaluated, trained = call(images)
    np.testing.assert_allclose(evaluated, images + (first + second) / 2, rtol=1e-5, atol=1e-5)
    own = shares[0][:, None, None, None]
    np.testing.assert_allclose(trained, images + own * first + (1 - own) * second, rtol=1e-5, atol=1e-5)


def test_the_skip_sees_every_other_pixel_twice():
    images = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype(np.float32)
    make_conv, batch_norm = residual_layers(jnp.float32, None, nnx.Rngs(0))
    skip = Skip(3, 8, 2, conv=make_conv, batch_norm=batch_norm)
    kernels = [np.asarray(conv.kernel[...])[0, 0] for conv in (skip.conv1, skip.conv2)]
    relu = np.maximum(images, 0)
    seen = [relu[:, ::2, ::2] @ kernels[0], relu[:, 1::2, 1::2] @ kernels[1]]
    expected = np.concatenate(seen, axis=-1) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(skip(jnp.asarray(images), train=False), expected, rtol=1e-4, atol=1e-5)


def test_shake_shake_needs_rngs_in_training():
    model = arbitrary_model("shake_shake", depth=8, width=2)
    with pytest.raises(ValueError, match="in training shake-shake needs rngs"):
        model(jnp.zeros((2, 28, 28, 1)), train=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_coefficients_depend_on_the_place_in_the_global_batch_only(dtype):
    """On one and on eight devices: the same bits of result and gradient."""

    def blend(key, first, second, gradient, axis_name=None):
        coefficients = draw(key, 1, len(first), axis_name)[0, ..., None].astype(dtype)
        blended, pullback = jax.vjp(lambda first, second: shake(first, second, *coefficients), first, second)
        return blended, *pullback(gradient)

    arrays = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16, 5)), dtype)
    alone = jax.jit(blend)(jax.random.key(0), *arrays)
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(parallel.AXIS)
    mesh = parallel.make_mesh(jax.devices()[:8])
    spread = jax.shard_map(
        functools.partial(blend, axis_name=parallel.AXIS),
        mesh=mesh,
        in_specs=(whole, *3 * [split]),
        out_specs=split,
    )
    for got, expected in zip(jax.jit(spread)(jax.random.key(0), *arrays), alone, strict=True):
        assert got.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(got, expected)


def shaken_step(axis_name=None):
    """Loss and gradients of a net on 16 images, as a function of parameters and key; the parameters."""
    graphdef, params, rest = arbitrary_state("shake_shake", depth=8, width=4, axis_name=axis_name)
    images = np.random.default_rng(1).random((16, 28, 28, 1)).astype(np.float32)

    def loss(params, key, images):
        logits = nnx.merge(graphdef, params, rest, copy=True)(images, train=True, rngs=nnx.Rngs(dropout=key))
        return (logits**2).mean()

    def step(params, key):
        if axis_name is None:
            return jax.value_and_grad(loss)(params, key, images)
        part = jnp.asarray(images)[parallel.my_part(16)]
        return jax.lax.pmean(jax.value_and_grad(loss)(params, key, part), axis_name)

    return step, params


@pytest.mark.slow
def test_eight_devices_shake_as_one_does():
    (step, params), (spread, _) = shaken_step(), shaken_step(parallel.AXIS)
    expected = jax.jit(step)(params, jax.random.key(0))
    got = jax.jit(parallel.map_over(parallel.make_mesh(jax.devices()[:8]), spread))(params, jax.random.key(0))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_a_step_of_several_seeds_at_once_shakes_as_each_alone_does():
    step, params = shaken_step()
    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(step, in_axes=(None, 0)))(params, keys)
    alone = [jax.jit(step)(params, key) for key in keys]
    assert alone[0][0] != alone[1][0]
    for both, *each in zip(*map(jax.tree.leaves, (together, *alone)), strict=True):
        np.testing.assert_allclose(both, np.stack(each), rtol=1e-4, atol=1e-4 * np.abs(both).max())


def test_glorot_uniform_initialisation():
    kernel = np.asarray(jax.jit(lambda: VGGLike(rngs=nnx.Rngs(0)).conv4.kernel[...])())
    limit = np.sqrt(6 / (9 * 128 + 9 * 256))
    assert np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.01)

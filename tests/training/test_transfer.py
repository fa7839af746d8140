"""Frozen backbones compute what their definitions say, once for each image; a head learns from that."""

import hashlib
import importlib.metadata

import h5py
import jax
import jax.numpy as jnp
import matplotlib.cbook
import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
from flax import nnx

from fmbench.data import fashion_mnist, features, pretrained
from fmbench.data.features import Spec
from fmbench.errors import UserError
from fmbench.models import exported, split_model
from fmbench.models.transfer import (
    BACKBONES,
    VGG19_STAGES,
    DepthwiseConv,
    EfficientNetLite0,
    TransferHead,
)
from fmbench.training import inference
from fmbench.training.run import train_and_evaluate
from fmbench.training.steps import count

Arrays = dict[str, np.ndarray]
LITE0 = Spec("efficientnet_lite0", "", 32, "imagenet")
QUICK = {"features__image_size": 32, "batch_size": 32, "num_epochs": 5}


def has_lite0() -> bool:
    try:
        return bool(importlib.metadata.files(pretrained.LITE0_PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_lite0 = pytest.mark.skipif(not has_lite0(), reason=f"{pretrained.LITE0_PACKAGE} is not installed")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.asarray(fashion_mnist.load("sample").test_images)


@pytest.fixture(scope="module")
def lite0_arrays() -> Arrays:
    return pretrained.read_torch(pretrained.FETCH["efficientnet_lite0"]())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FMBENCH_CACHE", str(tmp_path))
    return tmp_path / "features"


@pytest.mark.parametrize(("num_features", "num_params"), [(8192, 4_199_946), (1280, 661_002)])
def test_size_of_the_head(num_features, num_params):
    model = nnx.eval_shape(lambda: TransferHead(num_features=num_features, rngs=nnx.Rngs(0)))
    assert count(split_model(model)[1]) == num_params


# EfficientNet-Lite0 has 4,652,008 trainable parameters, with the classifier's 1,281,000 and the scales of 21,008
# channels' batch norms, which went into the kernels.
@pytest.mark.parametrize(
    ("backbone", "num_params"),
    [("efficientnet_lite0", 4_652_008 - 1_281_000 - 21_008), ("vgg19", 20_024_384)],
)
def test_size_of_the_backbones(backbone, num_params):
    model = nnx.eval_shape(lambda: BACKBONES[backbone](rngs=nnx.Rngs(0)))
    assert count(split_model(model)[1]) == num_params


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("shape", [(7, 10), (8, 2), (1, 5)])
def test_depthwise_is_a_convolution_of_as_many_groups_as_channels(size, strides, shape):
    rng = np.random.default_rng(0)
    layer = DepthwiseConv(6, size, strides, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, *shape, 6)), jnp.float32)
    expected = jax.lax.conv_general_dilated(
        x,
        layer.kernel[...],
        (strides, strides),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    np.testing.assert_allclose(layer(x), expected + layer.bias[...], atol=1e-5)


def lite0_by_definition(arrays: Arrays, x: np.ndarray) -> jax.Array:
    """EfficientNet-Lite0's features from PyTorch's arrays, straight from its table: NCHW, batch norms apart."""

    def conv(x, name, strides=1, groups=1):
        kernel = jnp.asarray(arrays[f"{name}.weight"])
        return jax.lax.conv_general_dilated(x, kernel, (strides, strides), "SAME", feature_group_count=groups)

    def norm(x, name):
        scale, shift, mean, variance = (
            arrays[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / jnp.sqrt(variance + 1e-3) * scale + shift

    def relu6(x):
        return jnp.clip(x, 0, 6)

    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    x = relu6(norm(conv(x.transpose(0, 3, 1, 2), "_conv_stem", 2), "_bn0"))
    for index, stride in enumerate(strides):
        name, y = f"_blocks.{index}", x
        if index:
            y = relu6(norm(conv(y, f"{name}._expand_conv"), f"{name}._bn0"))
        y = relu6(norm(conv(y, f"{name}._depthwise_conv", stride, groups=y.shape[1]), f"{name}._bn1"))
        y = norm(conv(y, f"{name}._project_conv"), f"{name}._bn2")
        x = x + y if x.shape == y.shape else y
    return relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3))


@needs_lite0
def test_lite0_computes_what_its_definition_says(images, lite0_arrays):
    images = images[40 : 40 + features.BATCH_SIZE]  # number 40 saturates the last ReLU6
    expected = jax.jit(lite0_by_definition)(lite0_arrays, features.preprocess(jnp.asarray(images[:3]), LITE0))
    found = features.extract(images, LITE0)[:3]
    assert found.shape == (3, 1280)
    assert found.dtype == np.float32
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-3)


@needs_lite0
def test_lite0_recognises_photographs(lite0_arrays):
    graphdef, _, _ = split_model(nnx.eval_shape(lambda: EfficientNetLite0(rngs=nnx.Rngs(0))))
    params = pretrained.load("efficientnet_lite0")
    hopper = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    photographs = [PIL.Image.open(hopper).convert("RGB")]
    photographs += [PIL.Image.fromarray(photo) for photo in sklearn.datasets.load_sample_images().images]
    x = np.stack([np.asarray(crop(photo, 224), np.float32) for photo in photographs])
    found = jax.jit(lambda params, x: nnx.merge(graphdef, params, {})(x))(params, (x - 127) / 128)
    logits = found @ lite0_arrays["_fc.weight"].T + lite0_arrays["_fc.bias"]
    military_uniform, palace, daisy = 652, 698, 985  # in ILSVRC 2012's numbering
    assert logits.argmax(axis=1).tolist() == [military_uniform, palace, daisy]


def crop(photo: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The square in the middle."""
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.crop((left, top, left + side, top + side)).resize((size, size), PIL.Image.Resampling.BICUBIC)


def vgg19_by_definition(
    kernels: dict[str, np.ndarray], biases: dict[str, np.ndarray], x: np.ndarray
) -> np.ndarray:
    """VGG19 without top in NumPy: each convolution as products of shifted images with the kernel's taps."""
    for block, num_convs in enumerate((2, 2, 4, 4, 4), start=1):
        for index in range(1, num_convs + 1):
            kernel, bias = (arrays[f"block{block}_conv{index}"] for arrays in (kernels, biases))
            rows, columns = x.shape[1:3]
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            taps = [padded[:, i : i + rows, j : j + columns] @ kernel[i, j] for i in range(3) for j in range(3)]
            x = np.maximum(sum(taps) + bias, 0)
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        x = x[:, : 2 * rows, : 2 * columns].reshape(len(x), rows, 2, columns, 2, -1).max(axis=(2, 4))
    return x.reshape(len(x), -1)


def test_vgg19_from_a_file_computes_what_its_definition_says(images, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    kernels, biases = {}, {}
    inputs = 3
    with h5py.File(tmp_path / "notop.h5", "w") as file:
        for block, (outputs, num_convs) in enumerate(VGG19_STAGES, start=1):
            for index in range(1, num_convs + 1):
                name = f"block{block}_conv{index}"
                scale = np.float32(np.sqrt(2 / (9 * inputs)))
                kernels[name] = scale * rng.standard_normal((3, 3, inputs, outputs), np.float32)
                biases[name] = rng.standard_normal(outputs, np.float32)
                file[f"{name}/{name}_W_1:0"], file[f"{name}/{name}_b_1:0"] = kernels[name], biases[name]
                file[name].attrs["weight_names"] = [f"{name}_W_1:0".encode(), f"{name}_b_1:0".encode()]
                inputs = outputs
    digest = pretrained.Digest("md5", hashlib.md5((tmp_path / "notop.h5").read_bytes()).hexdigest())
    monkeypatch.setitem(pretrained.DIGESTS, "vgg19", digest)
    size = 70  # not a multiple of 32: rows are cut off, as they are of 150
    spec = Spec("vgg19", str(tmp_path / "notop.h5"), size, "imagenet")
    found = features.extract(images[:1], spec)
    grey = np.asarray(jax.image.resize(images[:1].astype(np.float32), (1, size, size), "linear"))
    bgr = np.stack([grey - 103.939, grey - 116.779, grey - 123.68], axis=-1)
    expected = vgg19_by_definition(kernels, biases, bgr.astype(np.float32))
    assert found.shape == expected.shape == (1, 2 * 2 * 512)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-2 * expected.std())


def test_images_are_enlarged_bilinearly_and_grey():
    image = jnp.zeros((1, 28, 28), jnp.uint8).at[0, :, 14:].set(255)
    x = np.asarray(features.preprocess(image, LITE0._replace(image_size=112)))
    assert x.shape == (1, 112, 112, 3)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, x[:, :1, :, :1].repeat(112, 1).repeat(3, 3), atol=1e-6)
    # Pixels are four wide; between the middles of the 13th and the 14th the level rises linearly.
    row = x[0, 0, :, 0] * 128 + 127
    np.testing.assert_allclose(row[:54], 0, atol=1e-4)
    np.testing.assert_allclose(row[54:58], 255 * np.array([1, 3, 5, 7]) / 8, rtol=1e-5)
    np.testing.assert_allclose(row[58:], 255, rtol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "preprocessing", "black", "white"),
    [
        ("efficientnet_lite0", "imagenet", [-127 / 128] * 3, [1] * 3),
        ("efficientnet_lite0", "rescaled_twice", [-127 / 128] * 3, [-126 / 128] * 3),
        ("vgg19", "imagenet", [-103.939, -116.779, -123.68], [151.061, 138.221, 131.32]),
        ("vgg19", "rescaled_twice", [-103.939, -116.779, -123.68], [-102.939, -115.779, -122.68]),
    ],
)
def test_black_and_white_as_the_backbones_get_them(backbone, preprocessing, black, white):
    levels = jnp.stack([jnp.zeros((28, 28), jnp.uint8), jnp.full((28, 28), 255, jnp.uint8)])
    x = np.asarray(features.preprocess(levels, Spec(backbone, "", 32, preprocessing)))
    np.testing.assert_allclose(x[0], np.broadcast_to(black, (32, 32, 3)), rtol=1e-5)
    np.testing.assert_allclose(x[1], np.broadcast_to(white, (32, 32, 3)), rtol=1e-5)


@pytest.fixture
def fake_backbone(monkeypatch):
    """One feature, the mean grey level; the list grows by the number of images each time it is computed."""
    computed: list[int] = []

    def extractor(spec):
        def run(batch):
            computed.append(len(batch))
            return batch.mean(axis=(1, 2), dtype=np.float32)[:, None]

        return run

    monkeypatch.setattr(features, "_extractor", extractor)
    monkeypatch.setattr(features, "BATCH_SIZE", 8)
    monkeypatch.setattr(features, "IMAGES_PER_FILE", 50)
    return computed


def test_features_are_computed_once(images, cache, fake_backbone):
    expected = images.mean(axis=(1, 2), dtype=np.float32)[:, None]
    np.testing.assert_array_equal(features.load(images[:120], "abc", LITE0), expected[:120])
    assert set(fake_backbone) == {8}  # the last batch is filled up, so that one program does
    assert len(fake_backbone) == 7 + 7 + 3
    assert all("57934424" in path.name and "abc" in path.name for path in cache.iterdir())
    fake_backbone.clear()
    np.testing.assert_array_equal(features.load(images[:120], "abc", LITE0), expected[:120])
    assert not fake_backbone


@pytest.mark.parametrize(
    ("sha256", "spec"),
    [
        ("abd", LITE0),
        ("abc", LITE0._replace(image_size=64)),
        ("abc", LITE0._replace(preprocessing="rescaled_twice")),
        ("abc", LITE0._replace(backbone="vgg19")),
    ],
)
def test_other_features_are_not_taken_for_these(sha256, spec, images, cache, fake_backbone):
    features.load(images[:8], "abc", LITE0)
    fake_backbone.clear()
    features.load(images[:8], sha256, spec)
    assert fake_backbone == [8]


def test_where_the_weights_lie_makes_no_other_features(images, cache, fake_backbone):
    features.load(images[:8], "abc", LITE0)
    fake_backbone.clear()
    features.load(images[:8], "abc", LITE0._replace(weights="elsewhere.pth"))
    assert not fake_backbone


def test_only_what_is_missing_or_broken_is_computed_again(images, cache, fake_backbone):
    whole = features.load(images[:120], "abc", LITE0)
    first, _, third = sorted(cache.iterdir(), key=lambda path: int(path.stem.rpartition("-")[2]))
    first.unlink()
    third.write_bytes(third.read_bytes()[:-3])
    fake_backbone.clear()
    np.testing.assert_array_equal(features.load(images[:120], "abc", LITE0), whole)
    assert len(fake_backbone) == 7 + 3


def test_a_stopped_extraction_keeps_the_files_it_finished(images, cache, fake_backbone, monkeypatch):
    run = features._extractor(LITE0)

    def stops(batch):
        if len(fake_backbone) == 9:
            raise KeyboardInterrupt
        return run(batch)

    with monkeypatch.context() as patch:
        patch.setattr(features, "_extractor", lambda spec: stops)
        with pytest.raises(KeyboardInterrupt):
            features.load(images[:120], "abc", LITE0)
    assert len(list(cache.iterdir())) == 1
    fake_backbone.clear()
    features.load(images[:120], "abc", LITE0)
    assert len(fake_backbone) == 7 + 3


@needs_lite0
def test_a_head_learns_from_features_and_predicts_from_images(make_config, images, cache, tmp_path):
    config = make_config("configs/transfer.py:efficientnet_lite0", **QUICK)
    assert config.entry.startswith("transfer-efficientnet_lite0+")
    record = train_and_evaluate(config, tmp_path / "work", results_dir=tmp_path / "results")
    assert len(list(cache.iterdir())) == 2
    assert record.num_trainable_params == 661_002
    assert record.test_accuracy is not None
    assert record.test_accuracy > 0.6

    model, description = exported.load_model(tmp_path / "work")
    assert description["features"]["backbone"] == "efficientnet_lite0"
    predictions = inference.classify(model, description, images[:40]).argmax(axis=1)
    recorded = np.load(tmp_path / "work" / "record.npy")
    np.testing.assert_array_equal(predictions, recorded[:40])


@needs_lite0
def test_another_number_of_features_is_told(make_config, cache, tmp_path):
    config = make_config("configs/transfer.py:efficientnet_lite0", model__num_features=1000, **QUICK)
    with pytest.raises(UserError, match=r"give --config\.model\.num_features=1280"):
        train_and_evaluate(config, tmp_path / "work", results_dir=tmp_path / "results")


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        ("configs/mlp.py", {"features__backbone": "vgg19"}, "go together; start from configs/transfer.py"),
        ("configs/mlp.py", {"data__normalization": "none"}, "go together"),
        ("configs/transfer.py:vgg19", {"data__normalization": "unit"}, "go together"),
        ("configs/transfer.py:vgg19", {"model__name": "mlp"}, "go together"),
        ("configs/transfer.py:vgg19", {"features__backbone": ""}, "go together"),
        ("configs/transfer.py:vgg19", {"augment__flip": True}, "cannot be augmented; drop config.augment"),
        (
            "configs/transfer.py:vgg19",
            {"features__image_size": 31},
            "image_size is 31; it must be at least 32",
        ),
        ("configs/transfer.py:vgg19", {"features__preprocessing": "x"}, "one of imagenet, rescaled_twice"),
        (
            "configs/transfer.py:resnet",
            {},
            "there are efficientnet_lite0, efficientnet_lite0-bug, vgg19, vgg19-bug",
        ),
        ("configs/transfer.py:vgg19-slow", {}, "there is no argument 'vgg19-slow'"),
        ("configs/transfer.py", {}, "needs an argument, as in transfer:efficientnet_lite0"),
    ],
)
def test_what_does_not_go_together_is_refused(make_config, spec, overrides, message):
    with pytest.raises(UserError, match=message):
        make_config(spec, **overrides)


def test_entries(make_config):
    right, wrong = (make_config(f"configs/transfer.py:vgg19{bug}") for bug in ("", "-bug"))
    assert (right.features.image_size, right.model.num_features) == (150, 8192)
    assert right.features.preprocessing == "imagenet"
    assert wrong.features.preprocessing == "rescaled_twice"
    elsewhere = make_config("configs/transfer.py:vgg19", features__weights="elsewhere.h5")
    assert elsewhere.entry == right.entry


def test_the_summary_is_the_heads(run_main):
    summary = run_main("--config=configs/transfer.py:efficientnet_lite0", "--summary")
    assert summary.returncode == 0, summary.stderr
    assert "661,002" in summary.stdout

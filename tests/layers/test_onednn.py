"""oneDNN's convolution against Flax's own."""

import concurrent.futures
import functools
import inspect
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fmbench import layers
from fmbench.layers import Conv, conv_batch_norm, convolution, cpp, onednn, winograd
from fmbench.layers.onednn import Window
from fmbench.models import MODELS
from fmbench.records import store

pytestmark = pytest.mark.skipif(
    onednn.library() is None, reason=f"{onednn.PACKAGE} is not installed or cannot be loaded here"
)

# Shape of x, outputs, kernel size, strides, padding.
CASES = [
    ((1, 28, 28, 1), 32, (3, 3), 1, "VALID"),
    ((7, 28, 28, 1), 16, (3, 3), 1, "SAME"),
    ((5, 13, 13, 32), 64, (3, 3), 1, "VALID"),
    ((3, 14, 14, 64), 128, (3, 3), 1, "SAME"),
    ((2, 6, 6, 256), 256, (3, 3), 1, "SAME"),
    ((6, 28, 28, 16), 32, (3, 3), 2, "SAME"),  # padded more at the end than at the beginning
    ((6, 7, 9, 3), 5, (3, 3), (2, 1), "SAME"),
    ((4, 11, 5, 17), 33, (2, 4), 1, ((1, 0), (2, 1))),
    ((9, 8, 8, 2), 1, (1, 1), 1, "VALID"),
    ((2, 28, 28, 1), 8, (6, 6), 2, "VALID"),
    # Few channels, of several pixels of a row at once: four, two, five, and none, as 7 and 11 have no divisors.
    ((3, 28, 28, 4), 4, (3, 3), 1, "SAME"),
    ((2, 28, 28, 8), 64, (3, 3), 1, "SAME"),
    ((2, 6, 11, 3), 3, (2, 2), 1, ((1, 0), (0, 0))),
    ((2, 7, 7, 4), 4, (3, 3), 1, "SAME"),
    ((2, 5, 4, 2), 3, (2, 1), 1, ((0, 2), (1, 0))),  # padded more than a mirrored kernel could be
    # Few channels of every other pixel, which are copied first.
    ((5, 14, 14, 8), 8, (1, 1), 2, "SAME"),
    ((5, 7, 6, 4), 3, (1, 1), (2, 3), "VALID"),
]


@pytest.fixture
def in_onednn(monkeypatch):
    """As with one device; the suite has eight, over which convolutions stay in XLA."""
    monkeypatch.setattr(convolution, "is_on_one_device", lambda: True)


def convolve(layer_class, case, dtype=jnp.float32, *, use_bias=True, relu=False):
    """Value and gradients, with respect to x and to the parameters."""
    shape, outputs, size, strides, padding = case
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    layer = layer_class(
        *(shape[-1], outputs, size),
        strides=strides,
        padding=padding,
        use_bias=use_bias,
        dtype=dtype,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(layer)
    if use_bias:
        params["bias"][...] = jnp.asarray(rng.standard_normal(outputs), jnp.float32)

    def value(params, x):
        model = nnx.merge(graphdef, params)
        if layer_class is Conv:
            return model(x, relu=relu)
        return nnx.relu(model(x)) if relu else model(x)

    @jax.jit
    def value_and_gradients(params, x, cotangent):
        y, pull = jax.vjp(value, params, x)
        return y, *pull(cotangent)

    y = jax.eval_shape(value, params, x)
    return value_and_gradients(params, x, jnp.asarray(rng.standard_normal(y.shape), y.dtype))


def assert_close(actual, expected, tolerance):
    """Within `tolerance` of the largest number: that is what rounding in a sum of many terms is like."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


@pytest.mark.usefixtures("in_onednn")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_convolution_equals_stock_flax(case, relu):
    assert_close(convolve(Conv, case, relu=relu), convolve(nnx.Conv, case, relu=relu), 5e-6)


@pytest.mark.parametrize(
    ("inputs", "outputs", "forward", "backward"),
    [
        (4, 4, (3, 6, 4, 16), (3, 6, 4, 16)),
        (4, 32, (3, 3, 4, 32), (3, 6, 32, 16)),
        (8, 16, (3, 3, 8, 16), (3, 4, 16, 16)),
        (16, 16, (3, 3, 16, 16), (3, 3, 16, 16)),
    ],
)
def test_few_channels_are_computed_for_several_pixels(inputs, outputs, forward, backward):
    """By the kernels that oneDNN gets: four neighbours of four channels see six columns."""
    kernel, shape = jnp.zeros((3, 3, inputs, outputs)), (2, 28, 28, inputs)
    window = onednn.Window((3, 3), (1, 1), ((1, 1), (1, 1)))
    y = jnp.zeros((2, 28, 28, outputs))
    calls = jax.make_jaxpr(lambda x: onednn.convolution(x, kernel, None, window))(jnp.zeros(shape))
    assert f"), {forward}, Window" in str(calls)
    calls = jax.make_jaxpr(lambda y: onednn.convolution_input_grad(y, kernel, shape, window))(y)
    assert f"), {backward}, Window" in str(calls)


@pytest.mark.usefixtures("in_onednn")
def test_convolution_without_bias():
    case = CASES[3]
    assert_close(convolve(Conv, case, use_bias=False), convolve(nnx.Conv, case, use_bias=False), 5e-6)


@pytest.mark.usefixtures("in_onednn")
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_convolution_in_bfloat16(case):
    actual, expected = convolve(Conv, case, jnp.bfloat16), convolve(nnx.Conv, case)
    y, params, x_grad = expected
    expected = y.astype(jnp.bfloat16), params, x_grad.astype(jnp.bfloat16)
    assert_close(actual, expected, 2e-2)


@pytest.mark.usefixtures("in_onednn")
@pytest.mark.parametrize(("platform", "custom_calls"), [("cpu", 3), ("cuda", 0), ("tpu", 0)])
def test_only_cpus_get_onednn(platform, custom_calls):
    graphdef, params = nnx.split(Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)))
    gradient = jax.jit(
        jax.grad(lambda params, x: jnp.square(nnx.merge(graphdef, params)(x)).sum(), argnums=(0, 1))
    )
    traced = gradient.trace(params, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    module = traced.lower(lowering_platforms=(platform,)).as_text()
    assert module.count("custom_call @onednn") + module.count('custom_call @"onednn') == custom_calls
    assert ("stablehlo.convolution" in module) == (custom_calls == 0)


def test_a_program_for_all_of_several_devices_stays_in_xla():
    assert jax.device_count() > 1
    assert layers.convolves_in_onednn()
    lowered = jax.jit(Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))).lower(jnp.zeros((2, 8, 8, 3)))
    assert "onednn" not in lowered.as_text()


@pytest.mark.usefixtures("in_onednn")
def test_one_convolution_on_many_threads():
    """Its memory descriptors are shared, so calls must take turns."""
    layer = Conv(8, 16, (3, 3), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    convolve = jax.jit(lambda x: nnx.merge(graphdef, params)(x))
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(rng.standard_normal((16, 20, 20, 8)), jnp.float32) for _ in range(8)]
    expected = [np.asarray(convolve(x)) for x in batches]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for actual, e in zip(pool.map(lambda x: np.asarray(convolve(x)), batches), expected, strict=True):
                np.testing.assert_array_equal(actual, e)


@pytest.mark.parametrize(
    "instructions", ["DEFAULT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("AVX2", "AVX", "SSE41"))]
)
def test_onednn_stays_within_its_memory(instructions):
    """oneDNN has other implementations for other CPUs, not all of which keep to a scratchpad of the right size."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(Path(__file__).with_name("guarded_convolutions.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.usefixtures("in_onednn")
def test_programs_lowered_on_many_threads_at_once():
    """Each shape by all threads at the same moment: their custom calls are registered once."""
    conv = Conv(3, 5, (3, 3), rngs=nnx.Rngs(0))
    together = threading.Barrier(4)

    def lower(batch):
        gradient = jax.jit(jax.grad(lambda x: conv(x).sum()))
        together.wait()
        return gradient.lower(jax.ShapeDtypeStruct((batch, 9, 11, 3), jnp.float32)).as_text()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for batch in range(100, 120):
            texts = list(pool.map(lower, [batch] * 4))
            assert len(set(texts)) == 1
            assert "onednn" in texts[0]


def test_the_library_is_loaded_once(monkeypatch):
    loads = []

    def load(path):
        loads.append(path)
        time.sleep(0.05)

    monkeypatch.setattr(onednn, "_Library", load)
    first = onednn.once(inspect.unwrap(onednn._load))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: first(), range(4)))
    assert len(loads) == 1


@pytest.mark.usefixtures("in_onednn")
@pytest.mark.parametrize("operation", ["convolution", "convolution_input_grad", "convolution_kernel_grad"])
def test_what_onednn_has_not_implemented_stays_in_xla(monkeypatch, operation):
    def fail(*args, **kwargs):
        raise onednn.UnimplementedError("status 3")

    monkeypatch.setattr(onednn, operation, fail)
    assert_close(convolve(Conv, CASES[6]), convolve(nnx.Conv, CASES[6]), 5e-6)


def test_bfloat16_on_a_cpu_on_which_onednn_has_none():
    code = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from fmbench.layers import Conv
x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.bfloat16)
ours, flax = (c(3, 4, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)) for c in (Conv, nnx.Conv))
assert "stablehlo.convolution" in jax.jit(ours).lower(x).as_text()
np.testing.assert_allclose(np.float32(ours(x)), np.float32(flax(x)), atol=0.02)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "SSE41"})


def test_an_impossible_convolution_says_which_call_failed():
    window = onednn.Window((3, 3), (1, 1), ((0, 0), (0, 0)))
    with pytest.raises(onednn.OneDNNError, match=r"dnnl_.* returned status"):
        onednn.convolution(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 3, 5)), jnp.zeros(5), window)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_says_where_its_convolutions_are(run_main, tmp_path, devices):
    done = run_main(
        *("--config=configs/cnn1.py", "--config.data.source=sample", "--config.batch_size=80"),
        *("--config.num_epochs=1", f"--workdir={tmp_path / 'work'}", f"--results_dir={tmp_path}"),
        devices=devices,
    )
    assert f"convolutions in {layers.describe_convolutions()}\n" in done.stderr
    (path,) = (tmp_path / "runs").glob("*.json")
    assert onednn.PACKAGE in store.read(path).environment.versions


def test_without_the_library_convolutions_stay_in_xla():
    code = """
import importlib.metadata
def files(name): raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.files = files
import jax, jax.numpy as jnp
from flax import nnx
from fmbench import layers
print(jax.jit(layers.Conv(1, 2, (3, 3), rngs=nnx.Rngs(0))).lower(jnp.zeros((1, 5, 5, 1))).as_text())
print(jax.jit(jax.grad(lambda x: layers.max_pool(x, 2).sum())).lower(jnp.zeros((1, 4, 4, 16))).as_text())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "stablehlo.convolution" in done.stdout and "custom_call" not in done.stdout


# Inference.

bfloat16_in_onednn = pytest.mark.skipif(
    "avx512f" not in cpp._processor().split(), reason="oneDNN has no bfloat16 here: no AVX-512"
)


@pytest.mark.usefixtures("in_onednn")
@pytest.mark.parametrize(
    ("shape", "outputs", "padding", "dtype", "expected"),
    [
        ((1000, 28, 28, 1), 32, "VALID", "float32", False),
        ((32, 13, 13, 64), 48, "VALID", "float32", False),
        ((32, 13, 13, 64), 32, "VALID", "float32", True),  # by Winograd, where there is a compiler
        ((32, 14, 14, 65), 32, "VALID", "float32", True),
        ((1000, 28, 28, 1), 32, "SAME", "float32", True),
        pytest.param(*((1000, 28, 28, 1), 32, "VALID", "bfloat16", True), marks=bfloat16_in_onednn),
        pytest.param(
            *((1, 28, 28, 16), 16, "SAME", "bfloat16", False), marks=bfloat16_in_onednn
        ),  # 1.8 million multiplications
        pytest.param(*((1, 28, 28, 32), 64, "SAME", "bfloat16", True), marks=bfloat16_in_onednn),  # 14
        ((1, 14, 14, 128), 256, "VALID", "float32", True),
    ],
    ids=str,
)
def test_inference_convolves_where_that_is_faster_and_training_in_libraries(
    shape, outputs, padding, dtype, expected
):
    conv = Conv(shape[-1], outputs, (3, 3), padding=padding, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(conv)

    def total(params, x):
        return nnx.merge(graphdef, params)(x, relu=True).astype(jnp.float32).sum()

    def calls(function):
        module = jax.jit(function).lower(params, jax.ShapeDtypeStruct(shape, dtype)).as_text()
        return len(re.findall('custom_call @"?(?:onednn|winograd|direct)', module))

    window = Window((3, 3), (1, 1), ((0, 0), (0, 0)))
    by_winograd = winograd.takes(window, jnp.dtype(dtype), shape[:3], (shape[-1], outputs))
    assert calls(total) == (expected and (by_winograd or shape != (32, 13, 13, 64)))
    assert calls(jax.value_and_grad(total)) == 2  # the value and the kernel's gradient
    assert calls(lambda params, x: jax.jvp(lambda p: total(p, x), (params,), (params,))) == 2


@pytest.mark.usefixtures("in_onednn")
@pytest.mark.parametrize("use_bias, relu", [(True, True), (False, False)])
def test_inference_has_a_batch_norm_in_its_convolution(use_bias, relu):
    rng = np.random.default_rng(0)
    conv = Conv(16, 48, (3, 3), padding="SAME", use_bias=use_bias, rngs=nnx.Rngs(0))
    norm = layers.BatchNorm(48, epsilon=1e-3, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split((conv, norm))
    state = jax.tree.map(lambda p: jnp.asarray(rng.uniform(0.1, 2, p.shape), p.dtype), state)
    x = jnp.asarray(rng.standard_normal((4, 9, 9, 16)), jnp.float32)

    def after(state, x, train):
        conv, norm = nnx.merge(graphdef, state, copy=True)
        return conv_batch_norm(conv, norm, x, train=train, relu=relu)

    def in_turn(state, x, train):
        conv, norm = nnx.merge(graphdef, state, copy=True)
        y = nnx.BatchNorm.__call__(norm, nnx.Conv.__call__(conv, x), not train)
        return nnx.relu(y) if relu else y

    for train in (True, False):
        expected = np.asarray(in_turn(state, x, train))
        np.testing.assert_allclose(after(state, x, train), expected, atol=1e-5 * np.abs(expected).max())
    text = jax.jit(functools.partial(after, train=False)).lower(state, x).as_text()
    assert not re.search(r"stablehlo\.(multiply|add|maximum) .*tensor<4x9x9x48xf32>", text)


@pytest.mark.usefixtures("in_onednn")
def test_images_that_are_mapped_over_one_by_one_are_the_batch_that_they_make():
    conv = Conv(16, 16, (3, 3), padding="SAME", rngs=nnx.Rngs(0))
    assert "onednn" not in jax.jit(conv).lower(jnp.zeros((1, 28, 28, 16))).as_text()
    assert "onednn" in jax.jit(jax.vmap(conv)).lower(jnp.zeros((32, 1, 28, 28, 16))).as_text()


@pytest.mark.usefixtures("in_onednn")
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize(("name", "dtype"), [("cnn2", "float32"), ("cnn4", "float32"), ("cnn3", "bfloat16")])
def test_inference_gives_the_logits_that_are_trained(name, dtype, batch):
    """As where it is differentiated, up to rounding; XLA's fusion of bfloat16 once gave NaN and 1e38."""
    graphdef, state = nnx.split(MODELS[name](rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    images = jnp.asarray(np.random.default_rng(0).random((batch, 28, 28, 1)), jnp.float32)

    def logits(state):
        return nnx.merge(graphdef, state)(images).astype(jnp.float32)

    differentiated = jax.jit(lambda state: jax.vjp(logits, state)[0])(state)
    inferred = jax.jit(logits)(state)
    tolerance = 1e-5 if dtype == "float32" else 2e-2 * float(jnp.abs(differentiated).max())
    np.testing.assert_allclose(inferred, differentiated, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("in_onednn")
def test_one_image_in_bfloat16_is_not_what_xlas_wrong_fusion_makes_of_it():
    """Max-pooling, ReLU, convolution and ReLU, of which XLA's fusion returns NaN and numbers of 1e38."""
    conv = Conv(32, 32, (3, 3), padding="SAME", use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    images = jnp.asarray(np.random.default_rng(0).standard_normal((8, 1, 28, 28, 32)), jnp.bfloat16)

    def net(x):
        return conv(nnx.relu(layers.max_pool(x, 2)), relu=True)

    fused = jax.jit(net)
    assert "stablehlo.convolution" in fused.lower(images[0]).as_text()
    for x in images:
        expected = np.asarray(net(x), np.float32)
        np.testing.assert_allclose(np.asarray(fused(x), np.float32), expected, rtol=2e-2, atol=2e-2)

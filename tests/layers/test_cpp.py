"""Convolutions in C++: the numbers of float64, in all directions, and what happens without a compiler."""

import functools
import inspect
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from fmbench import layers
from fmbench.layers import cpp, direct, onednn, primitives, winograd
from fmbench.layers.convolution_primitives import convolution
from fmbench.layers.onednn import Window
from fmbench.training import parallel

has_library = pytest.mark.skipif(
    onednn.library() is None or cpp.library() is None,
    reason=f"no C++ here: {cpp.why_not() or f'oneDNN cannot be loaded; install {onednn.PACKAGE}'}",
)


def window(padding: int) -> Window:
    return Window((3, 3), (1, 1), ((padding, padding), (padding, padding)))


def in_float64(x, kernel, bias, y_grad, padding: int, relu: bool):
    """y, and the gradients of sum(y * y_grad) with respect to x, kernel and bias, by nine products of matrices."""
    x, kernel, bias, y_grad = (np.asarray(array, np.float64) for array in (x, kernel, bias, y_grad))
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(x, around)
    places = [np.s_[:, i : i + y_grad.shape[1], j : j + y_grad.shape[2]] for i in range(3) for j in range(3)]
    kernels = kernel.reshape(9, *kernel.shape[2:])
    y = sum(padded[place] @ k for place, k in zip(places, kernels, strict=True)) + bias
    if relu:
        y_grad, y = np.where(y > 0, y_grad, 0), np.maximum(y, 0)
    x_grad = np.zeros(padded.shape)
    for place, k in zip(places, kernels, strict=True):
        x_grad[place] += y_grad @ k.T
    inside = np.s_[:, padding : padding + x.shape[1], padding : padding + x.shape[2]]
    kernel_grad = [np.tensordot(padded[place], y_grad, ((0, 1, 2), (0, 1, 2))) for place in places]
    return y, x_grad[inside], np.stack(kernel_grad).reshape(kernel.shape), y_grad.sum((0, 1, 2))


@has_library
@pytest.mark.parametrize(
    "algorithm, batch, size, channels, padding",
    [  # whole tiles; tiles over the edge, of images that end within a block; less than a tile; many blocks
        *(("winograd", 13, 14, (32, 64), 0), ("winograd", 16, 9, (32, 64), 0), ("winograd", 9, 13, (32, 64), 1)),
        *(("winograd", 65, 3, (32, 64), 1), ("winograd", 40, 7, (32, 64), 1)),
        # every number of inputs; outputs of one vector, of two, of three; groups of pixels that overlap or not
        *(("direct", 9, 28, (1, 32), 0), ("direct", 8, 21, (4, 48), 1), ("direct", 8, 19, (8, 16), 2)),
        *(("direct", 17, 18, (8, 64), 0), ("direct", 9, 28, (1, 4), 1), ("direct", 8, 21, (1, 8), 0)),
        *(("direct", 8, 23, (4, 4), 2), ("direct", 9, 19, (4, 4), 0), ("direct", 8, 28, (8, 8), 1)),
    ],
)
@pytest.mark.parametrize("use_bias, relu", [(True, True), (False, False)])
def test_equals_float64_in_all_directions(algorithm, batch, size, channels, padding, use_bias, relu):
    (inputs, outputs), y_size = channels, size + 2 * padding - 2
    rng = np.random.default_rng(0)
    shapes = (batch, size, size, inputs), (3, 3, inputs, outputs), (outputs,), (batch, y_size, y_size, outputs)
    x, kernel, bias, y_grad = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)
    bias = bias if use_bias else 0 * bias

    @jax.jit
    def compute(x, kernel, bias):
        arguments = (x, kernel, bias) if use_bias else (x, kernel)
        y, grads_of = jax.vjp(lambda x, k, b=None: convolution(x, k, b, window(padding), relu), *arguments)
        return y, *grads_of(y_grad)

    text = compute.lower(x, kernel, bias).as_text()
    assert [text.count(f"{algorithm}_{name}(") for name in ("forward", "input_grad", "kernel_grad")] == [1, 1, 1]
    exact = in_float64(x, kernel, bias, y_grad, padding, relu)
    for _ in range(2):  # what the first call left in the workspace adds nothing
        results = compute(x, kernel, bias)
        assert len(results) == 3 + use_bias
        for result, wanted in zip(results, exact, strict=False):
            assert np.abs(result - wanted).max() < 1e-5 * np.abs(wanted).max()


@has_library
@pytest.mark.parametrize("inputs, outputs", [(64, 32), (1, 32), (4, 4)])
def test_a_relu_keeps_what_is_not_a_number(inputs, outputs):
    """A training that diverges is stopped for its loss, which zeros would hide."""
    x = jnp.ones((8, 18, 18, inputs)).at[0, 9, 9, 0].set(jnp.nan)
    y = convolution(x, jnp.ones((3, 3, inputs, outputs)), None, window(1), True)
    assert jnp.isnan(y[0, 8:11, 8:11]).all() and not jnp.isnan(y[1]).any()


@has_library
@pytest.mark.parametrize("module, channels", [(winograd, (64, 128)), (direct, (4, 48))])
@pytest.mark.parametrize(
    "changes",
    [
        {"window": Window((5, 5), (1, 1), ((2, 2), (2, 2)))},
        {"window": Window((3, 3), (2, 2), ((1, 1), (1, 1)))},
        {"window": Window((3, 3), (1, 1), ((0, 1), (1, 1)))},
        {"dtype": jnp.bfloat16},
        {"y_shape": (7, 9, 9)},  # 63 tiles, 7 images
        {"channels": (48, 128)},
        {"channels": (64, 24)},
        {"channels": (4, 8)},
    ],
)
def test_takes_what_it_has_code_for(module, channels, changes):
    plain: dict[str, Any] = {
        "window": window(1),
        "dtype": jnp.float32,
        "y_shape": (8, 9, 18),
        "channels": channels,
    }
    assert module.takes(**plain)
    assert not module.takes(**plain | changes)


def test_few_channels_take_rows_as_long_as_their_vectors():
    few = functools.partial(direct.takes, dtype=jnp.float32, channels=(1, 16))
    assert not few(window(1), y_shape=(8, 18, 17)) and not few(window(3), y_shape=(8, 32, 32))


@has_library
@pytest.mark.parametrize(
    "shape, size, dtype, expected",
    [
        ((2, 5, 7, 32), 2, jnp.float32, True),
        ((2, 12, 12, 16), 3, jnp.float32, True),
        ((2, 12, 12, 16), 4, jnp.float32, False),
        ((2, 12, 12, 24), 2, jnp.float32, False),
        ((2, 12, 12, 16), 2, jnp.bfloat16, False),
        ((0, 12, 12, 16), 2, jnp.float32, False),
    ],
)
def test_pooling_has_its_gradient_and_the_derivatives_of_it(shape, size, dtype, expected, monkeypatch):
    monkeypatch.setattr(primitives, "is_on_one_device", lambda: True)  # the suite has eight devices
    rng = np.random.default_rng(0)
    x, direction = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))

    def total(x, pool):
        return (pool(x, (size, size), (size, size)) ** 3).sum()

    def derivatives(pool):
        grad = jax.grad(functools.partial(total, pool=pool))
        images = jax.vmap(lambda image: grad(image[None])[0])
        return grad(x), jax.jvp(grad, (x,), (direction,))[1], jax.vjp(grad, x)[1](direction)[0], images(x)

    step = jax.jit(jax.grad(functools.partial(total, pool=layers.max_pool)))
    assert ("pooling_grad(" in step.lower(x).as_text()) == expected
    assert "pooling_grad(" not in jax.export.export(step)(x).mlir_module()
    for actual, wanted in zip(derivatives(layers.max_pool), derivatives(nnx.max_pool), strict=True):
        np.testing.assert_allclose(np.float32(actual), np.float32(wanted), rtol=1e-6)


@has_library
@pytest.mark.parametrize(
    "shape, dtype, expected",
    [  # rows of several pixels; vectors by one, two, three, four and seven; more than stays in a cache
        *(((2, 8, 8, 4), jnp.float32, True), ((12, 16), jnp.float32, True), ((3, 5, 7, 32), jnp.float32, True)),
        *(((9, 3, 48), jnp.float32, True), ((700, 64), jnp.float32, True), ((33, 112), jnp.float32, True)),
        *(
            ((64, 28, 28, 64), jnp.float32, True),
            ((3, 5, 5, 8), jnp.float32, False),
        ),  # 600 floats
        *(((2, 8, 8, 24), jnp.float32, False), ((2, 8, 8, 16), jnp.bfloat16, False)),
    ],
)
@pytest.mark.parametrize("relu", [True, False])
def test_batch_norm_has_its_gradient_and_the_derivatives_of_it(shape, dtype, expected, relu, monkeypatch):
    monkeypatch.setattr(primitives, "is_on_one_device", lambda: True)
    rng = np.random.default_rng(0)
    x, y_grad, direction = (jnp.asarray(0.3 + rng.standard_normal(shape), dtype) for _ in range(3))
    layer = layers.BatchNorm(shape[-1], epsilon=1e-3, rngs=nnx.Rngs(0), dtype=dtype)
    split: Any = nnx.split(layer, nnx.Param, ...)
    graphdef, trained, rest = split
    params = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), trained), rest

    def value(x, params, plain=False):
        norm = nnx.merge(graphdef, *params, copy=True)
        y = nnx.BatchNorm.__call__(norm, x, False) if plain else norm(x, train=True, relu=relu)
        return nnx.relu(y) if relu else y, (norm.mean[...], norm.var[...])

    def grad(x, params, plain=False):
        y, pull, running = jax.vjp(lambda x, params: value(x, params, plain), x, params, has_aux=True)
        return y, running, pull(y_grad)

    def second(x, plain=False):
        return jax.jvp(lambda x: grad(x, params, plain)[2][0], (x,), (direction,))[1]

    text = jax.jit(grad).lower(x, params).as_text()
    assert [text.count(f"batch_norm_{name}(") for name in ("forward", "backward")] == [expected, expected]
    assert "batch_norm_forward(" not in jax.export.export(jax.jit(grad))(x, params).mlir_module()
    if dtype == jnp.float32:
        results = [jax.tree.leaves((grad(x, params, plain), second(x, plain))) for plain in (False, True)]
        for actual, wanted in zip(*results, strict=True):
            np.testing.assert_allclose(actual, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))


@has_library
@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_single_device_of_an_axis_normalises_in_cpp(num_devices):
    """So training does on one device."""
    mesh = parallel.make_mesh(jax.devices()[:num_devices])
    norm = layers.BatchNorm(16, axis_name=parallel.AXIS, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(norm)

    def total(x):
        return nnx.merge(graphdef, state, copy=True)(x, train=True).sum()

    step = parallel.map_over(mesh, jax.grad(total), PartitionSpec(parallel.AXIS))
    text = jax.jit(step).lower(jnp.ones((4, 16))).as_text()
    expected = int(num_devices == 1)
    assert [text.count(f"batch_norm_{name}(") for name in ("forward", "backward")] == [expected, expected]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_over_an_axis_have_the_dtypes_of_their_arrays(dtype):
    mesh = parallel.make_mesh(jax.devices()[:1])
    layer = layers.BatchNorm(16, axis_name=parallel.AXIS, dtype=dtype, rngs=nnx.Rngs(0))
    split: Any = nnx.split(layer, nnx.Param, ...)
    graphdef, params, rest = split

    def total(x, params):
        y = nnx.merge(graphdef, params, rest, copy=True)(layers.max_pool(x, 2), train=True, relu=True)
        return y.astype(jnp.float32).sum()

    x = jnp.ones((4, 6, 6, 16), dtype)
    x_grad, grads = jax.jit(parallel.map_over(mesh, jax.grad(total, (0, 1))))(x, params)
    assert x_grad.dtype == dtype and {grad.dtype.name for grad in jax.tree.leaves(grads)} == {"float32"}


@has_library
def test_a_channel_without_variance_is_normalised_by_epsilon_alone():
    x, y_grad = jnp.full((64, 16), 7.0), jnp.arange(1024.0).reshape(64, 16)
    scale, bias = jnp.full(16, 2.0), jnp.ones(16)
    y, mean, variance = cpp.batch_norm(x, scale, bias, epsilon=0.25, relu=False)
    assert (y == 1).all() and (mean == 7).all() and (variance == 0).all()
    arrays = x, scale, bias, y, mean, variance, y_grad
    x_grad, scale_grad, bias_grad = cpp.batch_norm_grad(*arrays, epsilon=0.25, relu=False)
    np.testing.assert_array_equal(x_grad, 4 * (y_grad - y_grad.mean(0)))  # 2 / sqrt(0.25)
    np.testing.assert_array_equal(scale_grad, 0 * scale)
    np.testing.assert_array_equal(bias_grad, y_grad.sum(0))


@has_library
def test_batch_norm_keeps_what_is_not_a_number():
    x = jnp.ones((64, 16)).at[3, 5].set(jnp.nan)
    y, mean, variance = cpp.batch_norm(x, jnp.ones(16), jnp.ones(16), epsilon=0.25, relu=True)
    for array in (y, mean, variance):
        assert jnp.isnan(array[..., 5]).all() and jnp.isnan(array).sum() == array.size // 16


@pytest.mark.parametrize(
    "compiler, said",
    [("no-such-compiler", "no C++ compiler no-such-compiler"), ("false", "false cannot build ")],
)
def test_without_a_compiler_onednn_does_it_and_the_first_line_says_so(monkeypatch, tmp_path, compiler, said):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("FMBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(cpp, "_processor", lambda: "Abacus 9 avx512f")
    monkeypatch.setattr(cpp, "_load", inspect.unwrap(cpp._load))
    assert cpp.why_not().startswith(said)
    assert not winograd.takes(window(1), jnp.float32, (64, 4, 4), (64, 128))
    if layers.convolves_in_onednn():
        assert layers.describe_convolutions() == f"oneDNN alone ({cpp.why_not()})"
    assert not list(tmp_path.rglob("*.so"))


def test_without_its_instructions_nothing_is_built(monkeypatch):
    monkeypatch.setattr(cpp, "_processor", lambda: "Abacus 9 avx2")
    monkeypatch.setattr(cpp, "_load", inspect.unwrap(cpp._load))
    assert (cpp.library(), cpp.why_not()) == (None, "neither AVX-512 nor AVX2 with FMA")


@has_library
@pytest.mark.slow
@pytest.mark.skipif(
    "avx512f" not in cpp._processor().split(), reason="the code for AVX2 is what all tests run here"
)
def test_with_avx2_all_of_it_is_as_right():
    program = (
        "import sys, pytest; from fmbench.layers import cpp; cpp.OPTIONS += ('-mno-avx512f',); "
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    chosen = "equals_float64 or pooling or batch_norm or not_a_number"
    command = [sys.executable, "-c", program, __file__, "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]

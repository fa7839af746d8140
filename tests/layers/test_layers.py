"""Our layers against XLA's and Flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fmbench.layers import BatchNorm, Conv, Dropout, max_pool, primitives
from fmbench.models import split_model
from fmbench.training import parallel

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def stock_max_pool(x, size):
    return nnx.max_pool(x, (size, size), (size, size))


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (3, 5, 7, 2), (2, 28, 28, 32), (7, 11, 11, 3), (2, 12, 12, 256)])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("ties", ["none", "background", "all", "negative", "NaN"])
@pytest.mark.parametrize("in_cpp", [False, True])  # the suite has eight devices, over which it is not
def test_max_pool_equals_xla_in_value_and_gradient(shape, size, ties, in_cpp, monkeypatch):
    monkeypatch.setattr(primitives, "is_on_one_device", lambda: in_cpp)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    if ties == "background":  # as after a ReLU: half of all values are equal
        x = np.maximum(x, 0)
    elif ties == "all":
        x = np.zeros(shape, np.float32)
    elif ties == "negative":
        x = -np.round(np.abs(x))
    elif ties == "NaN":
        x = np.where(x > 1, np.nan, x)
    value, pull = jax.vjp(lambda x: max_pool(x, size), x)
    expected, expected_pull = jax.vjp(lambda x: stock_max_pool(x, size), x)
    np.testing.assert_array_equal(value, expected)
    cotangent = rng.standard_normal(value.shape).astype(np.float32)
    np.testing.assert_array_equal(pull(cotangent)[0], expected_pull(cotangent)[0])


def test_max_pool_in_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 6, 4)), jnp.bfloat16)
    gradient = jax.grad(lambda x: max_pool(x, 2).astype(jnp.float32).sum())(x)
    expected = jax.grad(lambda x: stock_max_pool(x, 2).astype(jnp.float32).sum())(x)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, expected)


def test_bfloat16_between_pooling_and_relu_is_what_single_operations_give():
    """XLA's fusion of these four returned NaN and numbers of 1e38."""
    conv = Conv(32, 32, (3, 3), padding="SAME", use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 28, 28, 32)), jnp.bfloat16)

    def layers(x):
        return nnx.relu(conv(nnx.relu(max_pool(x, 2))))

    np.testing.assert_array_equal(jax.jit(layers)(x), layers(x))


@pytest.mark.parametrize(
    ("platform", "dtype", "kept_apart"),
    [
        ("cpu", "bfloat16", True),
        ("cpu", "float32", False),
        ("cuda", "bfloat16", False),
        ("tpu", "bfloat16", False),
    ],
)
def test_only_bfloat16_on_cpus_is_kept_from_being_fused(platform, dtype, kept_apart):
    conv = Conv(3, 4, (3, 3), padding="SAME", dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    module = jax.export.export(jax.jit(conv), platforms=[platform])(jax.ShapeDtypeStruct((2, 8, 8, 3), dtype))
    assert ("optimization_barrier" in module.mlir_module()) == kept_apart


@pytest.mark.parametrize(("platform", "uses_xla"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_only_cpus_get_the_comparing_gradient(platform, uses_xla):
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, 2).sum()))
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    module = jax.export.export(gradient, platforms=[platform])(x).mlir_module()
    assert ("select_and_scatter" in module) == uses_xla


class TestDropout:
    x = jnp.ones((64, 50))

    def drop(self, rate=0.25, key=0, axis_name=None, x=x):
        return Dropout(rate, axis_name=axis_name)(x, train=True, rngs=nnx.Rngs(dropout=key))

    def test_is_the_identity_outside_training(self):
        assert Dropout(0.5)(self.x, train=False, rngs=None) is self.x

    def test_keeps_the_mean_and_drops_the_rate(self):
        y = np.asarray(self.drop(x=jnp.ones((200, 500))))
        kept = y != 0
        np.testing.assert_allclose(kept.mean(), 0.75, atol=0.006)  # four standard errors
        np.testing.assert_allclose(y[kept], 1 / 0.75, rtol=1e-6)

    def test_differs_between_examples_and_keys(self):
        y = np.asarray(self.drop())
        assert len(np.unique(y, axis=0)) == len(y)
        assert not np.array_equal(y, self.drop(key=1))

    def test_masks_are_independent_between_units_examples_and_steps(self):
        x = jnp.ones((500, 400))
        masks = [np.asarray(self.drop(rate=0.5, key=key, x=x)) != 0 for key in (0, 1)]
        first, second = [(mask - 0.5) * 2 for mask in masks]
        # Of independent fair coins, a mean of products is normal with this deviation.
        deviation = 1 / np.sqrt(first.size)
        assert abs((first * second).mean()) < 4 * deviation  # steps
        for axis, shift in [(0, 1), (0, 7), (1, 1), (1, 2), (1, 20)]:  # examples and units
            assert abs((first * np.roll(first, shift, axis)).mean()) < 4 * deviation
        # Each unit and each example is dropped as often as chance has it: chi-squared with its 5-sigma bound.
        for axis in (0, 1):
            counts = masks[0].sum(axis)
            n = masks[0].shape[axis]
            chi2 = ((counts - n / 2) ** 2 / (n / 4)).sum()
            assert abs(chi2 - len(counts)) < 5 * np.sqrt(2 * len(counts))

    def test_does_not_depend_on_how_the_batch_is_split(self):
        parts = jax.pmap(lambda x: self.drop(axis_name=parallel.AXIS, x=x), axis_name=parallel.AXIS)(
            self.x.reshape(8, 8, 50)
        )
        np.testing.assert_array_equal(parts.reshape(64, 50), self.drop())

    def test_needs_a_key_in_training(self):
        with pytest.raises(ValueError, match="rngs"):
            Dropout(0.5)(self.x, train=True, rngs=None)


def normalize(layer_class, shape, dtype=jnp.float32, *, relu=False, epsilon=1e-3):
    """Value, running statistics, and gradients with respect to the parameters and to x."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.standard_normal(shape) + rng.standard_normal(shape[-1]), dtype)
    layer = layer_class(shape[-1], momentum=0.9, epsilon=epsilon, dtype=dtype, rngs=nnx.Rngs(0))
    layer.scale[...] = jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32)
    layer.bias[...] = jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32)
    graphdef, *states = nnx.split(layer, nnx.Param, ...)
    params, statistics = states

    def value(params, x):
        model = nnx.merge(graphdef, params, statistics, copy=True)
        if layer_class is BatchNorm:
            y = model(x, train=True, relu=relu)
        else:
            y = model(x, use_running_average=False)
            y = nnx.relu(y) if relu else y
        return y, split_model(model)[2]

    y, pull, statistics = jax.vjp(value, params, x, has_aux=True)
    cotangent = jnp.asarray(rng.standard_normal(y.shape), y.dtype)
    params_grad, x_grad = pull(cotangent)
    return y, statistics, params_grad, x_grad


def assert_trees_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


@pytest.mark.parametrize("shape", [(5, 7, 9, 3), (1, 2, 2, 256), (256, 4, 4, 1), (33, 17)])
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_equals_stock_flax(shape, relu):
    actual = normalize(BatchNorm, shape, relu=relu)
    assert_trees_close(actual, normalize(nnx.BatchNorm, shape, relu=relu), 1e-5)


def test_batch_norm_in_bfloat16():
    shape = (64, 6, 6, 8)
    y, statistics, *gradients = normalize(BatchNorm, shape, jnp.bfloat16)
    expected_y, expected_statistics, *expected_gradients = normalize(nnx.BatchNorm, shape)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected_y, atol=0.05)
    assert_trees_close(statistics, expected_statistics, 0.01)
    x_grad = [gradient.astype(jnp.float32) for gradient in jax.tree.leaves(gradients)]
    assert_trees_close(x_grad, expected_gradients, 0.03)


def test_batch_norm_uses_the_running_statistics_outside_training():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 3, 2)), jnp.float32)
    layer = BatchNorm(2, epsilon=1e-3, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.array([1.0, -1.0])
    layer.var[...] = jnp.array([4.0, 0.25])
    expected = (x - layer.mean[...]) / np.sqrt(layer.var[...] + 1e-3)
    np.testing.assert_allclose(layer(x, train=False), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(x, train=False, relu=True), np.maximum(expected, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_over_a_mapped_axis_is_that_of_the_whole_batch(relu):
    """Each device sees an eighth; statistics and, summed, gradients are those of one device that sees all."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, 3, 3, 4)), jnp.float32)
    cotangent = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    def run(axis_name, x, cotangent):
        layer = BatchNorm(4, axis_name=axis_name, rngs=nnx.Rngs(0))
        graphdef, *states = nnx.split(layer, nnx.Param, ...)
        params, statistics = states

        def value(params, x):
            model = nnx.merge(graphdef, params, statistics, copy=True)
            y = model(x, train=True, relu=relu)
            return y, split_model(model)[2]

        y, pull, statistics = jax.vjp(value, params, x, has_aux=True)
        params_grad, x_grad = pull(cotangent)
        return y, x_grad, statistics, nnx.to_pure_dict(params_grad)

    def split(array):
        return array.reshape(8, 2, *array.shape[1:])

    y, x_grad, statistics, params_grad = run(None, x, cotangent)
    parts = jax.pmap(lambda x, g: run(parallel.AXIS, x, g), axis_name=parallel.AXIS)(split(x), split(cotangent))
    assert_trees_close(parts[0], split(y), 1e-5)
    assert_trees_close(parts[1], split(x_grad), 1e-5)
    assert_trees_close(jax.tree.map(lambda s: s[0], parts[2]), statistics, 1e-5)
    assert_trees_close(jax.tree.map(lambda s: s.sum(0), parts[3]), params_grad, 1e-5)

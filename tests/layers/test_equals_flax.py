"""Our layers take what Flax's take, with the same results: drawn arguments, named cases, transformations."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fmbench.layers import BatchNorm, Conv, Dropout, convolution, cpp, max_pool, onednn

few = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=150)
in_onednn = pytest.mark.skipif(
    onednn.library() is None, reason=f"{onednn.PACKAGE} is not installed or cannot be loaded here"
)
XLA_CUTS = jax.__version_info__ >= (0, 12)  # by negative padding, in gradients of convolutions, too
TOLERANCE: dict[Any, float] = {"float64": 1e-11, "float32": 3e-5, "float16": 1e-2, "bfloat16": 5e-2}


@pytest.fixture(scope="module", autouse=True)
def as_with_one_device():
    """The suite has eight; programs of this module run on one of them, unless they say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "is_on_one_device", lambda: True)
        yield


@pytest.fixture
def with_all_devices(monkeypatch, as_with_one_device):
    """The rule itself."""
    monkeypatch.undo()
    from fmbench.layers import sharding

    monkeypatch.setattr(convolution, "is_on_one_device", sharding.is_on_one_device)


def assert_close(actual, expected, tolerance=None):
    """Of the same dtypes and shapes, and within a share of the largest number: so sums are rounded."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        if not e.size:
            continue
        allowed = TOLERANCE.get(e.dtype.name, 0) if tolerance is None else tolerance
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        largest = np.abs(e[np.isfinite(e)]).max(initial=1.0)
        np.testing.assert_allclose(a, e, rtol=0, atol=allowed * largest)


def some(shape, dtype="float32", seed=0):
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(3 * numbers if jnp.issubdtype(dtype, jnp.integer) else numbers).astype(dtype)


@dataclasses.dataclass
class Case:
    """A layer of ours and its like of Flax's, what they are called with, and how the results are compared."""

    ours: Any
    arguments: tuple
    options: dict
    inputs: jax.Array
    call: dict = dataclasses.field(default_factory=dict)  # for both
    relu: bool = False
    second: bool = False

    def run(self, *, stock):
        """Value, statistics, gradients, and if asked for, a product with the second derivatives."""
        layer_class: Any = self.ours.__base__ if stock else self.ours
        layer = layer_class(*self.arguments, **self.options, rngs=nnx.Rngs(0))
        graphdef, *states = nnx.split(layer, nnx.Param, ...)
        params, rest = states
        params = jax.tree.map(lambda p: p + some(p.shape, p.dtype, seed=1) / 4, params)
        differentiable = jnp.issubdtype(self.inputs.dtype, jnp.floating)

        def value(params, x):
            model = nnx.merge(graphdef, params, rest, copy=True)
            if stock:
                y = model(x, **self.call)
                y = nnx.relu(y) if self.relu else y
            else:
                y = model(x, **self.call, **({"relu": True} if self.relu else {}))
            return y, nnx.state(model, nnx.BatchStat)

        def gradients(params, x):
            inputs = (params, x) if differentiable else (params,)
            y, pull, statistics = jax.vjp(lambda p, x=x: value(p, x), *inputs, has_aux=True)
            return pull(some(y.shape, y.dtype, seed=2)), (y, statistics)

        if not self.second:
            return jax.jit(gradients)(params, self.inputs)
        # Random directions, because one of equal numbers is one that batch norm takes away.
        tangents = jax.tree.map(lambda p: some(p.shape, p.dtype, seed=3), (params, self.inputs))
        return jax.jit(lambda *args: jax.jvp(gradients, args, tangents))(params, self.inputs)

    def check(self):
        """Equal results or the same error."""
        try:
            expected = self.run(stock=True)
        except Exception as error:
            with pytest.raises(type(error)):
                self.run(stock=False)
            return
        # What was rounded to few bits on its way may come out in many.
        given = (self.inputs.dtype.name, *(self.options.get(name) for name in ("dtype", "param_dtype")))
        tolerance = max(TOLERANCE.get(dtype, 0) for dtype in given)
        if not jax.config.jax_enable_x64:
            tolerance = max(tolerance, TOLERANCE["float32"])
        assert_close(self.run(stock=False), expected, tolerance)

    def lowered(self):
        layer = self.ours(*self.arguments, **self.options, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(layer)
        return jax.jit(lambda x: nnx.merge(graphdef, state)(x)).lower(self.inputs).as_text()


@st.composite
def convolutions(draw):
    rank = draw(st.sampled_from([2, 2, 2, 1, 3]))
    each = lambda *values: draw(st.tuples(*[st.sampled_from(values)] * rank))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.sampled_from([1, 2, 4]))
    kernel_size = each(1, 2, 3)
    pairs = [tuple(pair) for pair in zip(each(0, 1, 2), each(0, 1, 3), strict=True)]
    padding = draw(
        st.sampled_from(
            [
                *("SAME", "VALID", "SAME_LOWER", "same", "CIRCULAR", "REFLECT", "CAUSAL", "NONE"),
                *(1, each(0, 1), pairs),
                *([[(-1, 1)] * rank] if XLA_CUTS else []),
            ]
        )
    )
    batch = draw(st.sampled_from([(2,), (3,), (3,), (), (2, 2), (0,)]))
    dtype = draw(st.sampled_from([None, None, "float32", "bfloat16", "float16"]))
    options = {
        "strides": draw(st.sampled_from([1, 1, 2, None, each(1, 2, 3)])),
        "padding": padding,
        "input_dilation": draw(st.sampled_from([1, 1, None, 2])),
        "kernel_dilation": draw(st.sampled_from([1, 1, None, each(1, 2)])),
        "feature_group_count": groups,
        "use_bias": draw(st.booleans()),
        "dtype": dtype,
        "param_dtype": draw(st.sampled_from(["float32", "float32", "bfloat16"])),
        "precision": draw(st.sampled_from([None, None, "highest"])),
        "preferred_element_type": draw(st.sampled_from([None, None, None, "float32"])),
    }
    if draw(st.integers(0, 4)) == 0:
        shape = (*kernel_size, inputs // groups, outputs)
        options["mask"] = (some(shape, seed=4) > 0).astype(jnp.float32)
    return Case(
        Conv,
        (inputs, outputs, kernel_size),
        options,
        some(
            (*batch, *each(1, 3, 5, 6), inputs), draw(st.sampled_from(["float32", "float32", "bfloat16", "int32"]))
        ),
        relu=draw(st.booleans()),
        second=draw(st.integers(0, 3)) == 0,
    )


@st.composite
def batch_norms(draw):
    channels = draw(st.sampled_from([1, 3, 4, 20]))
    shape = (*draw(st.sampled_from([(5,), (3, 4), (2, 3, 4), (2, 2, 3, 4), (), (0, 2)])), channels)
    axis = draw(st.sampled_from([-1, -1, -1, len(shape) - 1, 0]))
    features = shape[axis]
    options = {
        "axis": axis,
        "momentum": draw(st.sampled_from([0.9, 0.99, 0.0])),
        "epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "dtype": draw(st.sampled_from([None, None, "float32", "bfloat16", "float16"])),
        "param_dtype": draw(st.sampled_from(["float32", "float32", "bfloat16"])),
        "use_bias": draw(st.sampled_from([True, True, True, False])),
        "use_scale": draw(st.sampled_from([True, True, True, False])),
        "use_fast_variance": draw(st.sampled_from([True, True, True, False])),
        "use_running_average": draw(st.sampled_from([False, False, False, True, None])),
    }
    call = {}
    if draw(st.booleans()):
        call["use_running_average"] = draw(st.sampled_from([False, False, True, None]))
    if draw(st.integers(0, 4)) == 0:
        call["mask"] = some((*shape[:-1], 1), seed=5) > -0.5
    inputs = some(shape, draw(st.sampled_from(["float32", "float32", "bfloat16", "int32"])))
    second = draw(st.integers(0, 3)) == 0
    return Case(BatchNorm, (features,), options, inputs, call, relu=draw(st.booleans()), second=second)


@few
@given(convolutions())
def test_drawn_convolutions(case):
    case.check()


@few
@given(batch_norms())
def test_drawn_batch_norms(case):
    case.check()


@pytest.mark.slow
@many
@given(convolutions() | batch_norms())
def test_many_drawn_layers(case):
    case.check()


@st.composite
def poolings(draw):
    rank = draw(st.sampled_from([2, 2, 2, 1, 3]))
    each = lambda *values: draw(st.tuples(*[st.sampled_from(values)] * rank))  # noqa: E731
    window = draw(st.sampled_from([(2,) * rank, (3,) * rank, each(1, 2, 3)]))
    strides = draw(st.sampled_from([window, window, None, each(1, 2)]))
    padding = draw(st.sampled_from(["VALID", "VALID", "SAME", [(0, 1)] * rank]))
    shape = (*draw(st.sampled_from([(2,), (2,), (), (0,), (2, 1)])), *each(1, 2, 5, 6), 3)
    inputs = some(shape, draw(st.sampled_from(["float32", "float32", "bfloat16", "float16", "int32"])))
    if draw(st.booleans()):  # equal values, as after a ReLU, and such as have no order
        inputs = jnp.maximum(inputs, 0)
        if draw(st.booleans()) and jnp.issubdtype(inputs.dtype, jnp.floating):
            inputs = jnp.where(some(shape, seed=6) > 1, jnp.nan, inputs)
            inputs = jnp.where(some(shape, seed=7) > 1, -jnp.inf, inputs)
    return inputs, window, strides, padding


def check_pooling(case):
    x, *arguments = case

    @functools.partial(jax.jit, static_argnums=0)
    def results(pool, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return pool(x, *arguments)
        y, pull = jax.vjp(lambda x: pool(x, *arguments), x)
        return y, pull(some(y.shape, y.dtype, seed=2)), jax.jvp(lambda x: pool(x, *arguments), (x,), (jnp.sin(x),))

    try:
        expected = results(nnx.max_pool, x)
    except Exception as error:
        with pytest.raises(type(error)):
            results(max_pool, x)
        return
    for actual, e in zip(jax.tree.leaves(results(max_pool, x)), jax.tree.leaves(expected), strict=True):
        assert actual.dtype == e.dtype
        # NumPy takes no NaN of bfloat16 for one; float64 holds every value of the others.
        np.testing.assert_array_equal(np.asarray(actual, np.float64), np.asarray(e, np.float64), strict=True)


@few
@given(poolings())
def test_drawn_poolings(case):
    check_pooling(case)


@pytest.mark.slow
@many
@given(poolings())
def test_many_drawn_poolings(case):
    check_pooling(case)


def image(*shape, dtype="float32"):
    return some(shape, dtype)


CONVOLUTIONS = {
    "kernel dilation": Case(Conv, (3, 4, (3, 3)), {"kernel_dilation": 2}, image(2, 8, 8, 3)),
    "input dilation": Case(Conv, (3, 4, (3, 3)), {"input_dilation": (2, 1)}, image(2, 8, 8, 3)),
    "mask": Case(Conv, (3, 4, (3, 3)), {"mask": jnp.tril(jnp.ones((3, 3, 3, 4)))}, image(2, 8, 8, 3)),
    "convolution of one's own": Case(
        Conv,
        (3, 4, (3, 3)),
        {"conv_general_dilated": lambda *args, **kwargs: -jax.lax.conv_general_dilated(*args, **kwargs)},
        image(2, 8, 8, 3),
    ),
    "promotion of one's own": Case(
        Conv,
        (3, 4, (3, 3)),
        {"promote_dtype": lambda arrays, dtype: tuple(a if a is None else 2 * a for a in arrays)},
        image(2, 8, 8, 3),
    ),
    "groups": Case(Conv, (4, 6, (3, 3)), {"feature_group_count": 2}, image(2, 8, 8, 4)),
    "padding 1": Case(Conv, (3, 4, (3, 3)), {"padding": 1}, image(2, 8, 8, 3)),
    "padding (1, 1)": Case(Conv, (3, 4, (3, 3)), {"padding": (1, 1)}, image(2, 8, 8, 3)),
    "padding (1, (0, 2))": Case(Conv, (3, 4, (3, 3)), {"padding": (1, (0, 2))}, image(2, 8, 8, 3)),
    "more padding than kernel": Case(Conv, (3, 4, (3, 3)), {"padding": 5, "strides": 2}, image(2, 8, 8, 3)),
    "negative padding": Case(Conv, (3, 4, (3, 3)), {"padding": ((-1, 1), (0, -2))}, image(2, 8, 8, 3)),
    "invalid padding": Case(Conv, (3, 4, (3, 3)), {"padding": "NONE"}, image(2, 8, 8, 3)),
    "CIRCULAR": Case(Conv, (3, 4, (3, 3)), {"padding": "CIRCULAR"}, image(2, 8, 8, 3)),
    "REFLECT": Case(Conv, (3, 4, (3, 3)), {"padding": "REFLECT"}, image(2, 8, 8, 3)),
    "CAUSAL": Case(Conv, (3, 4, 3), {"padding": "CAUSAL"}, image(2, 8, 3)),
    "kernel_size 3": Case(Conv, (3, 4, 3), {}, image(2, 8, 3)),
    "kernel_size [3, 3]": Case(Conv, (3, 4, [3, 3]), {"strides": [2, 1]}, image(2, 8, 8, 3)),
    "three dimensions": Case(Conv, (3, 4, (3, 2, 1)), {}, image(2, 4, 4, 4, 3)),
    "unbatched": Case(Conv, (3, 4, (3, 3)), {}, image(8, 8, 3)),
    "two axes of batch": Case(Conv, (3, 4, (3, 3)), {}, image(2, 2, 8, 8, 3)),
    "no examples": Case(Conv, (3, 4, (3, 3)), {}, image(0, 8, 8, 3)),
    "window larger than the image": Case(Conv, (3, 4, (5, 5)), {"padding": "VALID"}, image(2, 4, 4, 3)),
    "float16": Case(Conv, (3, 4, (3, 3)), {"dtype": "float16"}, image(2, 8, 8, 3)),
    "float16 images": Case(Conv, (3, 4, (3, 3)), {"param_dtype": "float16"}, image(2, 8, 8, 3, dtype="float16")),
    "bfloat16 of float32": Case(Conv, (3, 4, (3, 3)), {"dtype": "bfloat16"}, image(2, 8, 8, 3)),
    "whole numbers": Case(Conv, (3, 4, (3, 3)), {}, image(2, 8, 8, 3, dtype="int32")),
    "other channels": Case(Conv, (3, 4, (3, 3)), {}, image(2, 8, 8, 5)),
    "preferred type": Case(
        Conv,
        (3, 4, (3, 3)),
        {"dtype": "bfloat16", "preferred_element_type": jnp.float32, "use_bias": False},
        image(2, 8, 8, 3),
    ),
}


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(case, request):
    if "negative padding" in request.node.name and not XLA_CUTS:
        pytest.skip("before jax 0.12 gradients under negative padding are not those of the image cut by hand")
    case.check()


BATCH_NORMS = {
    "use_running_average": Case(BatchNorm, (3,), {}, image(4, 5, 3), {"use_running_average": True}),
    "use_running_average=False over a constructor's": Case(
        BatchNorm, (3,), {"use_running_average": True}, image(4, 5, 3), {"use_running_average": False}
    ),
    "by the constructor": Case(BatchNorm, (3,), {"use_running_average": True}, image(4, 5, 3)),
    "nobody says": Case(BatchNorm, (3,), {"use_running_average": None}, image(4, 5, 3)),
    "mask": Case(BatchNorm, (3,), {}, image(4, 5, 3), {"mask": image(4, 5, 1) > 0}),
    "no bias": Case(BatchNorm, (3,), {"use_bias": False}, image(4, 5, 3)),
    "no scale": Case(BatchNorm, (3,), {"use_scale": False}, image(4, 5, 3)),
    "axis 1": Case(BatchNorm, (5,), {"axis": 1}, image(4, 5, 3)),
    "two-pass variance": Case(BatchNorm, (3,), {"use_fast_variance": False}, image(4, 5, 3) + 100),
    "bfloat16 and parameters in bfloat16": Case(
        BatchNorm, (3,), {"param_dtype": "bfloat16"}, image(4, 5, 3, dtype="bfloat16")
    ),
    "second derivatives": Case(BatchNorm, (3,), {}, image(4, 5, 3), second=True),
    "second derivatives with ReLU": Case(BatchNorm, (3,), {}, image(4, 5, 3), relu=True, second=True),
    "variance rounded to nothing": Case(BatchNorm, (3,), {}, 1e4 + image(4, 5, 3) / 1e4),
    "one example": Case(BatchNorm, (3,), {}, image(3)),
    "no examples": Case(BatchNorm, (3,), {}, image(0, 3)),
}


@pytest.mark.parametrize("case", BATCH_NORMS.values(), ids=BATCH_NORMS)
def test_batch_norm(case):
    case.check()


@pytest.mark.parametrize(
    "case", [CONVOLUTIONS["padding 1"], BATCH_NORMS["second derivatives"]], ids=["Conv", "BatchNorm"]
)
@pytest.mark.parametrize("options", [{}, {"dtype": "float64"}, {"param_dtype": "float64"}], ids=str)
@pytest.mark.filterwarnings("ignore:scatter inputs:FutureWarning")  # Flax's own, of running statistics
def test_in_64_bits(case, options):
    with jax.enable_x64(True):
        inputs = some(case.inputs.shape, "float64")
        dataclasses.replace(case, options=case.options | options, inputs=inputs).check()


@in_onednn
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("padding 1", True),
        ("kernel_size [3, 3]", True),
        pytest.param(
            *("bfloat16 of float32", True),
            marks=pytest.mark.skipif(
                "avx512f" not in cpp._processor().split(), reason="oneDNN has no bfloat16 here: no AVX-512"
            ),
        ),
        ("mask", False),
        ("CIRCULAR", False),
    ],
)
def test_what_is_in_onednn(name, expected):
    assert ("onednn" in CONVOLUTIONS[name].lowered()) == expected


@in_onednn
class TestConvolutionTransformed:
    """Against Flax's, and still in oneDNN."""

    @pytest.fixture
    def functions(self):
        def make(layer_class):
            padding = ((0, 3), (4, 1))
            layer = layer_class(3, 4, (3, 2), strides=(2, 3), padding=padding, rngs=nnx.Rngs(0))
            graphdef, params = nnx.split(layer)
            params = jax.tree.map(lambda p: p + 0.1, params)

            def function(params, x):
                model = nnx.merge(graphdef, params)
                return jnp.tanh(model(x, relu=True) if layer_class is Conv else nnx.relu(model(x)))

            return function, params

        (ours, params), (flax, _) = make(Conv), make(nnx.Conv)
        return ours, flax, params

    x = some((3, 9, 8, 3))

    def compare(self, transform, functions, *, xla=False, x=x) -> Any:
        ours, flax, params = functions
        actual, expected = (jax.jit(transform(f)) for f in (ours, flax))
        text = actual.lower(params, x).as_text()
        assert ("onednn" in text) != xla
        assert ("stablehlo.convolution" in text) == xla
        assert_close(actual(params, x), expected(params, x))
        return transform(ours), params

    def test_not_compiled(self, functions):
        ours, flax, params = functions
        sums = [lambda *args, f=f: f(*args).sum() for f in (ours, flax)]
        assert_close(
            *[
                (f(params, self.x), jax.grad(s, (0, 1))(params, self.x))
                for f, s in zip((ours, flax), sums, strict=True)
            ]
        )

    def test_forward_mode(self, functions):
        def transform(f):
            return lambda params, x: jax.jvp(f, (params, x), jax.tree.map(jnp.sin, (params, x)))

        self.compare(transform, functions)

    def test_linearize(self, functions):
        def transform(f):
            return lambda params, x: jax.linearize(f, params, x)[1](*jax.tree.map(jnp.sin, (params, x)))

        self.compare(transform, functions)

    @pytest.mark.parametrize("over", [jax.jacfwd, jax.jacrev])
    def test_second_derivatives(self, functions, over):
        def transform(f):
            def of_gradients(params, x):
                gradients = jax.grad(lambda *args: f(*args).sum(), (0, 1))(params, x)
                return sum(jnp.sin(g).sum() for g in jax.tree.leaves(gradients))

            gradient = jax.grad(of_gradients, (0, 1))
            if over is jax.jacrev:
                return gradient
            return lambda params, x: jax.jvp(gradient, (params, x), jax.tree.map(jnp.sin, (params, x)))

        self.compare(transform, functions)

    def test_hessian(self, functions):
        def transform(f):
            return lambda params, x: jax.hessian(lambda x: f(params, x).sum())(x)

        ours, flax, params = functions
        x = self.x[:1, :3, :3]
        assert_close(transform(ours)(params, x), transform(flax)(params, x))

    @pytest.mark.parametrize("axis", [0, 3])
    def test_vmap_over_images(self, functions, axis):
        def transform(f):
            return jax.vmap(f, (None, axis))

        self.compare(transform, functions, x=jnp.moveaxis(some((2, 3, 9, 8, 3)), 0, axis))

    def test_gradients_of_vmap(self, functions):
        def transform(f):
            return jax.grad(lambda params, x: jax.vmap(f, (None, 0))(params, x[:, None]).sum(), (0, 1))

        self.compare(transform, functions)

    def test_gradients_of_each_example(self, functions):
        def transform(f):
            return jax.vmap(jax.grad(lambda params, x: f(params, x[None]).sum()), (None, 0))

        ours, flax, params = functions
        assert_close(*[jax.jit(transform(f))(params, self.x) for f in (ours, flax)])

    def test_vmap_over_parameters(self, functions):
        def transform(f):
            def of_two(params, x):
                return jax.vmap(f, (0, None))(jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params), x)

            return of_two

        self.compare(transform, functions, xla=True)

    def test_checkpoint_and_scan(self, functions):
        def transform(f):
            def of_scan(params, x):
                body = jax.checkpoint(lambda total, x: (total + f(params, x[None]).sum(), None))
                return jax.lax.scan(body, 0.0, x)[0]

            return jax.grad(of_scan, (0, 1))

        self.compare(transform, functions)

    @pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("cpu", "tpu", "cuda")], ids=str)
    def test_export_holds_xlas_convolution(self, functions, platforms):
        ours, flax, params = functions

        def gradients(f):
            return jax.jit(jax.grad(lambda *args: f(*args).sum(), (0, 1)))

        exported = jax.export.export(gradients(ours), platforms=platforms)(params, self.x)
        assert '@"onednn.' not in exported.mlir_module()
        if "cpu" in platforms:
            assert_close(exported.call(params, self.x), gradients(flax)(params, self.x))


class Net(nnx.Module):
    def __init__(self, conv, batch_norm, dropout, pool, *, axis_name=None):
        rngs = nnx.Rngs(0)
        self.conv1 = conv(3, 8, (3, 3), rngs=rngs)
        self.norm = batch_norm(8, axis_name=axis_name, rngs=rngs)
        self.pool = pool
        self.dropout = dropout(0.5, deterministic=True, rngs=rngs)
        self.conv2 = conv(8, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.pool(self.conv1(x), (2, 2), (2, 2))))
        return self.conv2(self.dropout(x))


OURS, FLAX = (Conv, BatchNorm, Dropout, max_pool), (nnx.Conv, nnx.BatchNorm, nnx.Dropout, nnx.max_pool)


def net_step(layers, axis_name=None):
    """Variables, and a function of them and images: loss, running statistics and gradients.

    The running statistics are among its arguments, as in training. Where `jax.shard_map` closes over them, Flax
    updates them by a scatter whose array of indices is empty. On that the compiler of jaxlib 0.11.2 crashes.
    """
    graphdef, *states = nnx.split(Net(*layers, axis_name=axis_name), nnx.Param, ...)

    def loss(params, rest, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return jnp.sin(model(x)).mean(), nnx.state(model, nnx.BatchStat)

    return states, lambda states, x: jax.value_and_grad(loss, has_aux=True)(*states, x)


def test_a_net_by_shapes_of_any_batch_is_exported_and_runs():
    graphdef, state = nnx.split(Net(*OURS))
    net = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    batch = jax.export.symbolic_shape("batch, 12, 12, 3")
    exported = jax.export.export(net, platforms=["cpu", "cuda", "tpu"])(
        state, jax.ShapeDtypeStruct(batch, "float32")
    )
    assert '@"onednn.' not in exported.mlir_module()
    x = image(5, 12, 12, 3)
    assert_close(exported.call(state, x), Net(*FLAX)(x))


@in_onednn
@pytest.mark.usefixtures("with_all_devices")
class TestSeveralDevices:
    """The rule: oneDNN where a program sees one device at a time, XLA where it sees all."""

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = some((16, 12, 12, 3))

    def check(self, run, *, calls):
        """`run` makes of a step a compiled function of variables and images."""
        results = []
        for layers in (OURS, FLAX):
            states, step = net_step(layers, "data" if calls else None)
            program = run(step)
            text = program.lower(states, self.x).as_text()
            assert text.count("@onednn") + text.count('@"onednn') == (calls if layers is OURS else 0)
            results.append(program(states, self.x))
        assert_close(*results)

    @pytest.mark.parametrize("check_vma", [False, True])
    def test_shard_map(self, check_vma):
        specs: Any = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec()}

        def run(step):
            def shard(states, x):
                (loss, statistics), gradients = step(states, x)
                gradients = gradients if check_vma else jax.lax.pmean(gradients, "data")
                return jax.lax.pmean(loss, "data"), statistics, gradients

            return jax.jit(jax.shard_map(shard, mesh=self.mesh, **specs, check_vma=check_vma))

        self.check(run, calls=5)  # forward twice, of the kernel twice, of the input once

    def test_pmap(self):
        def run(step):
            def shard(states, x):
                return jax.lax.pmean(step(states, x), "data")

            mapped = jax.pmap(shard, axis_name="data", in_axes=(None, 0), out_axes=None)
            return jax.jit(lambda states, x: mapped(states, x.reshape(8, 2, *x.shape[1:])))

        self.check(run, calls=5)

    def test_jit(self):
        self.check(jax.jit, calls=0)

    def test_jit_of_a_split_batch(self):
        split = NamedSharding(self.mesh, PartitionSpec("data"))
        self.check(lambda step: jax.jit(step, in_shardings=(None, split)), calls=0)

    def test_a_region_manual_in_some_axes_only(self):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        layer = Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        spec = PartitionSpec("data")
        mapped = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"data"}))
        assert '@"onednn.' not in mapped.lower(self.x).as_text()
        assert_close(mapped(self.x), nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))(self.x))

    def test_explicit_sharding(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
        x = jax.device_put(self.x, NamedSharding(mesh, PartitionSpec("data")))
        with jax.set_mesh(mesh):
            ours, flax = (
                (
                    conv(3, 4, (3, 3), rngs=nnx.Rngs(0))(x),
                    batch_norm(3, rngs=nnx.Rngs(0))(x),
                    dropout(0.5, rngs=nnx.Rngs(0))(x),
                    jax.grad(lambda x, pool=pool: pool(x, (2, 2), (2, 2)).sum())(x),
                )
                for conv, batch_norm, dropout, pool in (OURS, FLAX)
            )
            assert_close(ours, flax)


class TestEvalAndTrain:
    x = some((4, 6, 6, 3))

    @pytest.mark.parametrize("mode", ["eval", "train"])
    def test_of_a_model(self, mode):
        ours, flax = Net(*OURS), Net(*FLAX)
        for model in (ours, flax):
            model.train()
            model(some((4, 12, 12, 3)))
            getattr(model, mode)()
        assert ours.norm.use_running_average is ours.dropout.deterministic is (mode == "eval")
        if mode == "eval":
            assert_close(ours(some((4, 12, 12, 3), seed=1)), flax(some((4, 12, 12, 3), seed=1)))
        else:
            assert (ours.dropout(self.x) == 0).any()

    def test_views(self):
        model = nnx.view(Net(*OURS), use_running_average=True, deterministic=False)
        assert model.norm.use_running_average
        assert not model.dropout.deterministic

    def test_train_is_the_opposite_of_flaxs_flags(self):
        norm, dropout = BatchNorm(3, rngs=nnx.Rngs(0)), Dropout(0.5, rngs=nnx.Rngs(0))
        assert_close(norm(self.x, train=False), norm(self.x, use_running_average=True))
        assert dropout(self.x, train=False) is self.x
        with pytest.raises(TypeError, match="not both"):
            norm(self.x, True, train=False)
        with pytest.raises(TypeError, match="not both"):
            dropout(self.x, deterministic=True, train=False)


class TestDropout:
    x = some((40, 50))

    @pytest.mark.parametrize("rate", [0, 0.0, 1, 1.0])
    @pytest.mark.parametrize("deterministic", [True, False])
    def test_what_is_not_random_is_equal(self, rate, deterministic):
        for dtype in ("float32", "bfloat16", "int32"):
            x = self.x.astype(dtype)
            results = [c(rate, rngs=nnx.Rngs(0))(x, deterministic=deterministic) for c in (Dropout, nnx.Dropout)]
            np.testing.assert_array_equal(results[0], results[1], strict=True)

    @pytest.mark.parametrize("dims", [(0,), (1,), (-1,)])
    def test_broadcast_dims_are_flaxs(self, dims):
        results = [c(0.5, broadcast_dims=dims, rngs=nnx.Rngs(0))(self.x) for c in (Dropout, nnx.Dropout)]
        np.testing.assert_array_equal(results[0], results[1], strict=True)

    def test_a_scalar_is_flaxs(self):
        results = [c(0.5, rngs=nnx.Rngs(0))(jnp.ones(())) for c in (Dropout, nnx.Dropout)]
        np.testing.assert_array_equal(results[0], results[1], strict=True)

    @pytest.mark.parametrize("shape", [(40, 50), (7,), (3, 4, 5, 6), (0, 4), (4, 0)], ids=str)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_what_is_kept_is_scaled_as_flax_scales(self, shape, dtype):
        x = jnp.ones(shape, dtype)
        ours, flax = (c(0.3, rngs=nnx.Rngs(0))(x) for c in (Dropout, nnx.Dropout))
        assert (ours.dtype, ours.shape) == (flax.dtype, flax.shape)
        np.testing.assert_array_equal(ours[ours != 0], jnp.ones_like(ours[ours != 0]) / 0.7)

    def test_keys_come_from_the_streams_that_flax_takes_them_from(self):
        rngs = nnx.Rngs(0, dropout=1, other=2)
        for source in (None, rngs, rngs.dropout, jax.random.key(3)):
            ours, flax = (c(0.5, rngs=nnx.Rngs(dropout=4)) for c in (Dropout, nnx.Dropout))
            counts = []
            for layer in (ours, flax):
                before = rngs.dropout.count[...]
                layer(self.x, rngs=source)
                counts.append((rngs.dropout.count[...] - before, layer.rngs.count[...]))
            assert counts[0] == counts[1]
        masks = [
            Dropout(0.5, rng_collection="other")(self.x, rngs=nnx.Rngs(**keys))
            for keys in ({"other": 1}, {"other": 1, "dropout": 2}, {"other": 2})
        ]
        np.testing.assert_array_equal(masks[0], masks[1])
        assert not np.array_equal(masks[0], masks[2])

    @pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
    def test_any_kind_of_key(self, implementation):
        key = jax.random.key(0, impl=implementation)
        kept = Dropout(0.25)(jnp.ones((200, 500)), rngs=key) != 0
        np.testing.assert_allclose(kept.mean(), 0.75, atol=0.006)  # four standard errors

    def test_a_rate_below_rounding_keeps_all(self):
        np.testing.assert_array_equal(Dropout(1e-17, rngs=nnx.Rngs(0))(self.x), self.x)

    @pytest.mark.parametrize("rngs", [None, "key"])
    def test_errors_are_flaxs(self, rngs):
        for layer_class in (Dropout, nnx.Dropout):
            with pytest.raises((ValueError, TypeError), match="rngs"):
                layer_class(0.5)(self.x, rngs=rngs)

    def test_derivatives_and_vmap(self):
        layer = Dropout(0.5)
        drop = lambda x: layer(x, rngs=jax.random.key(0))  # noqa: E731
        mask = drop(jnp.ones_like(self.x))
        assert_close(jax.jvp(drop, (self.x,), (self.x,)), (self.x * mask, self.x * mask))
        assert_close(jax.grad(lambda x: (drop(x) ** 2).sum())(self.x), 2 * self.x * mask**2)
        assert_close(jax.vmap(drop)(jnp.stack([self.x] * 2)), jnp.stack([self.x * mask] * 2))


class TestTransformations:
    """Of batch norm and max-pooling: what `Case` and `check_pooling` don't have."""

    x = some((4, 6, 6, 3))

    def functions(self):
        def norm(layer_class):
            graphdef, state = nnx.split(layer_class(3, rngs=nnx.Rngs(0)))
            return lambda x: nnx.merge(graphdef, state, copy=True)(x)

        return [
            (norm(BatchNorm), norm(nnx.BatchNorm)),
            *[[functools.partial(p, window_shape=(2, 2), strides=(2, 2)) for p in (max_pool, nnx.max_pool)]],
        ]

    def compare(self, transform):
        for ours, flax in self.functions():
            assert_close(jax.jit(transform(ours))(self.x), jax.jit(transform(flax))(self.x))

    def test_forward_mode(self):
        self.compare(lambda f: lambda x: jax.jvp(f, (x,), (jnp.sin(x),)))

    def test_linearize(self):
        self.compare(lambda f: lambda x: jax.linearize(f, x)[1](jnp.sin(x)))

    def test_vmap(self):
        self.compare(lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x**2])))

    def test_vmap_of_gradients(self):
        self.compare(lambda f: lambda x: jax.vmap(jax.grad(lambda x: jnp.sin(f(x)).sum()))(jnp.stack([x, x**2])))

    def test_gradients_of_vmap(self):
        self.compare(lambda f: jax.grad(lambda x: jnp.sin(jax.vmap(f)(jnp.stack([x, x**2]))).sum()))

    def test_second_derivatives(self):
        self.compare(lambda f: jax.grad(lambda x: jnp.sin(jax.grad(lambda x: jnp.sin(f(x)).sum())(x)).sum()))

    def test_forward_over_reverse(self):
        self.compare(lambda f: lambda x: jax.jvp(jax.grad(lambda x: jnp.sin(f(x)).sum()), (x,), (jnp.sin(x),)))

    def test_checkpoint_and_scan(self):
        def transform(f):
            return jax.grad(
                lambda x: jax.lax.scan(
                    jax.checkpoint(lambda y, _: (y + jnp.sin(f(x)).sum(), None)), 0.0, length=2
                )[0]
            )

        self.compare(transform)

    def test_export(self):
        for ours, flax in self.functions():
            gradients = [jax.jit(jax.grad(lambda x, f=f: jnp.sin(f(x)).sum())) for f in (ours, flax)]
            exported = jax.export.export(gradients[0], platforms=["cpu", "cuda", "tpu"])(self.x)
            assert_close(exported.call(self.x), gradients[1](self.x))


def test_max_pool_by_one_number():
    x = some((2, 7, 7, 3))
    np.testing.assert_array_equal(max_pool(x, 3), nnx.max_pool(x, (3, 3), (3, 3)))
    np.testing.assert_array_equal(max_pool(x, 3, (1, 2), "SAME"), nnx.max_pool(x, (3, 3), (1, 2), "SAME"))


def test_flaxs_layers_are_theirs():
    assert issubclass(Conv, nnx.Conv)
    assert issubclass(BatchNorm, nnx.BatchNorm)
    assert issubclass(Dropout, nnx.Dropout)

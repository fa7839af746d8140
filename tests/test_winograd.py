"""The experiment of benchmarks/winograd: the same numbers as float64, where there is a compiler to build it."""

import importlib.util
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmbench.errors import UserError
from fmbench.layers import onednn
from fmbench.layers.convolution_primitives import convolution

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "winograd" / "measure.py"
spec = importlib.util.spec_from_file_location("winograd_measure", SCRIPT)
assert spec and spec.loader
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)

HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not HAS_COMPILER:
        pytest.skip("no C++ compiler; install g++, or let CXX name one")
    return measure.build(tmp_path_factory.mktemp("winograd"))


# Whole tiles; tiles that reach over the edge, of images that end within a block; several blocks, with padding.
@pytest.mark.parametrize("size, padding, batch", [(14, 0, 5), (9, 0, 3), (13, 1, 7)])
@pytest.mark.parametrize("direction", measure.RESULTS)
def test_equals_float64(library, monkeypatch, direction, size, padding, batch):
    monkeypatch.setitem(measure.LAYERS, "here", measure.Layer(size, 32, 64, padding))
    arrays = measure.random_arrays(measure.LAYERS["here"], batch)
    exact = measure.in_float64(direction, padding, arrays)
    for result in exact:
        arrays[result][...] = float("nan")
    run, _ = measure.prepare_winograd(library, direction, padding, arrays, 2)
    run()
    assert measure.largest_error(arrays, exact) < 1e-5
    first = {result: arrays[result].copy() for result in exact}
    run()  # what the first call left in the workspace adds nothing
    assert all((arrays[result] == first[result]).all() for result in exact)


@pytest.mark.skipif(onednn.library() is None, reason=f"oneDNN cannot be loaded; install {onednn.PACKAGE}")
def test_equals_onednn_in_xla(library, monkeypatch):
    rng = np.random.default_rng(0)
    shapes = (2, 9, 9, 32), (3, 3, 32, 64), (64,)
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    window = onednn.Window((3, 3), (1, 1), ((0, 0), (0, 0)))

    def gradients():
        def loss(x, kernel, bias):
            return (convolution(x, kernel, bias, window, True) ** 2).sum()

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays))

    expected = gradients()
    winograd = measure.InXLA(library, 2)
    monkeypatch.setattr("fmbench.layers.convolution_primitives.onednn", winograd)
    jax.clear_caches()
    for actual, wanted in zip(gradients(), expected, strict=True):
        assert jnp.abs(actual - wanted).max() < 1e-5 * jnp.abs(wanted).max()
    assert len(winograd.calls) == 3
    jax.clear_caches()


def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no C\\+\\+ compiler no-such-compiler; install"):
        measure.build(tmp_path)


@pytest.mark.skipif(onednn.library() is None, reason=f"oneDNN cannot be loaded; install {onednn.PACKAGE}")
def test_a_row_of_the_table(library):
    (row,) = measure.measure(library, "conv3", "kernel", 2, [1], 1)
    name, direction, threads, *_, direct, winograd, _ = [cell.strip() for cell in row.strip("|").split("|")]
    assert (name, direction, threads) == ("conv3", "kernel", "1")
    assert float(direct) < 1e-5 and float(winograd) < 1e-4

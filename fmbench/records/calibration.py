"""What a machine reaches, by which costs on unlike machines can be compared."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmbench.errors import is_out_of_memory
from fmbench.system import runtime

DTYPES = ("float32", "bfloat16")
SECONDS = 0.4  # of each of the four measurements


class Calibration(NamedTuple):
    """FLOP/s of a large matrix product by dtype, and bytes/s of a sum of large arrays."""

    matmul_flops_per_sec: dict[str, float]
    memory_bytes_per_sec: float


@functools.cache
def measure_beside_a_run() -> Calibration | None:
    """As `measure`, once in a process; None where the run left too little memory."""
    try:
        return measure()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def measure() -> Calibration:
    """Measures them in about two seconds.

    Products are of 2048 x 2048 on all cores, on accelerators of 8192 x 8192 on one device, in float32 with JAX's
    default precision there (TF32). The sum is a + 3b, put in the place of a: two arrays read and one written.
    """
    on_cpu = runtime.find_devices()[0].platform == "cpu"
    size = 2048 if on_cpu else 8192
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)

    def flops_per_sec(dtype: str) -> float:
        x = jnp.asarray(matrix, dtype)
        return 2 * size**3 / _median_seconds(lambda: product(x).block_until_ready())

    flops = {dtype: flops_per_sec(dtype) for dtype in DTYPES}
    if on_cpu:  # where NumPy's BLAS may be faster than XLA
        flops["float32"] = max(flops["float32"], 2 * size**3 / _median_seconds(lambda: matrix @ matrix))
    add = jax.jit(lambda a, b: a + 3 * b, donate_argnums=0)
    arrays = [jnp.ones((2**25 if on_cpu else 2**28,), jnp.float32) for _ in range(2)]

    def triad() -> None:
        arrays[0] = add(*arrays).block_until_ready()

    return Calibration(flops, 3 * arrays[1].nbytes / _median_seconds(triad))


def _median_seconds(function: Callable[[], Any]) -> float:
    """Of as many calls as fit into the time, three at least, after one that is not counted."""
    function()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < SECONDS:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)

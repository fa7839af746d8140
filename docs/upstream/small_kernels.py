"""XLA on CPUs: a loop over small arrays takes several times as long since jax 0.4.32 (jax-ml/jax#26145).

    pip install jax numpy
    python small_kernels.py

Each of 20,000 iterations multiplies two 4x4 matrices and takes the hyperbolic tangent. Prints the nanoseconds of
an iteration, the fastest of 20 calls. XLA's runtime calls a kernel for each operation or fusion, where up to jax
0.4.31 the loop was one function; before jax 0.7 XLA_FLAGS=--xla_cpu_use_thunk_runtime=false brings that back.
"""

import time

import jax
import jax.numpy as jnp
import jaxlib

NUM_ITERATIONS = 20_000


@jax.jit
def loop(x, matrix):
    return jax.lax.fori_loop(0, NUM_ITERATIONS, lambda _, x: jnp.tanh(x @ matrix), x)


if __name__ == "__main__":
    x = jax.random.normal(jax.random.key(0), (4, 4))
    fastest = float("inf")
    for _ in range(20):  # the first of which compiles
        start = time.perf_counter()
        loop(x, x).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    print(
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}: {1e9 * fastest / NUM_ITERATIONS:.0f} ns an iteration"
    )

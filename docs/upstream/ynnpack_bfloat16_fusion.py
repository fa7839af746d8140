"""XLA on CPUs: max-pooling, ReLU, convolution and ReLU in bfloat16, fused for YNNPACK, give wrong numbers.

    pip install jax numpy
    python ynnpack_bfloat16_fusion.py

Prints how many elements of the jitted function are far from the same operations one by one, for all four of them
and with one left out, with the fusion and, in a process of its own, without it
(XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=).
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NO_FUSION = "--xla_cpu_experimental_ynn_fusion_type="


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


NETS = {
    "max-pooling, ReLU, convolution, ReLU": lambda x, k: jax.nn.relu(convolve(jax.nn.relu(max_pool(x)), k)),
    "without the max-pooling": lambda x, k: jax.nn.relu(convolve(jax.nn.relu(x), k)),
    "without the first ReLU": lambda x, k: jax.nn.relu(convolve(max_pool(x), k)),
    "without the last ReLU": lambda x, k: convolve(jax.nn.relu(max_pool(x)), k),
}


def main() -> None:
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(rng.standard_normal((64, 28, 28, 32)), dtype)
        kernel = jnp.asarray(rng.standard_normal((3, 3, 32, 32)) / 17, dtype)
        for name, net in NETS.items():
            with jax.disable_jit():
                expected = np.asarray(net(x, kernel), np.float32)
            result = np.asarray(jax.jit(net)(x, kernel), np.float32)
            far = ~(np.abs(result - expected) <= 0.05 + 0.05 * np.abs(expected))  # of NaN, too
            print(f"  {dtype.__name__}, {name}: {far.mean():.1%} wrong")


if __name__ == "__main__":
    without = NO_FUSION in os.environ.get("XLA_FLAGS", "").split()
    print(f"jax {jax.__version__}, {'without' if without else 'with'} the fusion", flush=True)
    main()
    if not without:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {NO_FUSION}".strip()
        subprocess.run([sys.executable, __file__], env=os.environ | {"XLA_FLAGS": flags}, check=True)

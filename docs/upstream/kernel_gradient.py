"""XLA on CPUs: a convolution's gradient for its kernel is several times slower than the convolution itself.

    pip install jax numpy
    python kernel_gradient.py

Forward, gradient for the input and gradient for the kernel do the same multiply-adds. Prints the fastest of ten
calls of each, in turns, with XLA's default and, in a process of its own, with its calls of oneDNN:
XLA_FLAGS="--xla_cpu_experimental_onednn_custom_call=true --xla_cpu_experimental_ynn_fusion_type=". oneDNN's own
primitive for the kernel, which frameworks that call it directly use, is about as fast as its forward one.
"""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from jax import lax

ONEDNN = "--xla_cpu_experimental_onednn_custom_call=true --xla_cpu_experimental_ynn_fusion_type="
SHAPES = ((500, 28, 32, 64), (256, 26, 32, 32), (500, 14, 128, 256))  # images, side, channels in and out


def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def measure(num_images: int, side: int, channels: int, filters: int) -> None:
    x = jnp.ones((num_images, side, side, channels))
    kernel = jnp.ones((3, 3, channels, filters))
    y_grad = jnp.ones((num_images, side, side, filters))
    directions = {
        "forward": jax.jit(convolve),
        "for the input": jax.jit(lambda x, kernel: jax.vjp(lambda x: convolve(x, kernel), x)[1](y_grad)),
        "for the kernel": jax.jit(lambda x, kernel: jax.vjp(lambda k: convolve(x, k), kernel)[1](y_grad)),
    }
    fastest = dict.fromkeys(directions, float("inf"))
    for _ in range(11):  # the first of which compiles
        for name, run in directions.items():
            start = time.perf_counter()
            jax.block_until_ready(run(x, kernel))
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    flops = 2 * num_images * side**2 * 9 * channels * filters
    print(f"{num_images}x{side}x{side}, {channels} -> {filters}")
    for name, seconds in fastest.items():
        times = seconds / fastest["forward"]
        print(f"  {name:14} {1000 * seconds:7.1f} ms, {flops / seconds / 1e9:6.0f} GFLOP/s, {times:.1f} x forward")


if __name__ == "__main__":
    is_onednn = ONEDNN in os.environ.get("XLA_FLAGS", "")
    print(f"jax {jax.__version__}, {'oneDNN in XLA' if is_onednn else 'default'}", flush=True)
    for shape in SHAPES:
        measure(*shape)
    if not is_onednn:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {ONEDNN}".strip()
        subprocess.run([sys.executable, __file__], env=os.environ | {"XLA_FLAGS": flags}, check=True)

"""Honest, fast Fashion-MNIST benchmarking in JAX and Flax."""

__version__ = "0.1.0"

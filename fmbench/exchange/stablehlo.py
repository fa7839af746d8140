"""StableHLO through `jax.export`: the net with its weights as a program for JAX alone, or for another compiler."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from fmbench.exchange.program import Program, refuse_features, refused, specification

FILE, TEXT = "model.bin", "model.mlir"
PLATFORMS = ("cpu", "cuda", "tpu")  # lowering for one needs no such device


def write(program: Program, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Writes the serialized program, and its text.

    Returns:
        The program as read back from the file: uint8 (n, 28, 28) -> float32 (n, 10).

    Raises:
        UserError: If the model is no function of images alone.
    """
    refuse_features(program, "stablehlo")
    values = list(program.arrays.values())
    images = specification()

    @jax.jit
    def logits(images: jax.Array) -> jax.Array:
        return program.call(values, images)

    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)  # where our files lie on this machine is nobody's
    try:
        with refused("stablehlo"):
            exported = jax.export.export(logits, platforms=PLATFORMS)(images)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    (folder / FILE).write_bytes(exported.serialize())
    (folder / TEXT).write_text(exported.mlir_module(), encoding="utf-8")
    read = jax.jit(jax.export.deserialize(bytearray((folder / FILE).read_bytes())).call)
    return lambda batch: np.asarray(read(batch))

"""safetensors: the arrays by flat names, for any language and framework."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fmbench.errors import UserError
from fmbench.exchange.program import Program

FILE = "model.safetensors"


def write(program: Program, folder: Path) -> None:
    """Writes the weights and, as metadata, what rebuilds the net; reads them back, and compares every bit.

    Raises:
        UserError: If they do not come back as they were.
    """
    described = {name: json.dumps(value) for name, value in program.description.items()}
    save_file(program.arrays, folder / FILE, metadata=described)
    back = load_file(folder / FILE)
    for name, array in program.arrays.items():
        read = back.get(name, np.empty(0))
        if (read.dtype, read.shape, read.tobytes()) != (array.dtype, array.shape, array.tobytes()):
            raise UserError(f"{folder / FILE}: '{name}' does not come back as it was written; is the disk sound?")

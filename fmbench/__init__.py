"""Honest, fast Fashion-MNIST benchmarking in JAX and Flax.

    import fmbench

    record = fmbench.train("mlp", num_epochs=2)
    print(record.test_accuracy)

The functions are those of `fmbench.api`; JAX is not imported before one of them is used.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from fmbench.errors import UserError

if os.path.basename(sys.argv[0]) in ("-m", "fmbench"):  # noqa: PTH119
    # A command begins: `python -m` looks for its module here, or the script `fmbench` does.
    from fmbench.system import interrupt

    interrupt.answer.listen()
    from fmbench.system import command_line

    command_line.begin()

if TYPE_CHECKING:
    from fmbench.api import Classifier, list_configs, list_models, load_model, read_records, train

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "UserError",
    "list_configs",
    "list_models",
    "load_model",
    "read_records",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fmbench import api

        return getattr(api, name)
    raise AttributeError(f"module 'fmbench' has no attribute '{name}'")

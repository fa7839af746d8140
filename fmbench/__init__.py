"""Honest, fast Fashion-MNIST benchmarking in JAX and Flax.

    import fmbench

    record = fmbench.train("mlp", num_epochs=2)
    print(record.test_accuracy)

The functions are those of `fmbench.api`; JAX is not imported before one of them is used.
"""

from typing import TYPE_CHECKING, Any

from fmbench.errors import UserError

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

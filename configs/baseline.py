"""Single-convolution baseline of reference system R0, on all 60,000 train images; the argument is a variant.

    python -m fmbench.main --config=configs/baseline.py          32 filters, valid padding
    python -m fmbench.main --config=configs/baseline.py:same     same padding
    python -m fmbench.main --config=configs/baseline.py:same64   same padding, 64 filters

SGD 0.01 with momentum 0.9, batch 32, 10 epochs, inputs in [0, 1]. Published: 90.99 % test accuracy. Its five folds
(91.187 +- 0.121 % held out; same 91.257, same64 90.913) are run by fmbench.cross_validate.
results/reproduction.md names the system.
"""

from ml_collections import config_dict

from fmbench.config import base_config

VARIANTS = {"": (32, "VALID"), "same": (32, "SAME"), "same64": (64, "SAME")}
ARGUMENTS = tuple(VARIANTS)
RESOURCES = {"": {"minutes": 15}}  # of one run, where a cluster is asked for them


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = base_config()
    config.model.name = "baseline"
    config.model.filters, config.model.padding = VARIANTS[arg]
    config.num_epochs = 10
    config.batch_size = 32
    config.watch = "none"
    config.data.split = "all"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    return config

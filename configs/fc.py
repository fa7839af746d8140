"""Fully connected nets of reference system R4, by their own protocol; the argument is the net.

    python -m fmbench.main --config=configs/fc.py:a     128-64, Adam 3e-3, 25 epochs: 87.42 % published
    python -m fmbench.main --config=configs/fc.py:b     392-196-98-49, Adam 7e-4, 35 epochs: 88.65 % published

Inputs in [-1, 1], batch 64, 80 % of the train images. Which 80 % is not published; this entry takes scikit-learn's
split 0. results/reproduction.md names
the system.
"""

from ml_collections import config_dict

from fmbench.config import base_config

# Of the net: widths, dropouts; of Adam: learning rate, epochs.
NETS = {"a": ((128, 64), 1, 0.003, 25), "b": ((392, 196, 98, 49), 3, 0.0007, 35)}
ARGUMENTS = tuple(NETS)
RESOURCES = {"": {"minutes": 15}}  # of one run, where a cluster is asked for them


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = base_config()
    config.model.name = "fully_connected"
    config.model.widths, config.model.num_dropouts, config.optimizer.learning_rate, config.num_epochs = NETS[arg]
    config.batch_size = 64
    config.data.split = "train_test_split"
    config.data.test_size = 0.2
    config.data.normalization = "symmetric"
    return config

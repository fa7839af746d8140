"""Fully connected nets of reference system R4, by their own protocol; the argument is the net.

    python -m fmbench.main --config=configs/fc.py:a     128-64, Adam 3e-3, 25 epochs: 87.42 % published
    python -m fmbench.main --config=configs/fc.py:b     392-196-98-49, Adam 7e-4, 35 epochs: 88.65 % published

Inputs in [-1, 1], batch 64, 80 % of the train images. Which 80 % is not published; this entry takes scikit-learn's
split 0.
"""

from ml_collections import config_dict

from fmbench.config import base_config


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = base_config()
    config.model.name = "fully_connected"
    if arg == "a":
        config.model.widths, config.model.num_dropouts = (128, 64), 1
        config.optimizer.learning_rate, config.num_epochs = 0.003, 25
    elif arg == "b":
        config.model.widths, config.model.num_dropouts = (392, 196, 98, 49), 3
        config.optimizer.learning_rate, config.num_epochs = 0.0007, 35
    else:
        raise ValueError("the net is missing, as in configs/fc.py:a; there are a and b")
    config.batch_size = 64
    config.data.split = "train_test_split"
    config.data.test_size = 0.2
    config.data.normalization = "symmetric"
    return config

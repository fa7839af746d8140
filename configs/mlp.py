"""MLP 256-512-100-10 of reference system R2, by its own protocol.

    python -m fmbench.main --config=configs/mlp.py

Adam 1e-3, inputs in [-1, 1], all 60,000 train images, 100 epochs, the test set read at the end: 89-90 %
published. fmbench: 88.97 ± 0.15 % (3 seeds), some 75 s of training each on two cores.

The batch size is not published. Of 128, 500 and 1,000, with one seed each, the default validation split chose
1,000: mean accuracy of the last twelve epochs 89.9 %, against 89.6 with 500, and 88.9 in epochs 70 to 81 with 128.
"""

from ml_collections import config_dict

from fmbench.config import base_config


def get_config() -> config_dict.ConfigDict:
    config = base_config()
    config.model.name = "mlp"
    config.num_epochs = 100
    config.batch_size = 1000
    config.watch = "none"
    config.data.split = "all"
    config.data.normalization = "symmetric"
    config.optimizer.eps = 1e-7  # Keras's
    return config

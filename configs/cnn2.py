"""CNN with two convolutions and sigmoid outputs of reference system R1, by its own protocol.

    python -m fmbench.main --config=configs/cnn2.py
    python -m fmbench.main --config=configs/cnn2.py --config.data.source=csv --config.data.dir=DIR

Adam 1e-3, inputs in [0, 1], batch 512, 50 epochs on 80 % of the train images (scikit-learn's split 12345).
Published: 90 % test accuracy on the old data, which is what Kaggle's CSV files hold. results/reproduction.md names
the system.
"""

from ml_collections import config_dict

from fmbench.config import base_config

RESOURCES = {"": {"minutes": 60}}  # of one run, where a cluster is asked for them


def get_config() -> config_dict.ConfigDict:
    config = base_config()
    config.model.name = "cnn2"
    config.num_epochs = 50
    config.batch_size = 512
    config.data.split = "train_test_split"
    config.data.test_size = 0.2
    config.data.random_state = 12345
    config.data.remainder = "keep"  # as Keras does
    config.optimizer.eps = 1e-7  # Keras's value; Keras adds it before the bias correction, optax after
    return config

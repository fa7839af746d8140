"""CNN with one convolution of reference system R3: its first stage, without augmentation.

    python -m fmbench.main --config=configs/cnn1.py

Adam 1e-3, inputs in [0, 1], batch 256, 10 epochs on 80 % of the train images (scikit-learn's split 13). Published:
91.04 % test accuracy on the old data, 91.2 % reported on the new.
"""

from ml_collections import config_dict

from fmbench.config import base_config


def get_config() -> config_dict.ConfigDict:
    config = base_config()
    config.model.name = "cnn1"
    config.num_epochs = 10
    config.batch_size = 256
    config.data.split = "train_test_split"
    config.data.test_size = 0.2
    config.data.random_state = 13
    config.optimizer.eps = 1e-7  # Keras's
    return config

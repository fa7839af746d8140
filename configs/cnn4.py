"""CNN with four convolutions of reference system R3 (results/reproduction.md), in its two stages.

    python -m fmbench.main --config=configs/cnn4.py
    python -m fmbench.main --config=configs/cnn4.py --config.num_epochs=10     the first stage alone

Adam 1e-3, inputs in [0, 1], batches of 256 and a last one of 128, 80 % of the train images (scikit-learn's split
13): 10 epochs as they are, then 50 epochs augmented, weights and optimizer going on. Published test accuracies:
90.52 % after the first stage and 93.52 % after the second on the old data.
"""

from ml_collections import config_dict

from fmbench.config import base_config, stage

RESOURCES = {"": {"minutes": 180}}  # of one run, where a cluster is asked for them


def get_config() -> config_dict.ConfigDict:
    config = base_config()
    config.model.name = "cnn4"
    config.batch_size = 256
    config.data.split = "train_test_split"
    config.data.test_size = 0.2
    config.data.random_state = 13
    config.data.remainder = "keep"  # as Keras does
    config.optimizer.eps = 1e-7  # Keras's value; Keras adds it before the bias correction, optax after

    config.num_epochs = 60
    config.stages.stage1 = stage(num_epochs=10)
    config.stages.stage2 = stage(num_epochs=50)
    config.stages.stage2.augment.rotation = 8.0
    config.stages.stage2.augment.shift = 0.08
    config.stages.stage2.augment.zoom = 0.08
    config.stages.stage2.augment.shear = 0.3
    return config

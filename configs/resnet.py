"""ResNet of the CIFAR kind; the argument is its depth.

    python -m fmbench.main --config=configs/resnet.py:20

The paper's optimizer (SGD 0.1, momentum 0.9, weight decay 1e-4, batch 128, rate divided by 10 at 1/2 and 3/4 of
the run) for 20 epochs, without augmentation; inputs standardised; default validation split.
"""

from ml_collections import config_dict

from fmbench.config import base_config


def get_config(arg: str = "") -> config_dict.ConfigDict:
    if not arg:
        raise ValueError("the depth is missing, as in configs/resnet.py:20")
    config = base_config()
    config.model.name = "resnet"
    config.model.depth = int(arg)
    config.num_epochs = 20
    config.batch_size = 128
    config.data.normalization = "standard"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "step"
    return config

"""Speed records: the least training whose mean test accuracy over seeds reaches a target, which is the argument.

    python -m fmbench.main --config=configs/speedrun.py:94     94 %

Six convolutions, Muon on their kernels, whose norms are kept, a learning rate that falls in a line to zero, label
smoothing, flips and shifts of one pixel. From the second epoch on, most of the half of the images with the lowest
losses is left out, and others seen twice. All 60,000 train images. What counts is the last epoch, each test image
seen once as it is. How the recipe came about: docs/speedrun.md; what it gives: results/speedrun.md.
"""

from ml_collections import config_dict

from fmbench.config import base_config

NUM_EPOCHS = {"94": 12}


def get_config(arg: str = "") -> config_dict.ConfigDict:
    if arg not in NUM_EPOCHS:
        raise ValueError(f"the target is missing, as in configs/speedrun.py:94; there are {', '.join(NUM_EPOCHS)}")
    config = base_config()
    config.model.name = "speedrun"
    config.model.widths = (32, 64, 128)
    config.num_epochs = NUM_EPOCHS[arg]
    config.batch_size = 512
    config.watch = "none"
    config.label_smoothing = 0.1
    config.augment.flip = True
    config.augment.crop_padding = 1
    config.selection.easy = 0.5
    config.selection.keep = 0.2
    config.selection.after_epochs = 1
    config.data.split = "all"
    config.data.normalization = "standard"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.17
    config.optimizer.adam_factor = 0.07
    config.optimizer.momentum = 0.6
    config.optimizer.nesterov = True
    config.optimizer.keep_norm = True
    config.schedule.name = "linear"
    config.schedule.warmup_epochs = 0.5
    return config

"""Shake-shake regularised nets; the argument is depth, branches and width. For accelerators.

    python -m fmbench.main --config=configs/shake_shake.py:26-2x32d     2.9 M parameters, 400 epochs
    python -m fmbench.main --config=configs/shake_shake.py:26-2x96d    26.2 M parameters, 400 epochs

The recipe of github.com/hysts/pytorch_image_classification: all 60,000 train images, batch 128, Nesterov SGD at
0.2, half a cosine down to zero, weight decay 1e-4, crop padded by 4, flip, Cutout of 14 pixels. It differs from
theirs in bfloat16, in evaluating the moving average of the weights, in weight decay on kernels alone, in Cutout's
black for their mean of the images, and in the paper's stem of 16 channels, where theirs was as wide as the first
stage when they published.

Published there, after the last epoch, one run each, on the new data:

- 26-2x32d: 95.95 % in 400 epochs; with Cutout of 12 pixels 95.92.
- 26-2x96d: 96.15 % in 400 epochs, 96.40 in 800; with Cutout of 12 pixels 96.28 and 96.35. Earlier 96.09 in 300.

Expected time: not measured, it needs an accelerator. On an H100 at a third of its peak 26-2x96d would take 19
minutes, 2.8 s an epoch (docs/speedrun.md); 26-2x32d has a ninth of the FLOPs in as many operations and will not
reach a third.
"""

from ml_collections import config_dict

from fmbench.config import base_config

ARGUMENTS = ("26-2x32d", "26-2x96d")
RESOURCES = {"": {"cpus": 4, "gpus": 1, "minutes": 240}}  # of one run, where a cluster is asked for them


def get_config(arg: str = "") -> config_dict.ConfigDict:
    depth, width = arg.removesuffix("d").split("-2x")
    config = base_config()
    config.num_epochs = 400
    config.model.name = "shake_shake"
    config.model.depth, config.model.width = int(depth), int(width)
    config.batch_size = 128
    config.dtype = "bfloat16"
    config.watch = "none"
    config.data.split = "all"
    config.data.normalization = "standard"
    config.ema_decay = 0.999
    config.augment.crop_padding = 4
    config.augment.flip = True
    config.augment.cutout = 14
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.2
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    return config

"""Wide residual networks; the argument is depth and width. For accelerators.

    python -m fmbench.main --config=configs/wide_resnet.py:16-4      2.7 M parameters, 100 epochs
    python -m fmbench.main --config=configs/wide_resnet.py:28-10    36.5 M parameters, 200 epochs
    python -m fmbench.main --config=configs/wide_resnet.py:40-4      8.9 M parameters, 400 epochs

bfloat16, all 60,000 train images, batch 512. Nesterov SGD, 0.1 for each 128 images of a batch, weight decay 5e-4
(Zagoruyko & Komodakis, 2016), a warm-up over 5 epochs and half a cosine down to zero; crop padded by 4, and flip;
the moving average of the weights is evaluated.

- 16-4: random erasing, label smoothing. For this net no number is published that we know of.
- 28-10: random erasing, label smoothing. Published: 95.7 % in the last of 300 epochs, with random erasing, by a
  user of its authors' code (github.com/zhunzhong07/Random-Erasing, issue 9); 96.35 % by its authors on the old
  data.
- 40-4: CutMix. Published: 96.6 % in the last of 600 to 1,000 epochs, with FMix, RandAugment and a moving average;
  96.07 % after 300 epochs with crop and flip alone, on the old data (github.com/zalandoresearch/fashion-mnist,
  issue 10).

Expected time: not measured, it needs an accelerator.
"""

from ml_collections import config_dict

from fmbench.config import base_config

NUM_EPOCHS = {"16-4": 100, "28-10": 200, "40-4": 400}
ARGUMENTS = tuple(NUM_EPOCHS)
RESOURCES = {"": {"cpus": 4, "gpus": 1, "minutes": 240}}  # of one run, where a cluster is asked for them


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = base_config()
    config.num_epochs = NUM_EPOCHS[arg]
    config.model.name = "wide_resnet"
    config.model.depth, config.model.width = map(int, arg.split("-"))
    config.batch_size = 512
    config.dtype = "bfloat16"
    config.watch = "none"
    config.data.split = "all"
    config.data.normalization = "standard"
    config.ema_decay = 0.999
    config.augment.crop_padding = 4
    config.augment.flip = True
    if arg == "40-4":
        config.augment.cutmix = 1.0  # labels are soft already
    else:
        config.augment.random_erasing = 0.5
        config.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.4
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 5.0
    return config

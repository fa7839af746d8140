"""What a run can be told: every field with its default and its meaning, and what is refused."""

import ast
import inspect
import json
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import config_dict

from fmbench.errors import UserError, nearest

REPOSITORY = Path(__file__).resolve().parent.parent
# Groups to which a file may add fields: the arguments of a model, an optimizer or a schedule of one's own.
TAKE_FIELDS = ("config.model", "config.optimizer", "config.schedule")


def base_config() -> config_dict.ConfigDict:
    """All fields with their defaults; a file in configs/ says how its entry differs.

    The comment behind a field is its meaning, which `fmbench train --help` shows, too.
    """
    config = config_dict.ConfigDict()
    config.entry = ""  # name on the leaderboard; not to be set: it comes from the config file and the overrides
    config.config_file = ""  # likewise
    config.seed = 0  # initialisation, order of the examples, dropout
    config.num_epochs = 10  # of all stages together
    config.batch_size = 256  # global: over all devices
    config.eval_batch_size = 1000  # likewise
    config.dtype = "float32"  # float32, bfloat16; of the computation: parameters are always float32
    config.parallel = "jit"  # jit, pmap: how the step is spread over the devices
    config.steps_per_call = 0  # steps compiled into one call; 0: 1 on CPUs, an epoch on accelerators
    config.label_smoothing = 0.0  # the share of each label that goes to all classes alike
    config.ema_decay = 0.0  # evaluate an exponential moving average of the weights; 0: the last ones
    config.grad_clip_norm = 0.0  # global norm; 0: no clipping
    config.early_stopping_patience = 0  # epochs without a better validation accuracy; 0: off
    config.watch = "validation"  # evaluated after each epoch: validation, test (as some references did), none

    config.augment = no_augmentation()  # in training, where there are no stages
    config.stages = config_dict.ConfigDict()  # parts of the run, in the order of their names; each from `stage`

    config.selection = no_selection()  # of the examples that an epoch visits, by their losses

    config.data = config_dict.ConfigDict()
    config.data.source = "tfds"  # tfds; csv, idx: the files in data.dir; sample: the tests' few hundred images
    config.data.dir = config_dict.placeholder(str)  # folder with the four idx files
    config.data.unproven = False  # csv, idx: other data of the same shape than Fashion-MNIST will do
    config.data.split = "default"  # default (5,000 stratified), train_test_split, kfold, all
    config.data.test_size = 0.2  # of scikit-learn's train_test_split
    config.data.random_state = 0  # of train_test_split and of scikit-learn's KFold
    config.data.num_folds = 5  # of KFold
    config.data.fold = 0  # the fold that validates
    config.data.remainder = "drop"  # what fills no batch; keep: an epoch ends with a smaller step on it
    config.data.pipeline = "resident"  # all images on every device; grain: read from disk, batch by batch
    config.data.normalization = "unit"  # unit: [0, 1]; symmetric: [-1, 1]; standard: mean 0, std 1; none: features

    config.features = config_dict.ConfigDict()  # the images as a frozen net sees them
    config.features.backbone = ""  # efficientnet_lite0, vgg19; '': no features, the images themselves
    config.features.weights = ""  # file; '': the installed package, the cache or the network
    config.features.image_size = 112  # to which images are enlarged
    config.features.preprocessing = "imagenet"  # imagenet; rescaled_twice, a published mistake

    config.model = config_dict.ConfigDict()
    config.model.name = "mlp"  # of fmbench.models.MODELS, or package.module:Name; further fields are its arguments

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.name = "adam"  # sgd, adam, adamw, muon, or one's own: package.module:name
    config.optimizer.learning_rate = 1e-3  # the schedule's peak
    config.optimizer.momentum = 0.9  # sgd, muon
    config.optimizer.nesterov = False  # sgd, muon
    config.optimizer.b1 = 0.9  # adam, adamw
    config.optimizer.b2 = 0.999  # likewise
    config.optimizer.eps = 1e-8  # likewise
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
    augment.function = ""  # package.module:name of one's own, (key, image) -> image, float32 (28, 28); comes last
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
    config.num_epochs = num_epochs  # of the stage
    config.learning_rate = 0.0  # peak; 0: the optimizer's
    config.augment = no_augmentation()  # as config.augment
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


class Field(NamedTuple):
    """A field of `base_config`, or a group of them, as --help shows it."""

    key: str
    default: str  # as Python writes it; '' for a group
    meaning: str


def fields() -> list[Field]:
    """Every field, its default and its meaning: the comment behind its line in this file."""
    return list(_fields_of(base_config))


def _fields_of(function: Callable[..., config_dict.ConfigDict], prefix: str = "") -> Iterator[Field]:
    groups: dict[str, tuple[Callable[..., config_dict.ConfigDict], str]]
    groups = {"augment": (no_augmentation, ""), "selection": (no_selection, ""), "stages": (stage, "<name>.")}
    # The first name in a line is the function's own variable.
    for line in re.finditer(r"^    \w+\.(\S+) = (.+?)  # (.+)$", inspect.getsource(function), re.MULTILINE):
        key, value, meaning = line.groups()
        default = "None" if "placeholder" in value else "" if value.endswith("()") else value
        yield Field(prefix + key, default, meaning)
        if not prefix and key in groups:
            group, name = groups[key]
            yield from _fields_of(group, f"{key}.{name}")


def override(config: config_dict.ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets fields, {'optimizer.learning_rate': 1e-3}; the text of a value does as well, '1e-3'.

    Raises:
        UserError: If there is no such field, or the value is not of its kind.
    """
    known = flatten(config.to_dict())
    for key, value in overrides.items():
        if key not in known:
            there = nearest(key, known) or f"; there are {', '.join(sorted(known))}"
            raise UserError(f"config has no field '{key}'{there}.")
        *parents, name = key.split(".")
        owner = config
        for parent in parents:
            owner = owner[parent]
        with config.unlocked():
            owner[name] = _of_kind(key, value, owner.get_type(name))


KINDS = {
    tuple: "a list like (0.5, 0.75)",
    list: "a list like [0.5, 0.75]",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


def _of_kind(key: str, value: Any, kind: type) -> Any:
    """The value as the field's type."""
    try:
        if kind in (tuple, list):
            value = ast.literal_eval(value) if isinstance(value, str) else value
            return kind(value if isinstance(value, list | tuple) else (value,))
        if kind is bool and isinstance(value, str):
            return {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}[value.lower()]
        if kind is int and isinstance(value, str | numbers.Integral) and not isinstance(value, bool):
            return int(value)
        if kind is float and isinstance(value, str | numbers.Real) and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if type(value) is kind or (kind is str and value is None):
            return value
    except (ValueError, KeyError, SyntaxError):
        pass
    must = KINDS.get(kind, "set in the config file")
    raise UserError(f"config.{key} is '{value}'; it must be {must}.")


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


def check_fields(recorded: dict[str, Any]) -> None:
    """Refuses a config, as `to_json` gives it, that no run can have had.

    Raises:
        ValueError: Names the field.
    """
    _check_fields(recorded, to_json(base_config()))
    for field in {"num_epochs", "data"} - recorded.keys():
        raise ValueError(f"config.{field} is missing")


def _check_fields(recorded: Any, defaults: dict[str, Any], where: str = "config") -> None:
    """Refuses fields and kinds of values that a config cannot have; `recorded` may lack fields that came later.

    Raises:
        ValueError: Names the field.
    """
    if not isinstance(recorded, dict):
        raise ValueError(f"{where} is {recorded!r:.50}; it must be a group of fields")
    if where == "config.stages":
        defaults = {name: to_json(stage(0)) for name in recorded}
    for name, value in recorded.items():
        field = f"{where}.{name}"
        if isinstance(defaults.get(name), dict):
            _check_fields(value, defaults[name], field)
            continue
        if name not in defaults and where not in TAKE_FIELDS:
            raise ValueError(f"there is no {field}{nearest(name, defaults)}")
        default = defaults.get(name, value)
        kind = type("" if default is None else default)
        numbers = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, float | int)]
        is_kind = isinstance(value, (float, int) if kind is float else kind) and kind is not dict
        is_kind &= isinstance(value, bool) == (kind is bool)
        if not (is_kind or value is default is None) or not all(abs(number) <= 1e30 for number in numbers):
            raise ValueError(f"{field} is {value!r:.50}; it must be {KINDS.get(kind, 'a plain value')}")


def check(config: config_dict.ConfigDict) -> None:
    """Refuses a value that no run can use.

    Raises:
        UserError: Names the field, its value and what it must be.
    """
    try:
        check_fields(to_json(config))  # before anything is trained whose record could not be written
    except ValueError as error:
        raise UserError(f"{error}.") from error
    except TypeError as error:
        raise UserError(f"a field of the config: {error}.") from error
    choices = {
        "dtype": ("float32", "bfloat16"),
        "parallel": ("jit", "pmap"),
        "watch": ("validation", "test", "none"),
        "data.source": ("tfds", "csv", "idx", "sample"),
        "data.split": ("default", "train_test_split", "kfold", "all"),
        "data.remainder": ("drop", "keep"),
        "data.pipeline": ("resident", "grain"),
        "data.normalization": ("unit", "symmetric", "standard", "none"),
        "features.backbone": ("", "efficientnet_lite0", "vgg19"),
        "features.preprocessing": ("imagenet", "rescaled_twice"),
    }
    choices_or_import_path = {
        "optimizer.name": ("sgd", "adam", "adamw", "muon"),
        "schedule.name": ("constant", "step", "cosine", "linear", "onecycle"),
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
    for key, allowed in (choices | choices_or_import_path).items():
        or_else = ", or an import path like mypackage.module:name" if key in choices_or_import_path else ""
        if flat[key] not in allowed and not (or_else and ":" in flat[key]):
            raise UserError(
                f"config.{key} is '{flat[key]}'; it must be one of {', '.join(filter(None, allowed))}{or_else}"
                f"{nearest(flat[key], allowed)}."
            )
    for key, least in minimum.items():
        if not flat[key] >= least:  # also catches nan
            raise UserError(f"config.{key} is {flat[key]}; it must be at least {least}.")
    _check_augment("augment", config.augment.to_dict())
    _check_selection(config.selection.to_dict())
    _check_stages(config)
    if flat["seed"] >= 2**32:
        raise UserError(f"config.seed is {flat['seed']}; it must be below 2**32.")
    for key in ("label_smoothing", "ema_decay"):
        if flat[key] >= 1:
            raise UserError(f"config.{key} is {flat[key]}; it must be below 1.")
    if flat["early_stopping_patience"] and (flat["watch"], flat["data.split"]) == ("none", "all"):
        raise UserError("config.early_stopping_patience needs config.watch='validation'.")
    _check_features(config)
    _check_pipeline(config)


def _check_stages(config: config_dict.ConfigDict) -> None:
    """Refuses stages that the run cannot have."""
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


def _check_features(config: config_dict.ConfigDict) -> None:
    """Refuses a frozen net's features where something else doesn't go with them."""
    uses_features = bool(config.features.backbone)
    if not (config.data.normalization == "none") == (config.model.name == "transfer_head") == uses_features:
        raise UserError(
            "config.features.backbone, config.model.name='transfer_head' and config.data.normalization='none' "
            "go together; start from configs/transfer.py."
        )
    if uses_features and any(any(stage.augment.values()) for stage in stages(config)):
        raise UserError("features are computed once, so the images cannot be augmented; drop config.augment.")


def _check_pipeline(config: config_dict.ConfigDict) -> None:
    """Refuses what needs all images on the devices where they are read batch by batch."""
    others = {
        "config.selection.easy": config.selection.easy,
        "config.features.backbone": config.features.backbone,
        "config.parallel=pmap": config.parallel == "pmap",
    }
    if config.data.pipeline == "grain" and (used := [field for field, value in others.items() if value]):
        raise UserError(
            f"config.data.pipeline=grain does not do {used[0]}; drop it, or give --config.data.pipeline=resident."
        )


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

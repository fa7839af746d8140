"""Entries: a config file found by name or path, loaded, changed by flags, and named."""

import hashlib
import inspect
import itertools
import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import config_dict

from fmbench import config as config_lib
from fmbench.config import REPOSITORY, flatten
from fmbench.errors import UserError, nearest

# The shipped config files: in a wheel they lie in the package, in a checkout at its top.
IN_WHEEL = Path(__file__).resolve().parent / "configs"
CONFIGS = IN_WHEEL if IN_WHEEL.is_dir() else REPOSITORY / "configs"

# Fields that make no other entry: the seed and the dtype stand in a record's name, and wherever the data
# and the weights lie, they are proven to be the same.
SAME_DATA = (("data.source", "csv"), ("data.source", "idx"), ("data.unproven", True))  # or a record's name says so
NOT_IN_ENTRY_NAME = ("seed", "dtype", "data.dir", "features.weights", "entry", "config_file")
LONGEST_ENTRY = 160  # characters; fold, device, dtype and seed make it a record's file name, of 255 at most


class Place(NamedTuple):
    """Where a config comes from."""

    path: Path
    argument: str  # for its get_config; '' for none

    @property
    def is_shipped(self) -> bool:
        return self.path.resolve().parent == CONFIGS

    @property
    def entry(self) -> str:
        """The name that the file and the argument give."""
        name = "-".join(filter(None, (self.path.stem, self.argument)))
        return re.sub(r"[^A-Za-z0-9_.=-]", "_", name)


class Resources(NamedTuple):
    """What one run asks of a cluster."""

    cpus: int = 2
    gpus: int = 0
    minutes: int = 120  # a run that takes longer goes on in another job of as many


LEAST = Resources(cpus=1, gpus=0, minutes=5)  # of which SLURM leaves one and a half to the checkpoint


def names() -> list[str]:
    """The shipped configs: 'baseline', 'cnn1', ..."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def specs() -> list[str]:
    """The shipped configs with their arguments, as --config takes them: 'mlp', 'mlp:best', ..."""
    found = []
    for name in names():
        arguments = getattr(_module(CONFIGS / f"{name}.py"), "ARGUMENTS", ("",))
        found += [f"{name}:{argument}" if argument else name for argument in arguments]
    return found


def find(spec: str) -> Place:
    """The file and the argument of 'mlp', 'speedrun:94', 'configs/speedrun.py:94' or any path, with colons or not.

    A file that is there comes first, the longest path before shorter ones; then the shipped configs, which
    configs/ stands for where there is no such folder.

    Raises:
        UserError: If there is no such config; names the nearest.
    """
    words = spec.split(":")
    splits = [(":".join(words[:end]), ":".join(words[end:])) for end in range(len(words), 0, -1)]
    for path, argument in splits:
        if path.endswith(".py") and Path(path).is_file():
            if not re.match(r"_*[A-Za-z0-9]", Path(path).stem):
                raise UserError(f"config file '{path}' gives its entry no name; call it something like mine.py.")
            return Place(Path(path), argument)
    for path, argument in splits:
        name = path.removeprefix("configs/").removesuffix(".py") if path.startswith("configs/") else path
        if name in names():
            return Place(CONFIGS / f"{name}.py", argument)
    path = splits[-1][0]
    if Path(path).is_file():
        raise UserError(f"config file '{path}' is not a Python file; configs end in .py.")
    if not path:
        raise UserError(f"--config is missing, as in --config=mlp; there are {', '.join(names())}.")
    beside = [f"{Path(path).parent / file.name}" for file in Path(path).parent.glob("*.py")] if "/" in path else []
    near = nearest(path, [*names(), *beside]) or nearest(Path(path).stem, names())
    there = f"; there are {', '.join(names())}"
    raise UserError(f"no config '{path}'{near or there}.")


def load(spec: str) -> config_dict.ConfigDict:
    """The config of 'resnet:20', as its file gives it.

    Raises:
        UserError: If there is no such file or it gives no config.
    """
    return _load(find(spec), spec)


def resources(spec: str) -> Resources:
    """What a run of 'resnet:18' asks of a cluster: as its config file's RESOURCES has it for the argument.

        RESOURCES = {"": {"minutes": 60}, "18": {"gpus": 1}}    '' is for arguments that are not named

    Raises:
        UserError: If there is no such config, or it asks for what nobody can give.
    """
    place = find(spec)
    stated = getattr(_module(place.path), "RESOURCES", {})
    try:
        found = Resources(**stated.get(place.argument, stated.get("", {})))
    except (AttributeError, TypeError) as error:
        there = f"expected {{argument: {{{', '.join(Resources._fields)}}}}}"
        raise UserError(f"{place.path}: RESOURCES cannot be read; {there}.") from error
    for name, value, least in zip(found._fields, found, LEAST, strict=True):
        if type(value) is not int or value < least:
            raise UserError(f"{place.path}: RESOURCES has {name} {value!r}; it must be a number from {least} on.")
    return found


def _load(place: Place, spec: str) -> config_dict.ConfigDict:
    module = _module(place.path)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"config '{spec}' does not load: it has no function get_config.")
    if place.argument and not inspect.signature(get_config).parameters:
        raise UserError(f"config '{spec}': {place.path.stem} takes no argument; leave ':{place.argument}' away.")
    try:
        config = get_config(place.argument) if place.argument else get_config()
    except Exception as error:  # whatever a config file may raise, its author wants to read it
        arguments = [argument for argument in getattr(module, "ARGUMENTS", ()) if argument]
        if not arguments or place.argument in arguments:
            raise _does_not_load(spec, error) from error
        there = f"there are {', '.join(arguments)}{nearest(place.argument, arguments)}"
        if not place.argument:
            name = place.path.stem
            raise UserError(f"config '{spec}' needs an argument, as in {name}:{arguments[0]}; {there}.") from error
        raise UserError(f"config '{spec}': there is no argument '{place.argument}'; {there}.") from error
    base = flatten(config_lib.base_config().to_dict())
    if not isinstance(config, config_dict.ConfigDict) or not base.keys() <= flatten(config.to_dict()).keys():
        raise UserError(f"config '{spec}' is no config of fmbench: start from fmbench.config.base_config().")
    return config


def _module(path: Path) -> types.ModuleType:
    """Runs a config file; unlike an import it leaves no __pycache__ beside it, which may be out of date."""
    module = types.ModuleType("fmbench_config")
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
    except Exception as error:
        raise _does_not_load(str(path), error) from error
    return module


def _does_not_load(spec: str, error: Exception) -> UserError:
    return UserError(f"config '{spec}' does not load: {type(error).__name__}: {error}")


def from_arguments(arguments: Sequence[str]) -> config_dict.ConfigDict:
    """The config that --config and --config.<key> among `arguments` ask for, named, checked and locked.

    Raises:
        UserError: If a flag or a config key is unknown, a value cannot be used, or the config file is missing
            or broken.
    """
    given, stray = split(arguments)
    if stray:
        raise UserError(f"unexpected argument '{stray[0]}'; all settings are flags, see --help.")
    return resolve(given.pop("", ""), given)


def resolve(spec: str, overrides: Mapping[str, Any]) -> config_dict.ConfigDict:
    """The config of 'resnet:20' with fields set otherwise, {'num_epochs': 2}; named, checked and locked.

    Raises:
        UserError: As `from_arguments`.
    """
    config = load(spec)
    config_lib.override(config, overrides)
    return finalize(config, spec)


def split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Takes --config (as '') and --config.<key> out of a command line.

    Returns:
        {'': 'mlp', 'seed': '1'} of --config=mlp --config.seed=1, and all other words.

    Raises:
        UserError: If a value is missing.
    """
    given, stray = {}, []
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag = re.fullmatch(r"--?(no)?config(?:\.([^=]+))?(?:=(.*))?", word, re.DOTALL)
        if not flag:
            stray.append(word)
            continue
        no, key, value = flag.groups()
        if value is None and words and not words[0].startswith("--") and not no:
            value = words.pop(0)
        if value is None and not key:
            raise UserError(f"--config is missing, as in --config=mlp; there are {', '.join(names())}.")
        given[key or ""] = value if value is not None else "false" if no else "true"
    return given, stray


def finalize(config: config_dict.ConfigDict, spec: str) -> config_dict.ConfigDict:
    """Names the config, checks it and locks it.

    The name is the config file's, its argument and every field that makes it another benchmark: 'resnet-20',
    'vgg_like+num_epochs=2'. Where a shipped config has the file's name, these are the fields that differ from it,
    set by a flag or in an edited copy of the file: a name that is published never stands for another config. What
    was changed in the shipped files themselves only the record's `git_dirty` tells.

    Raises:
        UserError: If a field has a value that no run can use.
    """
    place = find(spec)
    published = _published(place)
    own = flatten((published[1] if published else _load(place, spec)).to_dict())
    place = published[0] if published else place
    resolved = flatten(config.to_dict())
    changes = [
        # The colon of an import path becomes what no such path has, lest two of them make one entry.
        f"{key}={str(resolved.get(key, 'absent')).replace(':', '-')}"
        for key in sorted(resolved.keys() | own.keys())
        if key not in NOT_IN_ENTRY_NAME
        and (key not in resolved or key not in own or resolved[key] != own[key])
        and (key, resolved.get(key)) not in SAME_DATA
    ]
    entry = "+".join([place.entry, *(re.sub(r"[^A-Za-z0-9_.=-]", "_", change) for change in changes)])
    if len(entry) > LONGEST_ENTRY:
        digest = hashlib.sha256(entry.encode()).hexdigest()[:8]
        entry = f"{place.entry[:100]}+{len(changes)}_changes={digest}"
    with config.unlocked():
        config.entry = entry
        config.config_file = f"configs/{place.path.name}" if place.is_shipped else _shown(place.path)
    config_lib.check(config)
    config.lock()
    return config


def _published(place: Place) -> tuple[Place, config_dict.ConfigDict] | None:
    """The shipped config that has the name of `place`, if there is one: speedrun-94.py has that of speedrun:94."""
    for name in sorted(names(), key=len, reverse=True):
        if place.entry == name or place.entry.startswith(f"{name}-"):
            shipped = Place(CONFIGS / f"{name}.py", place.entry[len(name) + 1 :])
            try:
                return shipped, _load(shipped, name)
            except UserError:
                continue  # no such argument: the name is free
    return None


def seeds_of(recipe: Mapping[str, Any], num_seeds: int) -> list[int]:
    """The seeds that a recipe is to be run with, so that nobody chooses them: distinct, below 2**16.

    The i-th candidate, i = 0, 1, ..., is the first two bytes, big-endian, of the SHA-256 of "<JSON> <i>", where
    the JSON holds the fields that differ from their defaults, sorted, but for the seed, the dtype and where the
    data come from. A candidate that came before is passed over.

    Args:
        recipe: A config as records have it, nested.
        num_seeds: How many; a larger number begins with the same.
    """
    defaults = config_lib.complete({"stages": {name: {} for name in recipe.get("stages", {})}})
    own = {
        key: value
        for key, value in config_lib.complete(dict(recipe)).items()
        if key not in NOT_IN_ENTRY_NAME and (key, value) not in SAME_DATA and value != defaults.get(key)
    }
    text = json.dumps(own, sort_keys=True)
    seeds: dict[int, None] = {}
    for number in itertools.count():
        if len(seeds) == num_seeds:
            break
        digest = hashlib.sha256(f"{text} {number}".encode()).digest()
        seeds[int.from_bytes(digest[:2], "big")] = None
    return list(seeds)


def _shown(path: Path) -> str:
    absolute = path.resolve()
    return absolute.relative_to(REPOSITORY).as_posix() if absolute.is_relative_to(REPOSITORY) else absolute.name

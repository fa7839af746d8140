"""What is measured of throughput, section by section."""

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import config_dict

from fmbench import entries
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.records import calibration, machine
from fmbench.records.schema import Environment
from fmbench.system import interrupt, runtime
from fmbench.system.peers import say
from fmbench.throughput import layers
from fmbench.throughput.arms import choose_arms, environ_of
from fmbench.throughput.measurements import (
    Conditions,
    Dtype,
    Measurements,
    ModelThroughput,
    Profiles,
    Row,
    Sweep,
    better_ways,
)
from fmbench.throughput.race import Entrant, compare_nets, make_entrant, race, save_weights
from fmbench.throughput.workers import System, choose_systems, fresh_caches

BATCH_SIZE_CONFIGS = ("cnn1", "mlp")
BATCH_SIZES = (32, 64, 128, 256, 512, 1024, 2048)
DATASET_SIZE_CONFIG = "mlp"
COPIES = (1, 4, 16)
SEEDS_CONFIG = "configs/speedrun.py:94"
SEEDS = (1, 2, 5, 10, 20)

Result = TypeVar("Result")


def load_config(spec: str) -> config_dict.ConfigDict:
    """The named and checked config of 'configs/resnet.py:20'."""
    return entries.resolve(spec, {})


# Measuring.


class Setting(NamedTuple):
    """What all measurements of one call share."""

    conditions: Conditions
    scratch: Path
    environ: dict[str, str]  # of the workers

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        return self.conditions.environment.device_platform


def merge(
    measurements: Measurements,
    *,
    models: dict[str, ModelThroughput] | None = None,
    arms: dict[str, Sweep] | None = None,
    layers: dict[str, Profiles] | None = None,
    **sections: Any,
) -> Measurements:
    """The measurements with new sections, models, and arms and layers of models in the place of the old ones."""
    together = dict(sorted((measurements.models | (models or {})).items()))
    all_arms = dict(sorted((measurements.arms | (arms or {})).items()))
    all_layers = dict(sorted((measurements.layers | (layers or {})).items()))
    parts = {"models": together, "arms": all_arms, "layers": all_layers}
    return measurements.model_copy(update=parts | sections)


def prepare(scratch: Path, rounds: int, seconds: float) -> Setting:
    """Puts the train set where every worker can read it, and describes the machine.

    The workers get a cache of compiled programs of their own, empty at first.
    """
    dataset = fashion_mnist.load("tfds", None)
    np.save(scratch / "images.npy", dataset.train_images.reshape(len(dataset.train_images), -1))
    np.save(scratch / "labels.npy", dataset.train_labels.astype(np.int32))
    say("measuring what the machine reaches in matrix products and in memory")
    environment, reached = _in_fresh_process(describe_machine)
    conditions = Conditions(
        created=machine.now(),
        environment=environment,
        **reached._asdict(),
        rounds=rounds,
        seconds=seconds,
    )
    return Setting(conditions, scratch, fresh_caches(scratch / "cache"))


def _in_fresh_process(function: Callable[[], Result]) -> Result:
    """Calls a function where its threads and, on accelerators, its memory take nothing from the workers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with interrupt.blocked():  # Ctrl-C is for this process to answer
            future = pool.submit(function)
        return future.result()


def describe_machine() -> tuple[Environment, calibration.Calibration]:
    """The machine, and what it reaches."""
    runtime.find_devices()
    return machine.environment(), calibration.measure()


def now(conditions: Conditions) -> Conditions:
    return conditions.model_copy(update={"created": machine.now()})


# The sections.


def measure_model(
    run_config: config_dict.ConfigDict, spec: str, systems: Sequence[System], setting: Setting
) -> ModelThroughput:
    """Races the systems on one model; the first of them is the yardstick."""
    say(f"{run_config.entry}: {', '.join(system.title for system in systems)}")
    weights = setting.scratch / f"{run_config.entry}.npz"
    entrants = [
        make_entrant(system, run_config, spec, setting.scratch, setting.platform, weights=weights)
        for system in systems
    ]
    with contextlib.ExitStack() as stack:
        save_weights(systems[0], spec, weights, setting.environ)
        _start(entrants, [setting.environ] * len(entrants), stack)
        compare_nets(entrants)
        for entrant in entrants:
            entrant.time_compile(setting.environ)
        race(entrants, setting.conditions.rounds, setting.conditions.seconds, infer=True)
        rows = [entrant.finish() for entrant in entrants]
    return ModelThroughput(
        conditions=now(setting.conditions),
        config_file=run_config.config_file,
        batch_size=run_config.batch_size,
        infer_batch_size=run_config.eval_batch_size,
        flops_per_image=entrants[0].flops_per_image or None,  # 0 where XLA does not count
        rows=(better := better_ways(rows)),
        ways=rows if len(better) < len(rows) else [],
    )


def measure_batch_sizes(setting: Setting) -> Sweep:
    """Trains with other batch sizes, in fmbench."""
    rows = []
    for spec in BATCH_SIZE_CONFIGS:
        rows += _sweep(spec, setting, [{"batch_size": batch_size} for batch_size in BATCH_SIZES])
    return Sweep(conditions=now(setting.conditions), rows=rows)


def measure_dataset_sizes(setting: Setting) -> Sweep:
    """Trains with the train set several times in memory, in fmbench."""
    rows = _sweep(DATASET_SIZE_CONFIG, setting, [{"copies": copies} for copies in COPIES])
    return Sweep(conditions=now(setting.conditions), rows=rows)


def measure_seeds_together(setting: Setting) -> Sweep:
    """Trains several seeds in one program, in fmbench."""
    rows = _sweep(SEEDS_CONFIG, setting, [{"seeds": seeds} for seeds in SEEDS])
    return Sweep(conditions=now(setting.conditions), rows=rows)


def measure_arms(spec: str, setting: Setting) -> Sweep:
    """Trains a model in fmbench in several ways, each a process with an empty cache of compiled programs."""
    run_config = load_config(spec)
    arms = choose_arms(run_config)
    say(f"{run_config.entry}: {', '.join(arm.name for arm in arms)}")
    yardstick = choose_systems((), ())[0]
    entrants = [
        make_entrant(
            yardstick._replace(variant=arm.dtype, dtype=arm.dtype),
            run_config,
            spec,
            setting.scratch,
            setting.platform,
            steps_per_call=arm.steps_per_call,
            arm=arm.name,
            pipeline=arm.pipeline,
        )
        for arm in arms
    ]
    caches = tempfile.mkdtemp(dir=setting.scratch)
    environs = [environ_of(arm, fresh_caches(Path(caches, str(number)))) for number, arm in enumerate(arms)]
    with contextlib.ExitStack() as stack:
        _start(entrants, environs, stack)
        for entrant in entrants:
            entrant.row["compile_seconds_cold"] = entrant.compile()
        race(entrants, setting.conditions.rounds, setting.conditions.seconds, infer=False)
        rows = [entrant.finish() for entrant in entrants]
    return Sweep(conditions=now(setting.conditions), rows=rows)


def measure_layers(spec: str, dtypes: Sequence[Dtype], setting: Setting) -> Profiles | None:
    """Profiles a model's training step in fmbench; None where that fails, which ends nothing else."""
    run_config = load_config(spec)
    profiles = []
    for dtype in dtypes:
        say(f"{run_config.entry}: layers, {dtype}")
        try:
            profiles.append(layers.profile(spec, dtype, setting.environ))
        except UserError as error:
            say(str(error))
    if not profiles:
        return None
    return Profiles(conditions=now(setting.conditions), config_file=run_config.config_file, profiles=profiles)


def _start(entrants: list[Entrant], environs: list[dict[str, str]], stack: contextlib.ExitStack) -> None:
    """Starts all at once, to be stopped with the stack; they compile in turn, since libraries time choices."""
    for entrant in entrants:
        stack.callback(entrant.stop)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(Entrant.start, entrants, environs))


def _sweep(spec: str, setting: Setting, changes: list[dict[str, Any]]) -> list[Row]:
    run_config = load_config(spec)
    yardstick = choose_systems((), ())[0]
    say(f"{run_config.entry}: {', '.join(str(change) for change in changes)}")
    entrants = [
        make_entrant(yardstick, run_config, spec, setting.scratch, setting.platform, **change)
        for change in changes
    ]
    with contextlib.ExitStack() as stack:
        _start(entrants, [setting.environ] * len(entrants), stack)
        for entrant in entrants:
            entrant.compile()
        race(entrants, setting.conditions.rounds, setting.conditions.seconds, infer=False)
        return [entrant.finish() for entrant in entrants]

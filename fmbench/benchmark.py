"""Measures throughput: training and inference of each model, beside stock Flax and, if asked for, other peers.

    python -m fmbench.benchmark
    python -m fmbench.benchmark --peers=torch,keras --configs=configs/vgg_like.py --dtype=float32

Results go to <results_dir>/throughput.json as soon as they are complete, and are rendered to throughput.md. What
is measured again replaces its earlier measurement; models and sections that are not measured this time stay.
PyTorch and Keras need environments of their own, made by benchmarks/setup_peers.sh.

Exit codes: 0 done, 1 --check found a difference, 2 something given cannot be used, 130 interrupted.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from fmbench import config, datasets, results, throughput, throughput_page
from fmbench.errors import UserError
from fmbench.overheads import measure_overheads
from fmbench.race import compare_nets, make_entrant, race, save_weights
from fmbench.results import Environment
from fmbench.throughput import Conditions, Dtype, Measurements, ModelThroughput, Overheads, Row, Sweep
from fmbench.workers import DTYPES, PEERS, TIMEOUT, System, choose_systems, fresh_caches, interpreter, say

# One entry for each net of which some peer does the whole training step.
CONFIGS = (
    *(f"configs/{name}.py" for name in ("mlp", "baseline", "cnn1", "cnn2", "cnn3", "cnn4", "vgg_like")),
    "configs/fc.py:b",
    "configs/resnet.py:20-paper",
    "configs/speedrun.py:94",
)
BATCH_SIZE_CONFIGS = ("configs/cnn1.py", "configs/mlp.py")
BATCH_SIZES = (32, 64, 128, 256, 512, 1024, 2048)
DATASET_SIZE_CONFIG = "configs/mlp.py"
COPIES = (1, 4, 16)

SECTIONS = ("models", "overheads", "batch_sizes", "dataset_sizes")

Result = TypeVar("Result")


def main() -> None:
    arguments = _parse_arguments()
    try:
        if arguments.render or arguments.check:
            sys.exit(_render(arguments.results_dir, check=arguments.check))
        _measure(arguments)
    except UserError as error:
        print(f"fmbench.benchmark: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fmbench.benchmark: interrupted; what was complete is kept.", file=sys.stderr)
        sys.exit(130)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fmbench.benchmark",
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add_list(flag: str, default: Sequence[str], text: str) -> None:
        shown = f" (default: {','.join(default)})" if default else ""
        parser.add_argument(flag, type=_split, default=default, metavar="A,B", help=text + shown)

    add_list("--configs", CONFIGS, "config files of the section models, as fmbench.main takes them")
    add_list("--peers", (), f"further systems to measure, of {', '.join(PEERS)}; none by default")
    add_list("--dtype", DTYPES, "dtypes of the computation; fmbench in float32 is always measured")
    add_list("--sections", (), f"what to measure, of {', '.join(SECTIONS)}; all by default, with --json models")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="training time of each system per round; inference takes half (default: 2)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per model and system, and write no files"
    )
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--render", action="store_true", help="write throughput.md from throughput.json, and stop")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if throughput.md is not up to date, and stop"
    )
    return parser.parse_args()


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part for part in text.split(",") if part))


def _render(results_dir: Path, *, check: bool) -> int:
    """Writes throughput.md, or looks whether it is what it should be. Returns the exit code."""
    if not throughput.json_path(results_dir).exists():
        raise UserError(f"{throughput.json_path(results_dir)} does not exist; measure first.")
    measurements = throughput.read(results_dir)
    path = throughput_page.md_path(results_dir)
    if not check:
        throughput_page.write(measurements, results_dir)
        print(f"{path} is rendered.")
    elif not path.exists() or path.read_bytes() != throughput_page.render(measurements).encode():
        print(
            f"{path} is not what the measurements say; run python -m fmbench.benchmark --render.", file=sys.stderr
        )
        return 1
    else:
        print(f"{path} is what the measurements say.")
    return 0


# What to measure.


def _check_arguments(arguments: argparse.Namespace) -> None:
    for flag, allowed in {"peers": PEERS, "dtype": DTYPES, "sections": SECTIONS}.items():
        for value in getattr(arguments, flag):
            if value not in allowed:
                raise UserError(f"--{flag}={value}: there is no such choice; choose from {', '.join(allowed)}.")
    for flag in ("configs", "dtype"):
        if not getattr(arguments, flag):
            raise UserError(f"--{flag} is empty.")
    if arguments.rounds < 1:
        raise UserError(f"--rounds={arguments.rounds}: at least 1 is needed.")
    if not 0 < arguments.seconds < TIMEOUT / 2:
        raise UserError(f"--seconds={arguments.seconds}: choose more than 0 and less than {TIMEOUT / 2:.0f}.")
    if arguments.json and set(arguments.sections) - {"models"}:
        raise UserError("--json prints the section models only; drop --sections, or --json.")
    for peer in arguments.peers:
        python = interpreter(peer)
        if not python.exists():
            raise UserError(f"{peer} has no environment at {python}; run benchmarks/setup_peers.sh {peer}.")


def load_config(spec: str) -> config_dict.ConfigDict:
    """The named and checked config of 'configs/resnet.py:20'."""
    return config.finalize(config.load_file(spec), spec)


# Measuring.


class Setting(NamedTuple):
    """What all measurements of one call share."""

    conditions: Conditions
    scratch: Path
    environ: dict[str, str]  # of the workers


def _measure(arguments: argparse.Namespace) -> None:
    """Measures the sections that were asked for; each result is kept as soon as there is one."""
    _check_arguments(arguments)
    sections = arguments.sections or (("models",) if arguments.json else SECTIONS)
    configs = {spec: load_config(spec) for spec in arguments.configs}
    systems = choose_systems(arguments.peers, arguments.dtype)
    if not arguments.json:
        results.check_writable(arguments.results_dir)
        throughput.read(arguments.results_dir)

    def keep(**parts: Any) -> None:
        # Read again: hours may have passed, and another call may have written its part.
        measurements = throughput.read(arguments.results_dir)
        throughput_page.write(merge(measurements, **parts), arguments.results_dir)

    with tempfile.TemporaryDirectory(prefix="fmbench-benchmark-") as directory:
        setting = prepare(Path(directory), arguments.rounds, arguments.seconds)
        if "models" in sections:
            for spec, run_config in configs.items():
                measured = measure_model(run_config, spec, systems, setting)
                if arguments.json:
                    for row in measured.rows:
                        print(json.dumps(throughput.summary(measured, row)), flush=True)
                else:
                    keep(models={run_config.entry: measured})
        if "overheads" in sections:
            runs = measure_overheads(setting.scratch)
            keep(overheads=Overheads(conditions=_now(setting.conditions), runs=runs))
        if "batch_sizes" in sections:
            keep(batch_sizes=measure_batch_sizes(setting))
        if "dataset_sizes" in sections:
            keep(dataset_sizes=measure_dataset_sizes(setting))
    if not arguments.json:
        written = throughput.json_path(arguments.results_dir), throughput_page.md_path(arguments.results_dir)
        print(f"{', '.join(sections)}: {' and '.join(map(str, written))} are written.")


def merge(
    measurements: Measurements, *, models: dict[str, ModelThroughput] | None = None, **sections: Any
) -> Measurements:
    """The measurements with new sections and models in the place of the old ones."""
    together = dict(sorted((measurements.models | (models or {})).items()))
    return measurements.model_copy(update={"models": together, **sections})


def prepare(scratch: Path, rounds: int, seconds: float) -> Setting:
    """Puts the train set where every worker can read it, and describes the machine.

    The workers get a cache of compiled programs of their own, empty at first.
    """
    dataset = datasets.load("tfds", None)
    np.save(scratch / "images.npy", dataset.train_images.reshape(len(dataset.train_images), -1))
    np.save(scratch / "labels.npy", dataset.train_labels.astype(np.int32))
    say("measuring what the machine reaches in matrix products")
    environment, matmul = _in_fresh_process(describe_machine)
    conditions = Conditions(
        created=results.now(),
        environment=environment,
        matmul_flops_per_sec=matmul,
        rounds=rounds,
        seconds=seconds,
    )
    return Setting(conditions, scratch, fresh_caches(scratch / "cache"))


def _in_fresh_process(function: Callable[[], Result]) -> Result:
    """Calls a function where its threads and, on accelerators, its memory take nothing from the workers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def describe_machine() -> tuple[Environment, dict[Dtype, float]]:
    """The machine, and the FLOP/s of a 2048 x 2048 matrix product on all cores, for each dtype."""
    size, repetitions = 2048, 10
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)

    def flops_per_sec(x: Any, function: Any) -> float:
        function(x)
        seconds = []
        for _ in range(repetitions):
            start = time.perf_counter()
            function(x)
            seconds.append(time.perf_counter() - start)
        return 2 * size**3 / statistics.median(seconds)

    def on_device(dtype: Dtype) -> float:
        return flops_per_sec(jnp.asarray(matrix, dtype), lambda x: product(x).block_until_ready())

    # NumPy's BLAS may be faster than XLA.
    return results.environment(), {
        "float32": max(on_device("float32"), flops_per_sec(matrix, lambda x: x @ x)),
        "bfloat16": on_device("bfloat16"),
    }


def _now(conditions: Conditions) -> Conditions:
    return conditions.model_copy(update={"created": results.now()})


# The sections.


def measure_model(
    run_config: config_dict.ConfigDict, spec: str, systems: Sequence[System], setting: Setting
) -> ModelThroughput:
    """Races the systems on one model; the first of them is the yardstick."""
    say(f"{run_config.entry}: {', '.join(system.title for system in systems)}")
    weights = setting.scratch / f"{run_config.entry}.npz"
    entrants = [make_entrant(system, run_config, spec, setting.scratch, weights=weights) for system in systems]
    with contextlib.ExitStack() as stack:
        for entrant in entrants:
            stack.callback(entrant.stop)
        save_weights(systems[0], spec, weights, setting.environ)
        for entrant in entrants:
            entrant.start(setting.environ)
        compare_nets(entrants)
        for entrant in entrants:
            entrant.time_compile(setting.environ)
        race(entrants, setting.conditions.rounds, setting.conditions.seconds, infer=True)
        rows = [entrant.finish() for entrant in entrants]
    return ModelThroughput(
        conditions=_now(setting.conditions),
        config_file=run_config.config_file,
        batch_size=run_config.batch_size,
        infer_batch_size=run_config.eval_batch_size,
        flops_per_image=entrants[0].flops_per_image or None,  # 0 where XLA does not count
        rows=rows,
    )


def measure_batch_sizes(setting: Setting) -> Sweep:
    """Trains with other batch sizes, in fmbench."""
    rows = []
    for spec in BATCH_SIZE_CONFIGS:
        rows += _sweep(spec, setting, [{"batch_size": batch_size} for batch_size in BATCH_SIZES])
    return Sweep(conditions=_now(setting.conditions), rows=rows)


def measure_dataset_sizes(setting: Setting) -> Sweep:
    """Trains with the train set several times in memory, in fmbench."""
    rows = _sweep(DATASET_SIZE_CONFIG, setting, [{"copies": copies} for copies in COPIES])
    return Sweep(conditions=_now(setting.conditions), rows=rows)


def _sweep(spec: str, setting: Setting, changes: list[dict[str, Any]]) -> list[Row]:
    spec = str(config.REPOSITORY / spec)
    run_config = load_config(spec)
    yardstick = choose_systems((), ())[0]
    say(f"{run_config.entry}: {', '.join(str(change) for change in changes)}")
    entrants = [make_entrant(yardstick, run_config, spec, setting.scratch, **change) for change in changes]
    with contextlib.ExitStack() as stack:
        for entrant in entrants:
            stack.callback(entrant.stop)
            entrant.start(setting.environ)
            entrant.compile()
        race(entrants, setting.conditions.rounds, setting.conditions.seconds, infer=False)
        return [entrant.finish() for entrant in entrants]


if __name__ == "__main__":
    main()

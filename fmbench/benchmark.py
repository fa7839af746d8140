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
import dataclasses
import json
import multiprocessing
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict
from pydantic import BaseModel

from fmbench import config, datasets, results, throughput
from fmbench.errors import UserError
from fmbench.models import split_arguments
from fmbench.results import Environment
from fmbench.throughput import (
    CompileCache,
    Conditions,
    Dtype,
    Measurements,
    ModelThroughput,
    Overheads,
    Row,
    Run,
    Sweep,
)

BENCHMARKS = config.REPOSITORY / "benchmarks"
# One entry for each net of which some peer does the whole training step.
CONFIGS = (
    *(f"configs/{name}.py" for name in ("mlp", "fc:b", "baseline", "cnn1", "cnn2", "cnn3", "cnn4", "vgg_like")),
    "configs/resnet.py:20-paper",
    "configs/speedrun.py:94",
)
BATCH_SIZE_CONFIGS = ("configs/cnn1.py", "configs/mlp.py")
BATCH_SIZES = (32, 64, 128, 256, 512, 1024, 2048)
DATASET_SIZE_CONFIG = "configs/mlp.py"
COPIES = (1, 4, 16)

SECTIONS = ("models", "overheads", "batch_sizes", "dataset_sizes")
PEERS = ("torch", "keras")
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")

Result = TypeVar("Result")

TIMEOUT = 600.0  # seconds that a worker may take for an answer
PAUSE = 0.25  # seconds between two workers: the threads of some libraries spin for a while after their work
LOGITS = 64  # images on which the systems have to agree


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
    path = throughput.md_path(results_dir)
    if not check:
        throughput.write(measurements, results_dir)
        print(f"{path} is rendered.")
    elif not path.exists() or path.read_bytes() != throughput.render(measurements).encode():
        print(
            f"{path} is not what the measurements say; run python -m fmbench.benchmark --render.", file=sys.stderr
        )
        return 1
    else:
        print(f"{path} is what the measurements say.")
    return 0


# What to measure.


class System(NamedTuple):
    """One way of running a model: a worker of benchmarks/ and what to tell it."""

    name: str
    script: str
    peer: str  # whose environment it runs in; empty: this one
    variant: str
    dtype: Dtype
    keeps_compiled: bool  # for the next process

    @property
    def title(self) -> str:
        return f"{self.name} {self.dtype}"

    def command(self) -> list[str]:
        return [str(_python(self.peer)), str(BENCHMARKS / self.script)]


def choose_systems(peers: Sequence[str], dtypes: Sequence[Dtype]) -> list[System]:
    """The systems in the order of the table's rows; the first is the yardstick, fmbench in float32."""
    systems = []
    for dtype in DTYPES:
        systems.append(System("fmbench", "fmbench_itself.py", "", dtype, dtype, True))
        systems.append(System("stock Flax", "peer_flax.py", "", dtype, dtype, True))
        for mode in ("eager", "compile"):
            systems.append(System(f"PyTorch {mode}", "peer_torch.py", "torch", f"{mode}-{dtype}", dtype, False))
        systems.append(System("Keras", "peer_keras.py", "keras", dtype, dtype, False))
    yardstick = systems[0]
    return [yardstick] + [
        system for system in systems[1:] if system.dtype in dtypes and system.peer in ("", *peers)
    ]


def _python(peer: str) -> Path:
    """The interpreter of a peer's environment."""
    if not peer:
        return Path(sys.executable)
    return Path(os.environ.get("FMBENCH_PEERS_DIR") or BENCHMARKS).absolute() / f".venv-{peer}" / "bin" / "python"


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
        if not _python(peer).exists():
            raise UserError(f"{peer} has no environment at {_python(peer)}; run benchmarks/setup_peers.sh {peer}.")


def load_config(spec: str) -> config_dict.ConfigDict:
    """The named and checked config of 'configs/resnet.py:20'."""
    return config.finalize(config.load_file(spec), spec)


def _absolute(spec: str) -> str:
    """The same config for a process that may run elsewhere."""
    path, colon, arg = spec.partition(":")
    return f"{Path(path).absolute()}{colon}{arg}"


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
        throughput.write(merge(measurements, **parts), arguments.results_dir)

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
            keep(overheads=measure_overheads(setting))
        if "batch_sizes" in sections:
            keep(batch_sizes=measure_batch_sizes(setting))
        if "dataset_sizes" in sections:
            keep(dataset_sizes=measure_dataset_sizes(setting))
    if not arguments.json:
        written = throughput.json_path(arguments.results_dir), throughput.md_path(arguments.results_dir)
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
    _say("measuring what the machine reaches in matrix products")
    environment, matmul = _in_fresh_process(describe_machine)
    conditions = Conditions(
        created=results.now(),
        environment=environment,
        matmul_flops_per_sec=matmul,
        rounds=rounds,
        seconds=seconds,
    )
    return Setting(conditions, scratch, _fresh_caches(scratch / "cache"))


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


def _fresh_caches(directory: Path) -> dict[str, str]:
    """An environment whose data cache is ours, and whose caches of compiled programs are empty.

    In it Python finds this fmbench and no other that is installed; and glibc keeps freed memory, as an expert
    would have it for PyTorch and the others too (fmbench does so by itself, see runtime.py).
    """
    directory.mkdir()
    for path in datasets.cache_directory().absolute().iterdir():
        if path.name != "xla":
            (directory / path.name).symlink_to(path)
    return os.environ | {
        "PYTHONPATH": str(config.REPOSITORY),
        "FMBENCH_CACHE": str(directory),
        "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_TOP_PAD_": str(512 << 20),
    }


def _now(conditions: Conditions) -> Conditions:
    return conditions.model_copy(update={"created": results.now()})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# Workers: one process per system, spoken to in lines of JSON.


class WorkerError(Exception):
    """A worker that cannot go on; the message says why."""


class Ready(BaseModel):
    system: str
    versions: dict[str, str]
    num_params: int


class Logits(BaseModel):
    logits: list[list[float]]


class Compiled(BaseModel):
    compile_seconds: float
    flops_per_image: float | None


class Work(BaseModel):
    images: int
    seconds: float
    core_seconds: float


class Memory(BaseModel):
    peak_memory_bytes: int


Answer = TypeVar("Answer", bound=BaseModel)


class Worker:
    """A process that answers each line of JSON with one line of JSON."""

    def __init__(self, command: list[str], environ: dict[str, str]):
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `kill`)
        # A session of its own: Ctrl-C is ours to handle, and its children can be killed with it.
        self.process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            start_new_session=True,
        )
        self.lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(b"")

    def ask(self, message: dict[str, Any], answer: type[Answer]) -> Answer:
        """Sends a message and waits for the answer.

        Raises:
            WorkerError: If the worker reports an error, dies, answers something else or not within `TIMEOUT`.
        """
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it is dead, and its last words say more
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=TIMEOUT)
        except queue.Empty:
            raise WorkerError(f"no answer to '{message.get('do', 'job')}' within {TIMEOUT:g} s") from None
        if not line:
            raise WorkerError(self._last_words())
        try:
            content = json.loads(line)
            if isinstance(content, dict) and "error" in content:
                raise WorkerError(str(content["error"]))
            return answer.model_validate(content)
        except ValueError as error:  # no JSON, or not what was asked for
            raise WorkerError(f"answered {line[:80].decode(errors='replace').strip()!r}") from error

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        self.stderr.seek(0)
        last = _last_line(self.stderr.read().decode(errors="replace"))
        return f"ended with exit code {self.process.returncode}: {last[:200]}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stderr.close()


@dataclasses.dataclass
class Entrant:
    """A system in a race: its worker, and the fields of its row as far as they are known."""

    system: System
    job: dict[str, Any]
    row: dict[str, Any]
    worker: Worker | None = None
    failure: str | None = None
    flops_per_image: float | None = None

    def start(self, environ: dict[str, str]) -> None:
        if self.failure is None:
            self.worker = Worker(self.system.command(), environ)
            if ready := self.ask(self.job, Ready):
                self.row |= {
                    "description": ready.system,
                    "versions": ready.versions,
                    "num_params": ready.num_params,
                }

    def ask(self, message: dict[str, Any], answer: type[Answer]) -> Answer | None:
        """The worker's answer, or None if it fails now or failed before."""
        if self.worker is None:
            return None
        try:
            return self.worker.ask(message, answer)
        except WorkerError as error:
            self.fail(str(error))
            return None

    def fail(self, reason: str) -> None:
        """Takes it out of the race; the first reason counts."""
        if self.failure is None:
            self.failure = " ".join(reason.split())
            _say(f"{self.row['model']}: {self.system.title} failed: {self.failure}")
        self.stop()

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker = None

    def compile(self) -> float | None:
        """Compiles and warms up. Returns the seconds that took, if it could."""
        compiled = self.ask({"do": "compile"}, Compiled)
        if compiled is None:
            return None
        self.flops_per_image = compiled.flops_per_image
        return compiled.compile_seconds

    def time_compile(self, environ: dict[str, str]) -> None:
        """Compiles; a system that keeps compiled programs does so in another process first, to be timed cold."""
        if self.system.keeps_compiled and self.failure is None:
            first = Entrant(self.system, self.job, dict(self.row))
            try:
                first.start(environ)
                self.row["compile_seconds_cold"] = first.compile()
            finally:
                first.stop()
            self.row["compile_seconds_warm"] = self.compile()
        else:
            self.row["compile_seconds_cold"] = self.compile()

    def train(self, seconds: float) -> None:
        if work := self._work("train", seconds):
            self._note("train_images_per_sec", work.images / work.seconds)
            self._note("train_core_seconds_per_1000", 1000 * work.core_seconds / work.images)

    def infer(self, seconds: float) -> None:
        if work := self._work("infer", seconds):
            self._note("infer_images_per_sec", work.images / work.seconds)

    def _work(self, do: str, seconds: float) -> Work | None:
        if self.worker is not None:
            time.sleep(PAUSE)
        return self.ask({"do": do, "seconds": seconds}, Work)

    def _note(self, field: str, number: float) -> None:
        self.row.setdefault(field, []).append(number)

    def finish(self) -> Row:
        """Asks for the peak memory, stops the worker and makes the row."""
        if memory := self.ask({"do": "memory"}, Memory):
            self.row["peak_memory_bytes"] = memory.peak_memory_bytes
        self.stop()
        if self.failure is not None:
            measured = ("train_images_per_sec", "train_core_seconds_per_1000", "infer_images_per_sec")
            self.row = {field: value for field, value in self.row.items() if field not in measured}
        return Row(**self.row, failure=self.failure)


def make_entrant(
    system: System,
    run_config: config_dict.ConfigDict,
    spec: str,
    scratch: Path,
    *,
    batch_size: int | None = None,
    copies: int = 1,
    weights: Path | None = None,
) -> Entrant:
    """Describes the model, the data and the optimizer of a config to a system."""
    batch_size = batch_size or run_config.batch_size
    name, model_arguments = split_arguments(run_config.model.to_dict())
    job = {
        "model": name,
        "arguments": model_arguments,
        "config": _absolute(spec),
        "variant": system.variant,
        "dtype": system.dtype,
        "batch_size": batch_size,
        "infer_batch_size": run_config.eval_batch_size,
        "normalization": run_config.data.normalization,
        "optimizer": run_config.optimizer.to_dict(),
        "train_images": str(scratch / "images.npy"),
        "train_labels": str(scratch / "labels.npy"),
        "weights": str(weights) if weights else None,
        "copies": copies,
        "label_smoothing": run_config.label_smoothing,
        "ema_decay": run_config.ema_decay,
        "grad_clip_norm": run_config.grad_clip_norm,
        "augment": config.stages(run_config)[0].augment,
        "selection": run_config.selection.to_dict(),
    }
    row = {
        "model": run_config.entry,
        "system": system.name,
        "dtype": system.dtype,
        "batch_size": batch_size,
        "copies": copies,
    }
    return Entrant(system, job, row)


def race(entrants: list[Entrant], setting: Setting, *, infer: bool) -> None:
    """Lets compiled systems train, and classify, in turn.

    So what disturbs the machine for a while disturbs all alike; and each is first, second, ... in some round.
    """
    rounds, seconds = setting.conditions.rounds, setting.conditions.seconds
    for done in range(rounds):
        first = done % len(entrants)
        order = entrants[first:] + entrants[:first]
        for entrant in order:
            entrant.train(seconds)
        for entrant in order if infer else []:
            entrant.infer(seconds / 2)
        if speeds := [f"{entrant.row['train_images_per_sec'][-1]:,.0f}" for entrant in entrants if entrant.worker]:
            _say(f"{entrants[0].row['model']}: round {done + 1} of {rounds}: {', '.join(speeds)} images/s")


# The sections.


def measure_model(
    run_config: config_dict.ConfigDict, spec: str, systems: Sequence[System], setting: Setting
) -> ModelThroughput:
    """Races the systems on one model; the first of them is the yardstick."""
    _say(f"{run_config.entry}: {', '.join(system.title for system in systems)}")
    weights = setting.scratch / f"{run_config.entry}.npz"
    entrants = [make_entrant(system, run_config, spec, setting.scratch, weights=weights) for system in systems]
    with contextlib.ExitStack() as stack:
        for entrant in entrants:
            stack.callback(entrant.stop)
        _save_weights(systems[0], spec, weights, setting.environ)
        for entrant in entrants:
            entrant.start(setting.environ)
        compare_nets(entrants)
        for entrant in entrants:
            entrant.time_compile(setting.environ)
        race(entrants, setting, infer=True)
        rows = [entrant.finish() for entrant in entrants]
    return ModelThroughput(
        conditions=_now(setting.conditions),
        config_file=run_config.config_file,
        batch_size=run_config.batch_size,
        infer_batch_size=run_config.eval_batch_size,
        flops_per_image=entrants[0].flops_per_image or None,  # 0 where XLA does not count
        rows=rows,
    )


def _save_weights(yardstick: System, spec: str, weights: Path, environ: dict[str, str]) -> None:
    """Has fmbench write the weights that all start from."""
    command = [*yardstick.command(), "weights", _absolute(spec), str(weights)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{spec}: no weights to start from: {_last_line(done.stderr)}.")


def compare_nets(entrants: list[Entrant]) -> None:
    """Takes out whoever has another net than the first: in the number of parameters, or in what it computes."""
    logits = [_logits(entrant) for entrant in entrants]
    yardstick = entrants[0]
    for entrant, own in zip(entrants[1:], logits[1:], strict=True):
        if logits[0] is None:
            entrant.fail(f"nothing to compare it with: {yardstick.system.title} failed")
        elif own is not None:
            _compare_net(entrant, own, yardstick, logits[0])


def _logits(entrant: Entrant) -> np.ndarray | None:
    answer = entrant.ask({"do": "logits", "count": LOGITS}, Logits)
    if answer is None:
        return None
    try:
        logits = np.array(answer.logits)
    except ValueError:  # rows of different lengths
        logits = np.zeros(0)
    if logits.shape != (LOGITS, 10) or not np.isfinite(logits).all():
        entrant.fail(f"its logits are not {LOGITS} x 10 finite numbers")
        return None
    return logits


def _compare_net(entrant: Entrant, own: np.ndarray, yardstick: Entrant, expected: np.ndarray) -> None:
    num_params = entrant.row["num_params"], yardstick.row["num_params"]
    difference = np.abs(own - expected)
    entrant.row["max_logit_difference"] = float(difference.max())
    if entrant.system.dtype == "float32":
        tolerance = 1e-3 + 1e-3 * np.abs(expected)
    else:  # eight bits of mantissa, through all layers
        tolerance = np.full_like(expected, 0.1 * np.ptp(expected))
    if num_params[0] != num_params[1]:
        entrant.fail(f"another net: {num_params[0]:,} parameters, fmbench has {num_params[1]:,}")
    elif (difference > tolerance).any():
        entrant.fail(f"another net: its logits differ from fmbench's by up to {difference.max():.2g}")


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
    _say(f"{run_config.entry}: {', '.join(str(change) for change in changes)}")
    entrants = [make_entrant(yardstick, run_config, spec, setting.scratch, **change) for change in changes]
    with contextlib.ExitStack() as stack:
        for entrant in entrants:
            stack.callback(entrant.stop)
            entrant.start(setting.environ)
            entrant.compile()
        race(entrants, setting, infer=False)
        return [entrant.finish() for entrant in entrants]


def measure_overheads(setting: Setting) -> Overheads:
    """Whole runs of fmbench.main, with cold and with warm compile caches."""
    environ = _fresh_caches(setting.scratch / "overheads-cache")
    runs = [
        _run_main("mlp", 5, "cold", setting.scratch, environ),
        _run_main("mlp", 5, "warm", setting.scratch, environ),
    ]
    _fill_compile_cache("vgg_like", 1, setting.scratch, environ)
    runs.append(_run_main("vgg_like", 1, "warm", setting.scratch, environ))
    return Overheads(conditions=_now(setting.conditions), runs=runs)


def _main_command(name: str, num_epochs: int, directory: Path) -> list[str]:
    """A run of fmbench.main that keeps all it writes in `directory`."""
    return [
        *(sys.executable, "-m", "fmbench.main"),
        f"--config={config.REPOSITORY / 'configs' / name}.py",
        f"--config.num_epochs={num_epochs}",
        f"--workdir={directory / 'workdir'}",
        f"--results_dir={directory / 'results'}",
    ]


def _run_main(
    name: str, num_epochs: int, compile_cache: CompileCache, scratch: Path, environ: dict[str, str]
) -> Run:
    _say(f"overheads: {name}, {num_epochs} epochs, {compile_cache} compile cache")
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        command = _main_command(name, num_epochs, Path(directory))
        start = time.perf_counter()
        done = subprocess.run(command, env=environ, cwd=config.REPOSITORY, capture_output=True, text=True)
        process_seconds = time.perf_counter() - start
        if done.returncode != 0:
            raise UserError(f"{' '.join(command)} failed: {_last_line(done.stderr)}")
        (record,) = results.read_all(Path(directory) / "results").values()
    return Run(
        entry=name,
        num_epochs=num_epochs,
        compile_cache=compile_cache,
        process_seconds=process_seconds,
        first_step_seconds=getattr(record, "first_step_seconds", None),
        wall_seconds=record.wall_seconds,
        train_seconds=record.train_seconds,
        eval_seconds=record.eval_seconds,
        checkpoint_seconds=record.checkpoint_seconds,
        compile_seconds=record.compile_seconds,
        setup_seconds=record.setup_seconds,
    )


def _fill_compile_cache(name: str, num_epochs: int, scratch: Path, environ: dict[str, str]) -> None:
    """Starts a run and, when it has compiled, stops it as Ctrl-C would: a whole one would take minutes."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        command = _main_command(name, num_epochs, Path(directory))
        with subprocess.Popen(
            command,
            env=environ,
            cwd=config.REPOSITORY,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stderr
            try:
                lines = []
                for line in process.stderr:
                    lines.append(line)
                    if "trainable parameters" in line:  # what is said when training begins
                        process.terminate()
                returncode = process.wait()
            except BaseException:
                process.kill()
                raise
    if returncode != 130:
        raise UserError(f"{' '.join(command)} could not be interrupted: {_last_line(''.join(lines))}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


if __name__ == "__main__":
    main()

"""The worker's side of the protocol between `python -m fmbench.benchmark` and one system under test.

A worker is a process of its own, in the environment of its library:

    <python> benchmarks/peer_torch.py

Standard input and output carry one JSON object a line. The first line in is the job (`Job`); its answer, when the
system is built and holds the given weights, is

    {"ready": true, "system": "...", "versions": {...}, "num_params": n, "num_trainable_params": n,
     "bytes_per_image": n or null}

Then every line in is a command and is answered by one line:

    {"do": "logits", "count": 64}   {"logits": [[10 numbers] ...]}: of the first train images, in evaluation mode
    {"do": "compile"}               {"compile_seconds": s, "flops_per_image": n or null}: compiles and warms up
    {"do": "train", "seconds": 2}   {"images": n, "seconds": s, "core_seconds": s}: real steps for at least so long
    {"do": "infer", "seconds": 1, "batch_size": 32}   the same, of forward passes on so many images each
    {"do": "memory"}                {"peak_memory_bytes": n}
    {"do": "quit"}, or no line      none: the worker ends with exit code 0

Whatever fails is answered by {"error": "one line"}, and the worker ends with exit code 1. Standard error is free.

A worker's script offers its `System` with these lines, the first of them before it imports its library:

    import protocol

    if __name__ == "__main__":
        ANSWERS = protocol.claim_stdout()
    ...
    if __name__ == "__main__":
        sys.exit(protocol.serve(make_system, sys.stdin, ANSWERS))

This module needs no more than NumPy, so that it runs in every environment.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import platform
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np


class RefusalError(ValueError):
    """What a system does not do, in words for the table: no name of an error precedes them."""


CALLS_IN_FLIGHT = 2  # how far the host runs ahead of the device, as in training
WARM_UP_CALLS = 2
SEED = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What the parent asks of a worker."""

    model: str  # a key of fmbench.models.MODELS
    arguments: dict[str, Any]  # of the model
    config: str  # as fmbench.entries.load takes it; for fmbench's own worker
    variant: str  # a way of running the system; each worker has its own
    dtype: str  # float32 or bfloat16, of the computation
    batch_size: int
    infer_batch_size: int
    normalization: str  # unit, symmetric or standard
    optimizer: dict[str, Any]  # the fields of fmbench's config.optimizer
    train_images: str  # .npy, uint8 (n, 784)
    train_labels: str  # .npy, int32 (n,)
    weights: str | None = None  # .npz, by dotted path, shaped as in Flax; None: the system's own initial values
    copies: int = 1  # of the train set, in a row
    platform: str = "cpu"  # what to run on: cpu or gpu
    # For fmbench's own worker: how many updates a call does, 0 for its default; how many seeds train together;
    # where the images are, resident on the device or read from disk by grain.
    steps_per_call: int = 0
    seeds: int = 1
    pipeline: str = "resident"
    # What else a training step does: the fields of fmbench's config, `augment` that of the first stage.
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    grad_clip_norm: float = 0.0
    augment: dict[str, Any] = dataclasses.field(default_factory=dict)
    selection: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check_variant(self, *variants: str) -> None:
        """Refuses a variant that the system does not have.

        Raises:
            RefusalError: If it is none of `variants`, or not of the job's dtype.
        """
        if self.variant not in variants or not self.variant.endswith(self.dtype):
            raise RefusalError(
                f"variant '{self.variant}' with {self.dtype}: expected one of {', '.join(variants)}"
            )

    def check_step(self, *abilities: str) -> None:
        """Refuses a step of which the system would leave something out, and so do less work than fmbench.

        Args:
            abilities: What the system does of label_smoothing, ema_decay, grad_clip_norm, selection (it keeps the
                last loss of each row), keep_norm and the augmentations, as flip.

        Raises:
            RefusalError: If the job asks for more.
        """
        asked = {
            "label_smoothing": self.label_smoothing,
            "ema_decay": self.ema_decay,
            "grad_clip_norm": self.grad_clip_norm,
            "selection": self.selection.get("easy"),
            "keep_norm": self.optimizer["keep_norm"],
            **self.augment,
        }
        if missing := [name for name, strength in asked.items() if strength and name not in abilities]:
            raise RefusalError(f"does not do {', '.join(missing).replace('_', ' ')}")

    def load_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The train set: uint8 (copies * n, 784) and int32 (copies * n,)."""
        images = np.load(self.train_images, mmap_mode="r")
        labels = np.load(self.train_labels, mmap_mode="r")
        return np.tile(images.reshape(len(images), -1), (self.copies, 1)), np.tile(labels, self.copies)

    def load_weights(self) -> dict[str, np.ndarray] | None:
        """The given weights by dotted path, as in 'blocks.0.conv1.kernel'."""
        if self.weights is None:
            return None
        with np.load(self.weights) as file:
            return dict(file)


class System(Protocol):
    """What is measured: a network with its optimizer and its data, in one library."""

    name: str  # with version and settings, for the table
    versions: dict[str, str]
    num_params: int  # with batch-norm statistics
    num_trainable_params: int
    bytes_per_image: float | None  # the least memory traffic of a training step, where the system counts it

    def logits(self, count: int) -> np.ndarray:
        """Logits (count, 10) of the first train images, in evaluation mode."""

    def compile(self) -> float | None:
        """Does what precedes the steady state of training and inference.

        Returns:
            FLOPs of a train step per image, where the library counts them.
        """

    def train_step(self) -> tuple[int, Any]:
        """Starts the next update, on the next shuffled batch.

        Returns:
            Number of images, and what `wait` takes.
        """

    def infer_step(self, batch_size: int) -> tuple[int, Any]:
        """Starts the prediction of the classes of the next images; returns as `train_step`.

        What a batch size needs that `compile` did not prepare is prepared by its first steps.
        """

    def wait(self, started: Any) -> None:
        """Returns when a started step is done."""

    def peak_memory_bytes(self) -> int:
        """The most memory held at any time: the accelerator's or, on CPUs, `process_peak_memory_bytes`."""


# ---------------------------------------------------------------------------- for the systems


# fmbench.input_pipeline.normalize(x) is x / 255 * scale + shift.
_NORMALIZATIONS = {
    "unit": (1.0, 0.0),
    "symmetric": (2.0, -1.0),
    "standard": (1 / 0.35302, -0.28604 / 0.35302),
}


def normalization_constants(normalization: str) -> tuple[float, float]:
    """(scale, shift): a pixel becomes pixel * scale + shift."""
    scale, shift = _NORMALIZATIONS[normalization]
    return scale / 255, shift


def check_weights(weights: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuses weights that are not those of the net.

    Args:
        weights: As given, by dotted path.
        shapes: What the system expects, in the same form.

    Raises:
        RefusalError: If names or shapes differ.
    """
    given = {name: array.shape for name, array in weights.items()}
    if wrong := sorted(name for name in given | shapes if given.get(name) != shapes.get(name)):
        name = wrong[0]
        raise RefusalError(f"weights do not fit: {name} is {given.get(name)}, expected {shapes.get(name)}")


def shuffled_batches(num_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """Indices of training batches, int32 (batch_size,), for ever: every epoch in a fresh order."""
    if batch_size > num_rows:
        raise RefusalError(f"batch_size is {batch_size}, but the train set has only {num_rows} images")
    rng = np.random.default_rng(SEED)
    while True:
        order = rng.permutation(num_rows).astype(np.int32)
        for start in range(0, num_rows - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def consecutive_batches(num_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """Indices of inference batches, int32 (batch_size,), for ever: row after row, round and round."""
    for start in itertools.count(0, batch_size):
        yield (np.arange(start, start + batch_size) % num_rows).astype(np.int32)


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------- the conversation


def claim_stdout() -> TextIO:
    """Keeps standard output for the answers; what anyone else prints there goes to standard error."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def serve(make_system: Callable[[Job], System], requests: Iterable[str], answers: TextIO) -> int:
    """Answers requests to their end.

    Args:
        make_system: Builds the system a job asks for.
        requests: Lines from the parent.
        answers: From `claim_stdout`.

    Returns:
        The exit code.
    """

    def answer(fields: dict[str, Any]) -> None:
        print(json.dumps(fields, allow_nan=False), file=answers, flush=True)

    worker = None
    try:
        for line in requests:
            request = json.loads(line)
            if worker is None:
                job = Job(**request)
                worker = Worker(make_system(job), job.infer_batch_size)
                answer(worker.ready())
            elif request == {"do": "quit"}:
                return 0
            else:
                answer(worker.obey(**request))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever a library raises, the parent is told
        traceback.print_exc()
        answer({"error": one_line(error)})
        return 1
    return 0


def one_line(error: Exception) -> str:
    """'KeyError: what is wrong', however many lines the message has."""
    text = " ".join(
        (str(error) if isinstance(error, RefusalError) else f"{type(error).__name__}: {error}").split()
    )
    return text if len(text) <= 500 else text[:500] + " ..."


class Worker:
    """Carries out commands on a system."""

    def __init__(self, system: System, infer_batch_size: int):
        self.system = system
        self.infer_batch_size = infer_batch_size
        self.is_warm = False

    def ready(self) -> dict[str, Any]:
        """What the parent learns first."""
        return {
            "ready": True,
            "system": self.system.name,
            "versions": self.system.versions | {"python": platform.python_version()},
            "num_params": self.system.num_params,
            "num_trainable_params": self.system.num_trainable_params,
            "bytes_per_image": self.system.bytes_per_image,
        }

    def obey(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Carries out one command; returns its answer."""
        match do:
            case "logits":
                return {"logits": np.asarray(self.system.logits(**arguments), np.float64).tolist()}
            case "compile":
                return self.compile()
            case "train" | "infer" if not self.is_warm:
                raise ValueError(f"'{do}' comes before 'compile'")
            case "train":
                return self.measure(self.system.train_step, **arguments)
            case "infer":
                step = functools.partial(self.system.infer_step, arguments["batch_size"])
                return self.measure(step, arguments["seconds"])
            case "memory":
                return {"peak_memory_bytes": self.system.peak_memory_bytes()}
        raise ValueError(f"unknown command '{do}'")

    def compile(self) -> dict[str, Any]:
        """Compiles on the clock, then warms up off it."""
        start = time.perf_counter()
        flops = self.system.compile()
        seconds = time.perf_counter() - start
        self.warm_up(self.system.train_step)
        self.warm_up(functools.partial(self.system.infer_step, self.infer_batch_size))
        self.is_warm = True
        return {"compile_seconds": seconds, "flops_per_image": flops}

    def warm_up(self, step: Callable[[], tuple[int, Any]]) -> None:
        for _ in range(WARM_UP_CALLS):
            self.system.wait(step()[1])

    def measure(self, step: Callable[[], tuple[int, Any]], seconds: float) -> dict[str, Any]:
        """Does whole steps until at least so many seconds are over.

        Some more come before, off the clock: a batch size may be new, and the memory of a process that waited
        while others had their turn is slow to come back. Core-seconds are the processor time of all threads
        of this process.
        """
        self.warm_up(step)
        images = 0
        started: collections.deque[Any] = collections.deque()
        start, core_start = time.perf_counter(), time.process_time()
        while not images or time.perf_counter() - start < seconds:
            size, handle = step()
            images += size
            started.append(handle)
            if len(started) > CALLS_IN_FLIGHT:
                self.system.wait(started.popleft())
        for handle in started:
            self.system.wait(handle)
        return {
            "images": images,
            "seconds": time.perf_counter() - start,
            "core_seconds": time.process_time() - core_start,
        }


def process_peak_memory_bytes() -> int:
    """The most memory this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss is inherited from the parent, which may have been larger
        (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(kilobytes) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

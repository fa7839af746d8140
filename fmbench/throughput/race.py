"""A race: systems that have proved to be the same net train and classify in turn."""

import dataclasses
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import config_dict

from fmbench import config
from fmbench.errors import UserError
from fmbench.models import split_arguments
from fmbench.system.peers import last_line, say
from fmbench.throughput.measurements import Row
from fmbench.throughput.workers import (
    Answer,
    Compiled,
    Logits,
    Memory,
    Ready,
    System,
    Work,
    Worker,
    WorkerError,
)

PAUSE = 0.25  # seconds between two workers: the threads of some libraries spin for a while after their work
SMALL_BATCH_SIZES = (1, 32)  # of inference, beside the model's own
LOGITS = 64  # images on which the systems have to agree


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
            self.worker = Worker(self.system.command(), self.system.environ(environ))
            if ready := self.ask(self.job, Ready):
                self.row |= {
                    "description": ready.system,
                    "versions": ready.versions,
                    "num_params": ready.num_params,
                    "bytes_per_image": ready.bytes_per_image,
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
            say(f"{self.row['model']}: {self.system.title} failed: {self.failure}")
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
        self._pause()
        if work := self.ask({"do": "train", "seconds": seconds}, Work):
            self._note("train_images_per_sec", work.images / work.seconds)
            self._note("train_core_seconds_per_1000", 1000 * work.core_seconds / work.images)

    def infer(self, seconds: float) -> None:
        """In batches of the model's size for so long, and of each small one for a quarter of that."""
        self._pause()
        size = self.job["infer_batch_size"]
        if work := self.ask({"do": "infer", "seconds": seconds, "batch_size": size}, Work):
            self._note("infer_images_per_sec", work.images / work.seconds)
        for size in SMALL_BATCH_SIZES:
            if work := self.ask({"do": "infer", "seconds": seconds / 4, "batch_size": size}, Work):
                speeds = self.row.setdefault("small_infer_images_per_sec", {})
                speeds.setdefault(size, []).append(work.images / work.seconds)

    def _pause(self) -> None:
        if self.worker is not None:
            time.sleep(PAUSE)

    def _note(self, field: str, number: float) -> None:
        self.row.setdefault(field, []).append(number)

    def finish(self) -> Row:
        """Asks for the peak memory, stops the worker and makes the row."""
        if memory := self.ask({"do": "memory"}, Memory):
            self.row["peak_memory_bytes"] = memory.peak_memory_bytes
        self.stop()
        if self.failure is not None:
            measured = (
                *("train_images_per_sec", "train_core_seconds_per_1000"),
                *("infer_images_per_sec", "small_infer_images_per_sec"),
            )
            self.row = {field: value for field, value in self.row.items() if field not in measured}
        return Row(**self.row, failure=self.failure)


def make_entrant(
    system: System,
    run_config: config_dict.ConfigDict,
    spec: str,
    scratch: Path,
    platform: str,
    *,
    batch_size: int | None = None,
    copies: int = 1,
    seeds: int = 1,
    steps_per_call: int = 0,
    arm: str = "",
    pipeline: str = "resident",
    weights: Path | None = None,
) -> Entrant:
    """Describes the model, the data, the optimizer and the kind of device to a system."""
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
        "platform": platform,
        "steps_per_call": steps_per_call,
        "pipeline": pipeline,
        "seeds": seeds,
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
        "seeds": seeds,
        "arm": arm,
        "wait_policy": system.wait_policy,
    }
    return Entrant(system, job, row)


def save_weights(yardstick: System, spec: str, weights: Path, environ: dict[str, str]) -> None:
    """Has fmbench write the weights that all start from."""
    command = [*yardstick.command(), "weights", _absolute(spec), str(weights)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{spec}: no weights to start from: {last_line(done.stderr)}.")


def _absolute(spec: str) -> str:
    """The same config for a process that may run elsewhere."""
    path, colon, arg = spec.partition(":")
    return f"{Path(path).absolute()}{colon}{arg}"


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


def race(entrants: list[Entrant], rounds: int, seconds: float, *, infer: bool) -> None:
    """Lets compiled systems train for some seconds, and classify for half as long, in turn.

    So what disturbs the machine for a while disturbs all alike; and each is first, second, ... in some round.
    """
    for done in range(rounds):
        first = done % len(entrants)
        order = entrants[first:] + entrants[:first]
        for entrant in order:
            entrant.train(seconds)
        for entrant in order if infer else []:
            entrant.infer(seconds / 2)
        if speeds := [f"{entrant.row['train_images_per_sec'][-1]:,.0f}" for entrant in entrants if entrant.worker]:
            say(f"{entrants[0].row['model']}: round {done + 1} of {rounds}: {', '.join(speeds)} images/s")

"""A whole run, top to bottom: set up, compile, restore, train, evaluate, export, record."""

import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import config_dict

from fmbench import config as config_lib
from fmbench import layers
from fmbench.models import exported
from fmbench.records import machine, store
from fmbench.records.schema import RunRecord, Status
from fmbench.system.interrupt import StopRequest, stop_on_signals
from fmbench.system.timing import Stopwatch, seconds_since_process_start
from fmbench.training import input_pipeline, parallel, selection, steps, workdir
from fmbench.training.checkpoint import Checkpoints
from fmbench.training.optimizer import make_optimizer
from fmbench.training.record import Diary, is_finite, make_record
from fmbench.training.reporting import MetricWriter, Progress
from fmbench.training.steps import Evaluation, Program, TrainState

CALLS_IN_FLIGHT = 2  # how far the host runs ahead of the devices, and how late a signal is answered


def train_and_evaluate(
    config: config_dict.ConfigDict, directory: Path, *, results_dir: Path, force: bool = False
) -> RunRecord:
    """Trains, evaluates and leaves a record, or goes on where an earlier call stopped.

    Args:
        config: From `fmbench.entries.finalize`.
        directory: The work directory: checkpoints, metrics, the exported model and a copy of the record.
        results_dir: The record and its predictions go to <results_dir>/runs.
        force: Start anew, throwing away what `directory` holds.

    Returns:
        The record, with status 'completed', 'interrupted' (by SIGINT or SIGTERM; resumable) or 'diverged'.

    Raises:
        UserError: If something that was given cannot be used.
    """
    store.check_writable(results_dir)
    with (
        workdir.claim(directory, config_lib.to_json(config), force=force),
        stop_on_signals() as stop,
    ):
        if workdir.is_finished(directory):
            print(f"{config.entry} seed {config.seed}: already finished in {directory}; --force trains it anew.")
        else:
            record, predictions = _run(config, directory, stop)
            store.write(record, predictions, directory / "record")
        return store.publish(directory / "record", results_dir, data_dir=config.data.dir)


def _run(
    config: config_dict.ConfigDict, directory: Path, stop: StopRequest
) -> tuple[RunRecord, np.ndarray | None]:
    began = time.perf_counter()
    stopwatch = Stopwatch()
    plan, state = _prepare(config, directory, stopwatch)

    # Restore. All randomness comes from the seed and the step: the state is all there is to a run.
    with stopwatch("setup"):
        checkpoints = Checkpoints(directory / "checkpoints")
        state, diary = _restore(checkpoints, state, stopwatch)
        began -= stopwatch.seconds["wall"]
        step = int(state.step)
        writer = MetricWriter(directory, step)
    display = Progress(num_steps=plan.num_steps, first_step=step, batch_size=config.batch_size)
    display.line(_first_line(config, plan, state))
    if diary.num_resumes:
        display.line(f"resumed from {directory} after step {step} of {plan.num_steps}")

    # Train.
    status: Status = "completed"
    evaluations: dict[str, Evaluation] = {}  # of the present state, by split
    while step < plan.num_steps and not diary.is_stuck(config.early_stopping_patience):
        stage = plan.stages[len(diary.stages)]
        programs = plan.train_programs[len(diary.stages)]
        with stopwatch("train") as lap:
            state, metrics = _train_epoch(programs, state, step, plan.data, stop, display, stopwatch)
        step += len(metrics["loss"])
        diary.add_steps(metrics, lap)

        ends_epoch = diary.epoch["steps"] == plan.data.steps_per_epoch
        ends_stage = ends_epoch and len(diary.history) + 1 == stage.last_epoch
        watched = [plan.data.watched] if plan.data.watched and ends_epoch else []
        splits = plan.data.eval_batches if ends_stage else watched
        evaluations = _evaluate(plan, state, splits, stopwatch)
        if not math.isfinite(diary.epoch["loss"]) or not is_finite(evaluations):
            status = "diverged"
            break
        if ends_epoch:
            epoch = diary.end_epoch(plan.data, step, float(plan.schedule(step - 1)), evaluations)
            writer.write(**epoch)
            display.line(_epoch_line(epoch, config.num_epochs))
        if ends_stage:
            diary.end_stage(stage, evaluations)
            if len(plan.stages) > 1:
                display.line(f"{stage.name} ends: test accuracy {evaluations['test'].accuracy:.2%}")

        # Wait for the writing, so that it takes nothing from the next epoch's clock.
        with stopwatch("checkpoint"):
            checkpoints.save(step, state, diary.to_json() | stopwatch.to_json(wall=time.perf_counter() - began))
            checkpoints.wait()
        if stop.signum and step < plan.num_steps:
            status = "interrupted"
            break
    display.close()
    writer.close()
    checkpoints.close()

    # Evaluate the last state, as far as that has not been done, and export the model.
    if status == "completed":
        evaluations |= _evaluate(plan, state, plan.data.eval_batches.keys() - evaluations, stopwatch)
        status = "completed" if is_finite(evaluations) else "diverged"
    if status == "completed":
        with stopwatch("checkpoint"):
            description = _describe_model(config, plan.data, evaluations["test"])
            exported.export_model(directory / "model", *state.evaluated, description)
    else:
        evaluations = {}

    record = make_record(
        config,
        status,
        plan.data,
        state,
        diary,
        evaluations,
        stopwatch,
        steps_per_call=plan.steps_per_call,
        flops_per_image=plan.train_programs[0][plan.steps_per_call].count_flops() / config.batch_size,
        compile_cached=all(program.cached for program in plan.programs),
        eval_images_per_sec=statistics.median(plan.eval_speeds) if plan.eval_speeds else None,
        wall_seconds=time.perf_counter() - began,
    )
    display.line(_last_line(record, plan.num_steps))
    return record, evaluations["test"].predictions if evaluations else None


class Plan(NamedTuple):
    """What a run consists of, but for its state."""

    data: input_pipeline.Data
    stages: list[config_lib.Stage]
    num_steps: int
    steps_per_call: int
    schedule: optax.Schedule
    train_programs: list[dict[int, Program]]  # of each stage, by the number of steps they do
    eval_program: Program
    eval_speeds: list[float]  # images per second of every evaluation so far

    @property
    def programs(self) -> list[Program]:
        return [self.eval_program, *(program for stage in self.train_programs for program in stage.values())]


def _prepare(config: config_dict.ConfigDict, directory: Path, stopwatch: Stopwatch) -> tuple[Plan, TrainState]:
    """Proven data on the devices, a fresh state, and programs, compiled apart from the training that is timed."""
    with stopwatch("setup"):
        mesh = parallel.make_mesh()
        parallel.check_batch_size("batch_size", config.batch_size, mesh)
        parallel.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
        data = input_pipeline.load(config, mesh)
        workdir.check_same_data(directory, data.sha256)
        steps_per_call = steps.choose_steps_per_call(config, data.steps_per_epoch)
        tx, schedule = make_optimizer(config, data.steps_per_epoch)
        graphdef, state = steps.init_state(config, tx, mesh, len(data.train_rows["label"]))
    with stopwatch("compile"):
        programs = steps.compile_programs(config, mesh, data, graphdef, tx, state, steps_per_call)
    num_steps = config.num_epochs * data.steps_per_epoch
    return Plan(data, config_lib.stages(config), num_steps, steps_per_call, schedule, *programs, []), state


def _restore(checkpoints: Checkpoints, state: TrainState, stopwatch: Stopwatch) -> tuple[TrainState, Diary]:
    """The latest checkpoint's state and diary, or the fresh state and an empty diary."""
    restored = checkpoints.restore(state)
    if not restored:
        return state, Diary()
    state, progress = restored
    stopwatch.add(progress.pop("seconds"), progress.pop("core_seconds"))
    diary = Diary(**progress)
    diary.num_resumes += 1
    return state, diary


def _evaluate(plan: Plan, state: TrainState, splits: Iterable[str], stopwatch: Stopwatch) -> dict[str, Evaluation]:
    evaluations = {}
    for split in splits:
        with stopwatch("eval") as lap:
            evaluations[split] = steps.evaluate(plan.eval_program, state, plan.data.eval_batches[split])
        plan.eval_speeds.append(evaluations[split].num_examples / lap.seconds)
    return evaluations


def _train_epoch(
    programs: dict[int, Program],
    state: TrainState,
    step: int,
    data: input_pipeline.Data,
    stop: StopRequest,
    display: Progress,
    stopwatch: Stopwatch,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Trains from `step` to the end of its epoch, or until it is told to stop.

    Returns:
        The state, and the loss and accuracy of every step.
    """
    epoch, done = divmod(step, data.steps_per_epoch)
    order = data.epoch_order(epoch, selection.losses_of_epoch(state.losses, is_new=done == 0))
    longest = max(programs)
    outputs: list[dict[str, jax.Array]] = []
    while done < data.steps_per_epoch and not stop.signum:
        length = longest if done + longest <= data.steps_per_epoch else 1
        state, metrics = programs[length].run(state, data.train_rows, order, data.seed)
        outputs.append(metrics)
        done += length
        if stopwatch.first_step is None:
            metrics["loss"].block_until_ready()
            stopwatch.first_step = seconds_since_process_start()
        if len(outputs) > CALLS_IN_FLIGHT:
            finished = outputs[-1 - CALLS_IN_FLIGHT]
            finished["loss"].block_until_ready()
            if display.is_due():
                display.update(epoch * data.steps_per_epoch + done, epoch + 1, finished)
                if not np.isfinite(finished["loss"]).all():
                    break
    jax.block_until_ready(state)
    metrics = {
        name: np.concatenate([np.atleast_1d(output[name]) for output in jax.device_get(outputs)])
        if outputs
        else np.zeros(0)
        for name in ("loss", "accuracy")
    }
    return state, metrics


def _describe_model(config: config_dict.ConfigDict, data: input_pipeline.Data, test: Evaluation) -> dict[str, Any]:
    """What goes with the exported model."""
    return {
        "entry": config.entry,
        "seed": config.seed,
        "model": config.model.to_dict(),
        "dtype": config.dtype,
        "normalization": config.data.normalization,
        "features": config.features.to_dict(),
        "class_names": data.class_names,
        "test_accuracy": test.accuracy,
    }


def _first_line(config: config_dict.ConfigDict, plan: Plan, state: TrainState) -> str:
    return (
        f"{config.entry} seed {config.seed}: {steps.count(state.params):,} trainable parameters, "
        f"{plan.data.num_train:,} train images, {config.num_epochs} epochs of {plan.data.steps_per_epoch} steps, "
        f"{config.dtype} on {machine.describe_devices()}, "
        f"convolutions in {'oneDNN' if layers.convolves_in_onednn() else 'XLA'}"
    )


def _epoch_line(epoch: dict[str, Any], num_epochs: int) -> str:
    watched = "".join(
        f", {name.partition('_')[0]} accuracy {epoch[name]:.2%}"
        for name in ("val_accuracy", "test_accuracy")
        if name in epoch
    )
    return (
        f"epoch {epoch['epoch']}/{num_epochs}: loss {epoch['train_loss']:.4f}, "
        f"train accuracy {epoch['train_accuracy']:.2%}{watched}, "
        f"{epoch['train_images_per_sec']:,.0f} images/s, {epoch['train_seconds']:.2f} s"
    )


def _last_line(record: RunRecord, num_steps: int) -> str:
    if record.status == "interrupted":
        return f"interrupted after step {record.num_steps} of {num_steps}; the same command goes on from there."
    if record.status == "diverged":
        return (
            f"diverged: the loss is no finite number any more by step {record.num_steps}; a smaller learning rate "
            "may help."
        )
    return (
        f"test accuracy {record.test_accuracy:.2%} after {record.train_seconds:.1f} s of training "
        f"({record.train_core_seconds:.1f} core-seconds), {record.train_images_per_sec:,.0f} images/s"
    )

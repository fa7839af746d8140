"""A whole run, top to bottom: set up, compile, restore, train, evaluate, export, record."""

import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from fmbench import config as config_lib
from fmbench import layers
from fmbench.models import exported
from fmbench.records import machine, schema, store
from fmbench.system.interrupt import StopRequest, stop_on_signals
from fmbench.system.timing import Stopwatch, seconds_since_process_start
from fmbench.training import checkpoint, input_pipeline, parallel, selection, steps, workdir
from fmbench.training.metric_writer import MetricWriter
from fmbench.training.optimizer import make_optimizer
from fmbench.training.progress import Progress
from fmbench.training.steps import Evaluation, Program, TrainState

CALLS_IN_FLIGHT = 2  # how far the host runs ahead of the devices, and how late a signal is answered


def train_and_evaluate(
    config: config_dict.ConfigDict, directory: Path, *, results_dir: Path, force: bool = False
) -> schema.RunRecord:
    """Trains, evaluates and leaves a record, or goes on where an earlier call stopped.

    Args:
        config: From `fmbench.config.finalize`.
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
) -> tuple[schema.RunRecord, np.ndarray | None]:
    began = time.perf_counter()
    stopwatch = Stopwatch()

    # Set up: proven data on the devices, and a fresh state.
    with stopwatch("setup"):
        mesh = parallel.make_mesh()
        parallel.check_batch_size("batch_size", config.batch_size, mesh)
        parallel.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
        data = input_pipeline.load(config, mesh)
        workdir.check_same_data(directory, data.sha256)
        num_steps = config.num_epochs * data.steps_per_epoch
        stages = config_lib.stages(config)
        steps_per_call = steps.choose_steps_per_call(config, data.steps_per_epoch)
        tx, schedule = make_optimizer(config, data.steps_per_epoch)
        graphdef, state = steps.init_state(config, tx, mesh, len(data.train_rows["label"]))

    # Compile ahead of time, apart from the training that is timed.
    with stopwatch("compile"):
        train_programs, eval_program = steps.compile_programs(
            config, mesh, data, graphdef, tx, state, steps_per_call
        )

    # Restore. All randomness comes from the seed and the step: the state is all there is to a run.
    with stopwatch("setup"):
        checkpoints = checkpoint.Checkpoints(directory / "checkpoints")
        restored = checkpoints.restore(state)
        if restored:
            state, progress = restored
            progress["num_resumes"] += 1
            stopwatch.add(progress["seconds"], progress["core_seconds"])
        else:
            progress = {"history": [], "stages": [], "epoch": _no_sums(), "num_resumes": 0}
        began -= stopwatch.seconds["wall"]
        step = int(state.step)
        writer = MetricWriter(directory, step)
    display = Progress(num_steps=num_steps, first_step=step, batch_size=config.batch_size)
    display.line(
        f"{config.entry} seed {config.seed}: {steps.count(state.params):,} trainable parameters, "
        f"{data.num_train:,} train images, {config.num_epochs} epochs of {data.steps_per_epoch} steps, "
        f"{config.dtype} on {mesh.size} x {jax.devices()[0].device_kind}, "
        f"convolutions in {'oneDNN' if layers.convolves_in_onednn() else 'XLA'}"
    )
    if restored:
        display.line(f"resumed from {directory} after step {step} of {num_steps}")

    # Train.
    status: schema.Status = "completed"
    eval_speeds: list[float] = []

    def evaluate(split: str) -> Evaluation:
        with stopwatch("eval") as lap:
            evaluation = steps.evaluate(eval_program, state, data.eval_batches[split])
        eval_speeds.append(evaluation.num_examples / lap.seconds)
        return evaluation

    evaluations: dict[str, Evaluation] = {}  # of the present state, by split
    while step < num_steps and not _stopped_early(config, progress["history"]):
        stage = len(progress["stages"])
        sums = progress["epoch"]
        with stopwatch("train") as lap:
            state, metrics = _train_epoch(train_programs[stage], state, step, data, stop, display, stopwatch)
        step += len(metrics["loss"])
        sums["steps"] += len(metrics["loss"])
        sums["loss"] += float(metrics["loss"].sum(dtype=np.float64))
        sums["accuracy"] += float(metrics["accuracy"].sum(dtype=np.float64))
        sums["seconds"] += lap.seconds
        sums["core_seconds"] += lap.core_seconds
        if not math.isfinite(sums["loss"]):
            status = "diverged"
            break

        evaluations = {}
        if sums["steps"] == data.steps_per_epoch:
            ends_stage = len(progress["history"]) + 1 == stages[stage].last_epoch
            for split in data.eval_batches:
                if ends_stage or split == data.watched:
                    evaluations[split] = evaluate(split)
            if not _is_finite(evaluations):
                status = "diverged"
                break
            epoch = _describe_epoch(data, step, float(schedule(step - 1)), sums, evaluations)
            writer.write(**epoch)
            display.line(_epoch_line(epoch, config.num_epochs))
            progress["history"].append(epoch)
            progress["epoch"] = _no_sums()
            if ends_stage:
                progress["stages"].append(_describe_stage(stages[stage], progress["history"], evaluations))
                if len(stages) > 1:
                    display.line(f"{stages[stage].name} ends: test accuracy {evaluations['test'].accuracy:.2%}")

        # Wait for the writing, so that it takes nothing from the next epoch's clock.
        with stopwatch("checkpoint"):
            progress["seconds"] = stopwatch.seconds | {"wall": time.perf_counter() - began}
            progress["core_seconds"] = dict(stopwatch.core_seconds)
            choose_by = evaluations.get("validation") if data.watched == "validation" else None
            checkpoints.save(step, state, progress, choose_by.accuracy if choose_by else None)
            checkpoints.wait()
        if stop.signum and step < num_steps:
            status = "interrupted"
            break
    display.close()
    writer.close()
    checkpoints.close()

    # Evaluate the last state, as far as that has not been done, and export the model.
    if status == "completed":
        evaluations |= {split: evaluate(split) for split in data.eval_batches if split not in evaluations}
        if not _is_finite(evaluations):
            status = "diverged"
    if status != "completed":
        evaluations = {}
    else:
        with stopwatch("checkpoint"):
            description = {
                "entry": config.entry,
                "seed": config.seed,
                "model": config.model.to_dict(),
                "dtype": config.dtype,
                "normalization": config.data.normalization,
                "features": config.features.to_dict(),
                "class_names": data.class_names,
                "test_accuracy": evaluations["test"].accuracy,
            }
            exported.export_model(directory / "model", *state.evaluated, description)

    # Record.
    history = [schema.Epoch(**epoch) for epoch in progress["history"]]
    speed = statistics.median(epoch.train_images_per_sec for epoch in history) if history else None
    last = history[-1] if history else None
    test, validation = evaluations.get("test"), evaluations.get("validation")
    record = schema.RunRecord(
        schema_version=1,
        status=status,
        created=machine.now(),
        entry=config.entry,
        config_file=config.config_file,
        config=config_lib.to_json(config),
        seed=config.seed,
        dtype=config.dtype,
        parallel=config.parallel,
        steps_per_call=steps_per_call,
        batch_size=config.batch_size,
        model=config.model.name,
        num_params=steps.count(state.params) + steps.count(state.model_state),
        num_trainable_params=steps.count(state.params),
        flops_per_image=train_programs[0][steps_per_call].flops / config.batch_size,
        data_version=data.version,
        data_sha256=data.sha256,
        num_train=data.num_train,
        num_validation=data.num_validation,
        num_test=data.num_test,
        watched=data.watched,
        num_epochs=len(history),
        num_steps=step,
        num_resumes=progress["num_resumes"],
        train_loss=last.train_loss if last else None,
        train_accuracy=last.train_accuracy if last else None,
        val_loss=validation.loss if validation else None,
        val_accuracy=validation.accuracy if validation else None,
        test_loss=test.loss if test else None,
        test_accuracy=test.accuracy if test else None,
        test_top5_accuracy=test.top5_accuracy if test else None,
        test_per_class_accuracy=test.per_class_accuracy if test else None,
        predictions_sha256=schema.predictions_sha256(test.predictions) if test else None,
        first_step_seconds=stopwatch.first_step,
        setup_seconds=stopwatch.seconds["setup"],
        compile_seconds=stopwatch.seconds["compile"],
        compile_cached=all(
            program.cached for programs in [*train_programs, {0: eval_program}] for program in programs.values()
        ),
        train_seconds=stopwatch.seconds["train"],
        eval_seconds=stopwatch.seconds["eval"],
        checkpoint_seconds=stopwatch.seconds["checkpoint"],
        train_core_seconds=stopwatch.core_seconds["train"],
        eval_core_seconds=stopwatch.core_seconds["eval"],
        wall_seconds=time.perf_counter() - began,
        train_images_per_sec=speed,
        eval_images_per_sec=statistics.median(eval_speeds) if eval_speeds else None,
        step_time_ms=1000 * config.batch_size / speed if speed else None,
        peak_memory_bytes=machine.peak_memory_bytes(),
        time_to_target=_time_to_target(history, data.watched),
        history=history,
        stages=[schema.StageResult(**stage) for stage in progress["stages"]],
        environment=machine.environment(),
    )
    if status == "interrupted":
        display.line(f"interrupted after step {step} of {num_steps}; the same command goes on from there.")
    elif status == "diverged":
        display.line(
            f"diverged: the loss is no finite number any more by step {step}; a smaller learning rate may help."
        )
    if test:
        display.line(
            f"test accuracy {test.accuracy:.2%} after {record.train_seconds:.1f} s of training "
            f"({record.train_core_seconds:.1f} core-seconds), {speed:,.0f} images/s"
        )
    return record, test.predictions if test else None


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


def _no_sums() -> dict[str, float]:
    """What an epoch adds up, step by step."""
    return {"steps": 0, "loss": 0.0, "accuracy": 0.0, "seconds": 0.0, "core_seconds": 0.0}


def _describe_epoch(
    data: input_pipeline.Data,
    step: int,
    learning_rate: float,
    sums: dict[str, float],
    evaluations: dict[str, Evaluation],
) -> dict[str, Any]:
    """A finished epoch, as `schema.Epoch` has it."""
    epoch = {
        "epoch": step // data.steps_per_epoch,
        "step": step,
        "learning_rate": learning_rate,
        "train_loss": sums["loss"] / sums["steps"],
        "train_accuracy": sums["accuracy"] / sums["steps"],
        "train_seconds": sums["seconds"],
        "train_core_seconds": sums["core_seconds"],
        "train_images_per_sec": sums["steps"] * data.batch_size / sums["seconds"],
    }
    if data.watched:
        evaluation = evaluations[data.watched]
        prefix = "val" if data.watched == "validation" else "test"
        epoch |= {f"{prefix}_loss": evaluation.loss, f"{prefix}_accuracy": evaluation.accuracy}
    return epoch


def _describe_stage(
    stage: config_lib.Stage, history: list[dict[str, Any]], evaluations: dict[str, Evaluation]
) -> dict[str, Any]:
    """A stage whose last epoch ends `history`, as `schema.StageResult` has it."""
    epochs = history[-stage.num_epochs :]
    validation = evaluations.get("validation")
    return {
        "name": stage.name,
        "num_epochs": stage.num_epochs,
        "learning_rate": stage.learning_rate,
        "augment": {
            name: strength if name == "function" else float(strength) for name, strength in stage.augment.items()
        },
        "train_seconds": sum(epoch["train_seconds"] for epoch in epochs),
        "train_core_seconds": sum(epoch["train_core_seconds"] for epoch in epochs),
        "val_accuracy": validation.accuracy if validation else None,
        "test_accuracy": evaluations["test"].accuracy,
    }


def _is_finite(evaluations: dict[str, Evaluation]) -> bool:
    return all(math.isfinite(evaluation.loss) for evaluation in evaluations.values())


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


def _stopped_early(config: config_dict.ConfigDict, history: list[dict[str, Any]]) -> bool:
    """Whether the best validation accuracy is `early_stopping_patience` epochs old."""
    if not config.early_stopping_patience or not history:
        return False
    accuracies = [epoch["val_accuracy"] for epoch in history]
    best = accuracies.index(max(accuracies))
    return len(accuracies) - 1 - best >= config.early_stopping_patience


def _time_to_target(history: list[schema.Epoch], watched: str | None) -> dict[str, float | None]:
    """Training seconds at the first end of an epoch at or above each target; None for a miss."""
    seconds = list(itertools.accumulate(epoch.train_seconds for epoch in history))
    accuracies = [epoch.val_accuracy if watched == "validation" else epoch.test_accuracy for epoch in history]
    return {
        target: next(
            (s for s, a in zip(seconds, accuracies, strict=True) if a is not None and a >= int(target) / 100),
            None,
        )
        for target in schema.TARGETS
    }

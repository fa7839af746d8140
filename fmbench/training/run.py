"""A whole run, top to bottom: set up, compile, restore, train, evaluate, export, record.

Where several processes train together, each goes through all of it, and has all of the state on its devices. What
lasts is process 0's: the work directory, checkpoints, the record; another one's folder goes when it ends.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import config_dict

from fmbench import config as config_lib
from fmbench.distributed import team as teams
from fmbench.errors import UserError
from fmbench.models import exported
from fmbench.records import calibration, machine, processes, store
from fmbench.records.processes import ProcessList
from fmbench.records.schema import Calibration, RunRecord, Status
from fmbench.reporting import lines, tensorboard
from fmbench.reporting.metrics import MetricWriter, mend_metrics
from fmbench.reporting.progress import Progress
from fmbench.reporting.trackers import Trackers
from fmbench.system import files
from fmbench.system.interrupt import StopRequest, stop_on_signals
from fmbench.system.sealed import DamageError
from fmbench.system.timing import Stopwatch, seconds_since_process_start
from fmbench.training import inference, input_pipeline, parallel, selection, steps, workdir
from fmbench.training.checkpoint import Checkpoints
from fmbench.training.optimizer import make_optimizer
from fmbench.training.record import Diary, is_finite, make_record
from fmbench.training.steps import CALLS_IN_FLIGHT, Evaluation, Program, TrainState

_runs_of_process = itertools.count()


def train_and_evaluate(
    config: config_dict.ConfigDict, directory: Path, *, results_dir: Path, force: bool = False, stop_after: int = 0
) -> RunRecord:
    """Trains, evaluates and leaves a record, or goes on where an earlier call stopped.

    Args:
        config: From `fmbench.entries.finalize`.
        directory: The work directory: checkpoints, metrics, the exported model and a copy of the record.
        results_dir: The record and its predictions go to <results_dir>/runs.
        force: Start anew, throwing away what `directory` holds.
        stop_after: Epochs after which the run stops, as if interrupted; 0: none.

    Returns:
        The record, with status 'completed', 'interrupted' (by SIGINT or SIGTERM; resumable) or 'diverged'.

    Raises:
        UserError: If something that was given cannot be used.
    """
    seeds = (config.seed,)
    (record,) = train_seeds(config, seeds, directory, results_dir=results_dir, force=force, stop_after=stop_after)
    return record


def train_seeds(
    config: config_dict.ConfigDict,
    seeds: Sequence[int],
    directory: Path,
    *,
    results_dir: Path,
    force: bool = False,
    stop_after: int = 0,
    trackers: Sequence[str] = (),
) -> list[RunRecord]:
    """As `train_and_evaluate`, with a record for each seed; several train in one program, a step of all at a time.

    Each of several has its metrics, model and copy of the record in <directory>/seed<k>, and learns what it would
    learn alone, up to rounding. If the loss of one diverges, the others go on. `trackers`, of
    `reporting.trackers.NAMES`, are told of each.
    """
    team = teams.present()
    if team.is_first:
        store.check_writable(results_dir)
    if len(seeds) > 1 and config.early_stopping_patience:
        raise UserError("config.early_stopping_patience stops seeds at different epochs; train them one by one.")
    if len(seeds) > 1 and config.data.pipeline == "grain":
        raise UserError("config.data.pipeline=grain reads the batches of one seed; train them one by one.")
    with contextlib.ExitStack() as stack:
        if not team.is_first:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fmbench-")))
        lanes = [
            Lane(config.copy_and_resolve_references(), directory / f"seed{seed}" if len(seeds) > 1 else directory)
            for seed in seeds
        ]
        for lane, seed in zip(lanes, seeds, strict=True):
            with lane.config.unlocked():
                lane.config.seed = seed
        identity = config_lib.to_json(lanes[0].config) | ({"seeds": list(seeds)} if len(seeds) > 1 else {})
        stack.enter_context(files.one_line(directory))
        stack.enter_context(workdir.claim(directory, identity, force=force))
        stop = stack.enter_context(stop_on_signals())
        if team.from_first(lambda: _is_all_done(lanes)):
            if team.is_first:
                for lane in lanes:
                    mend_metrics(lane.directory, store.read(lane.directory / "record.json").history)
                print(
                    f"{lines.name(config.entry, seeds)}: already finished in {directory}; --force trains it anew."
                )
        else:
            with processes.listed(directory, lanes[0].config) as process_list:
                _run(lanes, directory, identity, stop, stop_after, process_list, trackers)

        def publish() -> list[str]:
            stems = [lane.directory / "record" for lane in lanes]
            records = [store.publish(stem, results_dir, data_dir=config.data.dir) for stem in stems]
            return [record.model_dump_json() for record in records]

        return [RunRecord.model_validate_json(text) for text in team.from_first(publish)]


@dataclasses.dataclass
class Lane:
    """One seed of a run, which mostly has no other."""

    config: config_dict.ConfigDict  # with this seed
    directory: Path
    diary: Diary = dataclasses.field(default_factory=Diary)
    evaluations: dict[str, Evaluation] = dataclasses.field(default_factory=dict)  # of the present state, by split


def _is_all_done(lanes: list[Lane]) -> bool:
    return all(workdir.is_finished(lane.directory) for lane in lanes) and _are_exported(lanes)


def _are_exported(lanes: list[Lane]) -> bool:
    """Whether the models of finished runs are whole; if not, what is left to do comes from the last checkpoint."""
    for lane in lanes:
        try:
            exported.check_export(lane.directory / "model")
        except DamageError as damage:
            print(f"{lane.directory / 'model'}: {damage}; exported anew.", file=sys.stderr)
            return False
    return True


def _run(
    lanes: list[Lane],
    directory: Path,
    identity: dict[str, Any],
    stop: StopRequest,
    stop_after: int,
    process_list: ProcessList,
    tracker_names: Sequence[str],
) -> None:
    """Trains all lanes, and leaves the record of each, with its predictions, in its directory.

    `identity` is what tells the run from others: its config.
    """
    team = teams.present()
    stop.is_heeded = False  # so far nothing is lost
    stopwatch = Stopwatch(process_list.watch, team.gather)
    is_first = next(_runs_of_process) == 0
    config = lanes[0].config  # but for the seed the others' too
    checkpoints = Checkpoints(directory / "checkpoints")
    plan, state = _prepare(lanes, directory, identity, checkpoints, stopwatch, process_list)
    step = int(state.step.max())
    display = Progress(num_steps=plan.num_steps, first_step=step, batch_size=config.batch_size)
    trackers = [_begin_trackers(lane, tracker_names if team.is_first else (), display) for lane in lanes]
    writers = [
        MetricWriter(lane.directory, lane.diary.history, _flat(lane.config), told)
        for lane, told in zip(lanes, trackers, strict=True)
    ]
    stop.is_heeded = True
    seeds = [lane.config.seed for lane in lanes]
    display.line(lines.first(config, seeds, state.params, plan.data.num_train, plan.data.steps_per_epoch))
    if step:
        display.line(f"resumed from {directory} after step {step} of {plan.num_steps}")

    # Train.
    is_interrupted = False
    while step < plan.num_steps and not lanes[0].diary.is_stuck(config.early_stopping_patience):
        stage = plan.stage_after(step)
        programs = plan.train_programs[plan.stages.index(stage)]
        with stopwatch("train") as lap:
            state, metrics = _train_epoch(programs, state, step, plan.data, stop, display, stopwatch)
        step += len(metrics["loss"])
        for lane in lanes:
            lane.evaluations = {}

        ends_epoch = len(metrics["loss"]) > 0 and step % plan.data.steps_per_epoch == 0
        ends_stage = ends_epoch and step == stage.last_epoch * plan.data.steps_per_epoch
        watched = [plan.data.watched] if plan.data.watched and ends_epoch else []
        _evaluate(plan, state, lanes, plan.data.eval_batches if ends_stage else watched, stopwatch)
        for index, lane in enumerate(lanes):
            lane.diary.add_steps({name: values[:, index] for name, values in metrics.items()}, lap)
            if not math.isfinite(lane.diary.epoch["loss"]) or not is_finite(lane.evaluations):
                lane.diary.diverged = True
        going = [lane for lane in lanes if not lane.diary.diverged]
        if not going:
            break
        if ends_epoch:
            rate = float(plan.schedule(step - 1))
            epochs = [lane.diary.end_epoch(plan.data, step, rate, lane.evaluations) for lane in going]
            display.end_epoch(step, lines.epoch(epochs, config.num_epochs), lines.watched(epochs))
            for lane, writer in zip(lanes, writers, strict=True):
                if not lane.diary.diverged:
                    writer.write(**lane.diary.history[-1])
        if ends_stage:
            for lane in going:
                lane.diary.end_stage(stage, lane.evaluations)
                if len(plan.stages) > 1:
                    display.line(f"{stage.name} ends: test accuracy {lane.evaluations['test'].accuracy:.2%}")

        with stopwatch("checkpoint"):
            progress = {
                "config": identity,
                "data_sha256": plan.data.sha256,
                "data_position": plan.data.position,
                "processes": process_list.to_json(step),
                "diaries": [lane.diary.to_json() for lane in lanes],
                **stopwatch.to_json(),
            }
            if team.is_first:
                checkpoints.save(step, parallel.local(state), progress)
            process_list.save()
        is_last = _is_asked_to_stop(stop) or step == stop_after * plan.data.steps_per_epoch
        is_interrupted = is_last and step < plan.num_steps
        if is_interrupted:
            break
    display.close()

    # Evaluate the last state, as far as that has not been done, export the models, and write the records.
    if not is_interrupted and not all(lane.diary.diverged for lane in lanes):
        _evaluate(plan, state, lanes, plan.data.eval_batches.keys() - lanes[0].evaluations, stopwatch)
    memory = max(team.gather(machine.peak_memory_bytes()))
    num_hosts = len(set(team.gather(socket.gethostname())))
    state = parallel.local(state)
    flops_per_image = plan.count_flops() / config.batch_size / len(lanes) if team.is_first else 0.0
    records = {}  # by directory
    for index, lane in enumerate(lanes):
        status: Status = "interrupted" if is_interrupted else "completed"
        if lane.diary.diverged or not is_finite(lane.evaluations):
            status = "diverged"
        own_state = steps.of_seed(state, index)
        if status == "completed":
            with stopwatch("checkpoint"):
                description = _describe_model(lane.config, plan.data, lane.evaluations["test"])
                if team.is_first:
                    exported.export_model(lane.directory / "model", *own_state.evaluated, description)
            if workdir.is_of(lane.directory, lane.evaluations["test"].predictions):
                display.line(f"{lane.directory}: exported anew; its record stays as it is")
                writers[index].close()
                continue
        else:
            lane.evaluations = {}
        if not team.is_first:
            writers[index].close()
            continue
        process_list.end(status)
        wall_seconds = process_list.wall_seconds
        record = make_record(
            lane.config,
            status,
            plan.data,
            own_state,
            lane.diary,
            lane.evaluations,
            stopwatch,
            process_list,
            num_hosts if team.size > 1 else None,
            peak_memory_bytes=memory,
            trained_with=len(lanes) - 1,
            steps_per_call=plan.steps_per_call,
            flops_per_image=flops_per_image,
            # A later run of the same process did not begin when that did.
            first_step_seconds=stopwatch.first_step if is_first else None,
            compile_cached=all(program.cached for program in plan.programs),
            eval_images_per_sec=statistics.median(plan.eval_speeds) if plan.eval_speeds else None,
            wall_seconds=wall_seconds,
            train_share=min(1.0, stopwatch.seconds["train"] / wall_seconds),
        )
        display.line(lines.last(record, plan.num_steps))
        predictions = lane.evaluations["test"].predictions if lane.evaluations else None
        pictures = {}
        if status != "interrupted":
            images = steps.first_images(plan.data, plan.stages[0].augment, index, most=64)
            pictures = {"first_batch": tensorboard.grid(images)} if len(images) else {}
        if predictions is not None:
            labels, names = plan.data.test_labels, plan.data.class_names
            pictures["confusion_matrix"] = tensorboard.confusion_matrix(labels, predictions, names)
        writers[index].end(record, pictures)
        writers[index].close()
        is_scored = record.val_predictions_sha256 is not None
        val_predictions = lane.evaluations["validation"].predictions if is_scored else None
        store.write(record, predictions, lane.directory / "record", val_predictions)
        records[lane.directory] = record
    for lane in lanes:  # all clocks have stopped
        if team.is_first and lane.evaluations:
            _judge(lane.directory, plan.data, records, display.line)
    _calibrate(records)
    for lane, told in zip(lanes, trackers, strict=True):
        if lane.directory in records:
            told.end(records[lane.directory], lane.directory / "record.json")


def _begin_trackers(lane: Lane, names: Sequence[str], display: Progress) -> Trackers:
    run_name = f"{lane.config.entry}-{lane.config.dtype}-seed{lane.config.seed}"
    config = _flat(lane.config)
    return Trackers.begin(names, lane.directory, run_name, config, lane.diary.history, display.line)


def _flat(config: config_dict.ConfigDict) -> dict[str, Any]:
    return config_lib.flatten(config_lib.to_json(config))


def _judge(
    directory: Path, data: input_pipeline.Data, records: dict[Path, RunRecord], say: Callable[[str], None]
) -> None:
    """Measures what an exported model's probabilities are worth, and notes it in the model and in a new record."""
    model, description = exported.load_model(directory / "model")
    found = inference.measure_confidence(model, description, data.eval_batches)
    if found.temperature:
        exported.add_temperature(directory / "model", found.temperature)
    if directory in records:
        records[directory] = records[directory].model_copy(update={"confidence": found})
        store.write(records[directory], None, directory / "record")
    say(lines.confidence(found))


def _calibrate(records: dict[Path, RunRecord]) -> None:
    """Adds what the machine reaches to the records of completed runs, when all clocks have stopped.

    The seconds that it takes are spared where there is nothing to compare: on the sample.
    """
    for directory, record in records.items():
        counts = record.status == "completed" and record.data_version != "sample"
        if counts and (measured := calibration.measure_beside_a_run()):
            changed = record.model_copy(update={"calibration": Calibration(**measured._asdict())})
            store.write(changed, None, directory / "record")


class Plan(NamedTuple):
    """What a run consists of, but for its state."""

    data: input_pipeline.Data
    stages: list[config_lib.Stage]
    num_steps: int
    steps_per_call: int
    schedule: optax.Schedule
    train_programs: list[dict[int, Program]]  # of each stage, as `steps.compile_programs` has them
    eval_programs: dict[int, Program]  # by the number of batches
    eval_speeds: list[float]  # images per second of every evaluation so far

    @property
    def programs(self) -> list[Program]:
        programs = [*self.train_programs, self.eval_programs]
        return [program for by_length in programs for program in by_length.values()]

    def stage_after(self, step: int) -> config_lib.Stage:
        epoch = step // self.data.steps_per_epoch
        return next(stage for stage in self.stages if epoch < stage.last_epoch)

    def count_flops(self) -> float:
        """Of a training step, over all seeds."""
        return self.train_programs[0][self.steps_per_call].count_flops()


def _prepare(
    lanes: list[Lane],
    directory: Path,
    identity: dict[str, Any],
    checkpoints: Checkpoints,
    stopwatch: Stopwatch,
    process_list: ProcessList,
) -> tuple[Plan, TrainState]:
    """Proven data on the devices, the state, and programs, compiled apart from the training that is timed."""
    config = lanes[0].config
    with stopwatch("setup"):
        mesh = parallel.make_mesh()
        parallel.check_batch_size("batch_size", config.batch_size, mesh)
        parallel.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
        data = input_pipeline.load(config, mesh, [lane.config.seed for lane in lanes])
        teams.present().require_equal(data.sha256)
        workdir.check_same_data(directory, data.sha256)
        steps_per_call = steps.choose_steps_per_call(config, data.whole_batches)
        tx, schedule = make_optimizer(config, data.steps_per_epoch)
        graphdef, state = steps.init_state(config, tx, mesh, data.seed, data.num_rows)
        misfit = functools.partial(workdir.misfit, config=identity, sha256=data.sha256)
        state = _restore(checkpoints, state, data, mesh, misfit, lanes, stopwatch, process_list)
    with stopwatch("compile"):
        programs = steps.compile_programs(config, mesh, data, graphdef, tx, state, steps_per_call)
        data.compile_orders(selection.losses_of_epoch(state.losses, is_new=True))
    num_steps = config.num_epochs * data.steps_per_epoch
    return Plan(data, config_lib.stages(config), num_steps, steps_per_call, schedule, *programs, []), state


def _restore(
    checkpoints: Checkpoints,
    state: TrainState,
    data: input_pipeline.Data,
    mesh: Mesh,
    misfit: Callable[[dict[str, Any]], str],
    lanes: list[Lane],
    stopwatch: Stopwatch,
    process_list: ProcessList,
) -> TrainState:
    """The latest good checkpoint's state, with the lanes' diaries and the times so far, or the fresh state.

    All randomness comes from the seed and the step: the state is all there is to go on from.
    """
    team = teams.present()
    restored = checkpoints.restore(parallel.local(state), misfit) if team.is_first else None
    progress = team.from_first(lambda: restored and restored[1])
    if not progress:
        process_list.resume(0, [])
        return state
    if team.size == 1 and restored:
        state = restored[0]
    else:
        leaves, structure = jax.tree.flatten(restored[0] if restored else parallel.local(state))
        state = parallel.replicate(
            jax.tree.unflatten(structure, team.arrays_of_first(jax.device_get(leaves))), mesh
        )
    data.check_position(int(state.step.max()), progress.get("data_position"))
    process_list.resume(int(state.step.max()), progress["processes"] if team.is_first else [])
    stopwatch.add(progress["seconds"], progress["core_seconds"])
    for lane, diary in zip(lanes, progress["diaries"], strict=True):
        lane.diary = Diary(**diary)
    return state


def _evaluate(
    plan: Plan, state: TrainState, lanes: list[Lane], splits: Iterable[str], stopwatch: Stopwatch
) -> None:
    for split in splits:
        with stopwatch("eval") as lap:
            evaluations = steps.evaluate(plan.eval_programs, state, plan.data.eval_batches[split])
        plan.eval_speeds.append(evaluations[0].num_examples / lap.seconds)
        for lane, evaluation in zip(lanes, evaluations, strict=True):
            lane.evaluations[split] = evaluation


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
        The state, and the loss and accuracy of every step, (steps, seeds).
    """
    epoch, done = divmod(step, data.steps_per_epoch)
    arguments = data.feed(step, selection.losses_of_epoch(state.losses, is_new=done == 0))
    longest = max(programs)
    outputs: list[dict[str, jax.Array]] = []
    while done < data.steps_per_epoch and not _is_asked_to_stop(stop):
        whole = data.whole_batches - done
        length = longest if longest <= whole else min(1, whole)
        state, metrics = programs[length].run(state, *arguments(length))
        outputs.append(metrics)
        done += max(1, length)
        if stopwatch.first_step is None:
            metrics["loss"].block_until_ready()
            stopwatch.first_step = seconds_since_process_start()
        if len(outputs) > CALLS_IN_FLIGHT:
            finished = outputs[-1 - CALLS_IN_FLIGHT]
            finished["loss"].block_until_ready()
            if display.is_due():
                display.update(epoch * data.steps_per_epoch + done, epoch + 1, finished)
                # Others, who look at other times, would go on.
                is_alone = teams.present().size == 1
                if is_alone and not np.isfinite(_by_seed(finished["loss"], data)[-1]).any():
                    break
    jax.block_until_ready(state)
    fetched = jax.device_get(outputs)
    nothing = np.zeros((0, data.seed.size))
    return state, {
        name: np.concatenate([nothing, *(_by_seed(output[name], data) for output in fetched)])
        for name in ("loss", "accuracy")
    }


def _is_asked_to_stop(stop: StopRequest) -> bool:
    """Whether any process of the run is; all ask at the same places, and so end at the same step."""
    return any(teams.present().gather(bool(stop.signum)))


def _by_seed(metric: jax.Array | np.ndarray, data: input_pipeline.Data) -> np.ndarray:
    """What a call gave for a step or several, (steps, seeds)."""
    return np.reshape(metric, (-1, data.seed.size))


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

"""A search: Optuna's TPE chooses the next point of a space, and hopeless runs are pruned.

References:
    Bergstra et al., 2011, "Algorithms for hyper-parameter optimization".
    Akiba et al., 2019, "Optuna: a next-generation hyperparameter optimization framework".
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from fmbench import config, entries
from fmbench.errors import UserError
from fmbench.records.schema import RunRecord
from fmbench.studies import sweep
from fmbench.studies.sweep import Run

JOURNAL = "optuna.log"
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


class Range(NamedTuple):
    """All numbers between two; 'optimizer.learning_rate=1e-4..1e-2:log'."""

    low: str
    high: str
    log: bool

    def distribution(self, key: str, of_whole_numbers: bool) -> BaseDistribution:
        """For Optuna.

        Raises:
            UserError: If there are none.
        """
        try:
            if of_whole_numbers:
                return IntDistribution(int(self.low), int(self.high), log=self.log)
            return FloatDistribution(float(self.low), float(self.high), log=self.log)
        except ValueError as error:
            raise UserError(f"'{key}={self.low}..{self.high}' is no range: {error}") from error


def parse_range(values: Sequence[str]) -> Range | None:
    """The range that the only one of `values` is, if it is one."""
    found = sweep.RANGE.fullmatch(values[0]) if len(values) == 1 else None
    return Range(found[1], found[2], bool(found[3])) if found else None


class Search:
    """Trials in <out>/optuna.log, which a later search of the same space goes on with.

    A trial's value is the validation accuracy after the last epoch. One is pruned whose validation accuracy at the
    end of an epoch is below the median of the others' at that epoch, once there are five.
    """

    def __init__(self, fixed: Sequence[str], axes: Mapping[str, Sequence[str]], out: Path) -> None:
        """Takes what `sweep.plan` takes, and where the study lies.

        Raises:
            UserError: If some of the space's corners cannot be used, or the file cannot.
        """
        if len(axes["seed"]) > 1:
            raise UserError(
                "--sampler trains each trial with one seed; give --seeds one, and the best more later."
            )
        ranges = {key: parse_range(values) for key, values in axes.items()}
        corners = {key: [r.low, r.high] if (r := ranges[key]) else values for key, values in axes.items()}
        self.corners = sweep.plan(fixed, corners)
        self._fixed, self._seed = fixed, axes["seed"][0]
        defaults = config.flatten(self.corners[0].config.to_dict())
        self._space = {
            key: r.distribution(key, isinstance(defaults[key], int))
            if (r := ranges[key])
            else CategoricalDistribution(list(values))
            for key, values in axes.items()
            if key != "seed"
        }
        self._out = out
        self._trials: dict[str, Trial] = {}  # of this process, by the names of their runs
        self._epochs: dict[str, int] = {}  # reported of each
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        out.mkdir(parents=True, exist_ok=True)
        try:
            storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))
            self._study = optuna.create_study(
                storage=storage,
                study_name=entries.from_arguments(fixed).entry,
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(),
            )
        except (ValueError, KeyError) as error:  # JSON's and Optuna's
            raise UserError(f"{out / JOURNAL} cannot be read ({error}); name another --out.") from error
        # As many random trials as there were would else come again.
        self._study.sampler = optuna.samplers.TPESampler(seed=len(self._study.trials))

    def runs(self, num_trials: int) -> Iterator[Run]:
        """What to train next, until `num_trials` are done, those of earlier processes included."""
        for left in self._study.get_trials(states=(TrialState.RUNNING,)):  # by a process that was stopped
            self._study.tell(left.number, state=TrialState.FAIL)
            self._study.enqueue_trial(left.params)
        for _ in range(num_trials - self.num_done):
            try:
                trial = self._study.ask(self._space)
            except ValueError as error:
                raise UserError(
                    f"{self._out / JOURNAL} is of a search of other values ({error}); name another --out."
                ) from error
            run = self._run(trial.params)
            if run.name in self._trials and run.name not in self._finished():
                self._study.tell(trial, state=TrialState.FAIL)  # the same is being trained
                continue
            self._trials[run.name], self._epochs[run.name] = trial, 0
            yield run

    @property
    def num_done(self) -> int:
        return len(self._study.get_trials(deepcopy=False, states=DONE))

    def tried(self) -> tuple[list[Run], dict[str, str]]:
        """The runs of all trials, and which of them are pruned."""
        trials = self._study.get_trials(deepcopy=False)
        runs = {run.name: run for trial in trials if trial.params and (run := self._run(trial.params))}
        pruned = [self._run(trial.params).name for trial in trials if trial.state == TrialState.PRUNED]
        return list(runs.values()), dict.fromkeys(pruned, "pruned")

    def is_hopeless(self, run: Run) -> bool:
        """Reports the epochs that the run has ended since, and asks the pruner."""
        trial = self._trials[run.name]
        try:
            lines = (sweep.workdir_of(run, self._out) / "metrics.jsonl").read_text().splitlines()
            history = [json.loads(line) for line in lines]
        except (OSError, ValueError):  # not there yet, or half a line
            return False
        new = history[self._epochs[run.name] :]
        self._epochs[run.name] = len(history)
        for epoch in new:
            if "val_accuracy" in epoch and epoch["epoch"] < run.config.num_epochs:
                trial.report(epoch["val_accuracy"], epoch["epoch"])
                if trial.should_prune():
                    return True
        return False

    def ended(self, run: Run, record: RunRecord | None) -> None:
        """Tells Optuna what became of a run; one that diverged counts as pruned, at its worst."""
        trial = self._trials[run.name]
        if record is None:
            self._study.tell(trial, state=TrialState.FAIL)
        elif record.status == "completed":
            self._study.tell(trial, record.val_accuracy)
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def _finished(self) -> set[str]:
        trials = self._study.get_trials(deepcopy=False, states=(*DONE, TrialState.FAIL))
        return {self._run(trial.params).name for trial in trials if trial.params}

    def _run(self, params: Mapping[str, str | int | float]) -> Run:
        # Four digits say enough, and make names that can be read.
        values = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in params.items()}
        return sweep.make_run(self._fixed, values | {"seed": self._seed})

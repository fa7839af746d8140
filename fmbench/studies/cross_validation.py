"""Cross-validation: one run for each fold of the train images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import config_dict

from fmbench.errors import UserError
from fmbench.records import machine, schema
from fmbench.records.schema import RunRecord
from fmbench.studies import memory
from fmbench.training.run import train_and_evaluate


def protocol(fold: int, num_folds: int) -> dict[str, Any]:
    """What a cross-validation decides in the config of a run; `fold` counts from 0."""
    return {
        "watch": "validation",
        "data.split": "kfold",
        "data.num_folds": num_folds,
        "data.fold": fold,
        "data.random_state": 1,
    }


def fold_config(run_config: config_dict.ConfigDict, fold: int, num_folds: int) -> config_dict.ConfigDict:
    """The config of an entry's run on one fold, an entry of its own: 'baseline+fold=3of5'."""
    copy = run_config.copy_and_resolve_references()
    copy.update_from_flattened_dict(protocol(fold, num_folds))
    copy.entry += suffix(fold, num_folds)
    return copy


def suffix(fold: int, num_folds: int) -> str:
    return f"+fold={fold + 1}of{num_folds}"


def cross_validate(
    run_config: config_dict.ConfigDict, num_folds: int, workdir: Path, results_dir: Path, *, force: bool = False
) -> schema.Status:
    """Trains and scores all folds of one config, except those that are finished, and prints the scores.

    Args:
        run_config: From `fmbench.entries`. Its seed is every fold's.
        num_folds: 2 or more.
        workdir: The first of five folds is run in <workdir>/<entry>-<device>-<dtype>-seed<k>/fold1of5.
        results_dir: The records go to <results_dir>/runs.
        force: Start anew, throwing away what `workdir` holds of this config.

    Returns:
        'completed', or why the first fold that was not did not complete.

    Raises:
        UserError: If something that was given cannot be used.
    """
    here = machine.environment(ask_driver=False)
    name = schema.workdir_name(run_config.entry, here, run_config.dtype, run_config.seed)
    print(f"{run_config.entry} seed {run_config.seed}", flush=True)
    scores = []
    for fold in range(num_folds):
        config = fold_config(run_config, fold, num_folds)
        directory = workdir / name / f"fold{fold + 1}of{num_folds}"
        with memory.explained(config):
            record = train_and_evaluate(config, directory, results_dir=results_dir, force=force)
        if record.status != "completed":
            return record.status
        scores.append(score(record))
        print(f"fold {fold + 1}/{num_folds}: {100 * scores[-1]:.3f} %", flush=True)
    mean, std = mean_and_population_std(scores)
    print(f"mean {mean} % ± {std} (n={num_folds})", flush=True)
    return "completed"


# From records to the summary.


def score(record: RunRecord) -> float:
    """The score of a fold: the accuracy on the held-out images after the last epoch.

    Raises:
        UserError: If the record and its history differ on it.
    """
    if record.val_accuracy is None or record.val_accuracy != record.history[-1].val_accuracy:
        raise UserError(
            f"{record.name}: val_accuracy is {record.val_accuracy}, but that of the last epoch "
            f"{record.history[-1].val_accuracy}; run the fold again."
        )
    return record.val_accuracy


def mean_and_population_std(scores: Sequence[float]) -> tuple[str, str]:
    """Mean and population standard deviation, as the reference's harness has them, in percent."""
    return f"{100 * np.mean(scores):.3f}", f"{100 * np.std(scores):.3f}"

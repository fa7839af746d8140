"""Renders the records: results/leaderboard.md and .csv.

python -m fmbench.leaderboard            write them
python -m fmbench.leaderboard --check    fail if they, or an accuracy, are not what the records say
"""

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmbench import config
from fmbench.data import fashion_mnist, proof
from fmbench.errors import UserError
from fmbench.pages import generated
from fmbench.records import plausibility, store, verified
from fmbench.records.load import is_busy
from fmbench.records.schema import TARGETS, RunRecord, what_differs
from fmbench.records.statistics import mean_and_std, median_with_misses, shared_ranks
from fmbench.records.verified import Verification

HOW_TO_READ = """\
An entry links to its config. Test accuracy is the last epoch's, mean ± sample standard deviation over n seeds.
Rows share a rank if a test in which seeds and test images are both chance cannot tell their recipes apart (p ≥
0.05 after Holm's correction over all pairs of the table). A row of one seed has no rank: how much its recipe
varies is not known, and its place shows only where that one net came. `python -m fmbench.compare A B` shows
difference, interval and p of two entries. Times are medians over seeds: training steps only; core-seconds are
processor time, which a busy machine stretches, too: "busy" marks rows of whose runs one shared its machine, by the
load or by epochs of equal work whose core-seconds differ by a fifth, or was halted meanwhile. Runs that shared the
cores of a machine (`--launcher=local`) have a table of their own, and show no times. Time to a target is
training time until the watched split first reached it at the end of an epoch; "miss" says that it never did, "-"
that nothing was watched. Compile time is a cold compile's, or "cached". Transfer entries show parameters and times
of the trained head alone, without the frozen net's. Where n seeds were trained at once, in one program, times are
those of all n together, images per second those of one.
"""

TIMES = (
    "train_seconds",
    "train_core_seconds",
    "train_images_per_sec",
    "compile_seconds",
)  # columns of the CSV file
OTHER_DATA_PAGE = "other_data.md"
OTHER_DATA = """\
Records on other data sets of Fashion-MNIST's shape, which nobody has proven. Each version, called after its
hashes, has tables of its own; none of them is on the leaderboard.
"""


class Condition(NamedTuple):
    """What rows must share to be ranked together."""

    data_version: str
    device: str
    num_devices: int
    dtype: str
    trained_with: int = 0  # other seeds in the same program
    num_processes: int = 1
    num_hosts: int = 1
    shared_by: int = 1  # runs at a time on the machine's cores

    @property
    def title(self) -> str:
        data = f"data of {self.data_version}"
        if self.data_version == proof.OLD:
            data = f"old data (withdrawn {proof.STANDARD})"
        elif proof.is_unproven(self.data_version):
            data = f"other data, {self.data_version}"
        together = f", {self.trained_with + 1} seeds at once" if self.trained_with else ""
        processes = f" in {self.num_processes} processes" if self.num_processes > 1 else ""
        processes += f" on {self.num_hosts} machines" if self.num_hosts > 1 else ""
        together += f", {self.shared_by} runs at a time" if self.shared_by > 1 else ""
        return f"{self.num_devices} x {self.device}{processes}, {self.dtype}, {data}{together}"


class Row(NamedTuple):
    """An entry: the completed runs of one config over seeds, in the order of the seeds."""

    rank: int | None  # None for a single seed
    runs: list[RunRecord]


def files(results_dir: Path) -> dict[Path, str]:
    records = store.read_all(results_dir)
    verify_accuracies(records)
    return render(results_dir, records)


def verify_accuracies(records: dict[Path, RunRecord]) -> None:
    """Recomputes every completed record's test accuracies from its predictions and the true labels.

    Raises:
        UserError: If one differs, predictions or labels can't be had, or a record contradicts itself.
    """
    plausibility.refuse_contradictions(records)
    for path, record in records.items():
        if record.status == "completed":
            labels = true_labels(path, record)
            correct = store.read_predictions(record, path.with_suffix(".npy")) == labels
            recomputed: dict[str, Any] = {
                "test_accuracy": correct.mean(),
                "test_per_class_accuracy": [correct[labels == label].mean() for label in np.unique(labels)],
            }
            for field, value in recomputed.items():
                if getattr(record, field) != value:
                    raise UserError(
                        f"{path}: {field} is {getattr(record, field)}, but its predictions give {value}; "
                        "run the entry again."
                    )


def implausible(records: dict[Path, RunRecord]) -> dict[Path, str]:
    """The completed runs that are not ranked, for no training is known to leave their like, and why."""
    wrong = {}
    for path, record in records.items():
        if record.status == "completed":
            predictions = store.read_predictions(record, path.with_suffix(".npy"))
            wrong[path] = predictions != true_labels(path, record)
    return plausibility.marks(records, wrong)


def render(
    results_dir: Path, records: dict[Path, RunRecord], tables: dict[Condition, list[Row]] | None = None
) -> dict[Path, str]:
    """The generated files and what belongs in them; `tables`, if known, are `rows_by_condition`'s.

    Raises:
        UserError: If runs of different configs claim one row, or a verification is of no record.
    """
    if tables is None:
        tables = rows_by_condition(records)
    ranked = {path: record for path, record in records.items() if is_ranked(record)}
    others = {path: record for path, record in records.items() if proof.is_unproven(record.data_version)}
    checked = verified.read_all(results_dir, records)
    text = HOW_TO_READ if ranked else f"{HOW_TO_READ}\nNo records yet: `./run_all.sh quick` makes the first."
    files = {
        results_dir / "leaderboard.md": _page("Leaderboard", text, tables, ranked, checked),
        results_dir / "leaderboard.csv": _csv(tables),
    }
    if others or (results_dir / OTHER_DATA_PAGE).exists():
        other_tables = {condition: _ranked(entries) for condition, entries in _by_condition(others).items()}
        files[results_dir / OTHER_DATA_PAGE] = _page(
            "Other data", f"{OTHER_DATA}\n{HOW_TO_READ}", other_tables, others, checked
        )
    return files


def _page(
    title: str,
    text: str,
    tables: dict[Condition, list[Row]],
    records: dict[Path, RunRecord],
    checked: list[tuple[RunRecord, Verification]],
) -> str:
    markdown = [f"# {title}", "Generated by `python -m fmbench.leaderboard` from `runs/`.", text]
    for condition, rows in tables.items():
        runs = [run for row in rows for run in row.runs]
        markdown += [f"## {generated.text(condition.title)}", *_accelerators(runs), _markdown_table(rows)]
    if of_records := [pair for pair in checked if pair[0] in records.values()]:
        markdown += ["## Trained again", _markdown_verified(of_records)]
    if marked := implausible(records):
        markdown += ["## Implausible", _markdown_implausible(records, marked)]
    if mixed := [record for record in records.values() if record.status == "completed" and record.mixture]:
        markdown += ["## Made under several conditions", _markdown_mixed(mixed)]
    if unfinished := [record for record in records.values() if record.status != "completed"]:
        markdown += ["## Not finished", markdown_unfinished(unfinished)]
    return "\n\n".join(part.strip() for part in markdown) + "\n"


def is_ranked(record: RunRecord) -> bool:
    """Whether a record is on Fashion-MNIST, and not on its sample or on other data of its shape."""
    return record.data_version != "sample" and not proof.is_unproven(record.data_version)


def condition_of(record: RunRecord) -> Condition:
    """The condition a run was made under."""
    environment = record.environment
    device = environment.machine_title if environment.device_platform == "cpu" else environment.device_kind
    limits = {a.power_limit_watts for a in environment.accelerators or () if a.power_limit_watts}
    if limits:  # a GPU that is held to fewer watts is a slower one
        device += f" ({', '.join(f'{limit:.0f} W' for limit in sorted(limits))})"
    return Condition(
        record.data_version,
        device,
        environment.num_devices,
        record.dtype,
        record.trained_with,
        environment.num_processes,
        environment.num_hosts or 1,
        environment.shared_by or 1,
    )


def entries_by_condition(records: dict[Path, RunRecord]) -> dict[Condition, list[dict[Path, RunRecord]]]:
    """The completed runs on Fashion-MNIST: condition by condition the entries, each in the order of its seeds.

    Raises:
        UserError: If runs on different data, or of different configs, would be taken together.
    """
    return _by_condition({path: record for path, record in records.items() if is_ranked(record)})


def rows_by_condition(records: dict[Path, RunRecord]) -> dict[Condition, list[Row]]:
    """As `entries_by_condition`, which raises the same, from best to worst, with ranks."""
    return {condition: _ranked(entries) for condition, entries in entries_by_condition(records).items()}


def _by_condition(records: dict[Path, RunRecord]) -> dict[Condition, list[dict[Path, RunRecord]]]:
    marked = implausible(records)
    counted = {
        path: record
        for path, record in records.items()
        if record.status == "completed" and path not in marked and not record.mixture
    }
    conditions = {}
    for condition, group in sorted(_group(counted, condition_of).items()):
        _check_same_data(group)
        conditions[condition] = list(
            _group(group, lambda record: (record.entry, record.environment.software)).values()
        )
        for runs in conditions[condition]:
            _check_same_config(runs)
    return conditions


def _group(records: dict[Path, RunRecord], key: Callable[[RunRecord], Any]) -> dict[Any, dict[Path, RunRecord]]:
    """The records by key, each group in the order of its seeds."""
    groups: dict[Any, dict[Path, RunRecord]] = defaultdict(dict)
    for path in sorted(records, key=lambda path: records[path].seed):
        groups[key(records[path])][path] = records[path]
    return groups


def _check_same_data(records: dict[Path, RunRecord]) -> None:
    first, *others = sorted(records)
    for path in others:
        if records[path].data_sha256 != records[first].data_sha256:  # the old data cannot be proven
            raise UserError(
                f"{first} and {path.name} were made on different data, both called version "
                f"{records[path].data_version!r}; one is altered. Delete its records."
            )


def _check_same_config(runs: dict[Path, RunRecord]) -> None:
    first, *others = runs
    for path in others:
        if difference := config.difference(_measured(runs[first]), _measured(runs[path])):
            raise UserError(
                f"{first} and {path.name} are runs of different configs ({difference}); they make no row. "
                "Run the older one again."
            )


def _ranked(entries: list[dict[Path, RunRecord]]) -> list[Row]:
    """The entries of one condition from best to worst; seeds of one entry make one row."""
    compared = [(correct(runs), list(runs.values())) for runs in entries]
    compared.sort(key=lambda entry: (-entry[0].mean(), entry[1][0].entry))
    ranks = shared_ranks([of_entry for of_entry, _ in compared])
    return [Row(rank, runs) for rank, (_, runs) in zip(ranks, compared, strict=True)]


def correct(runs: dict[Path, RunRecord]) -> np.ndarray:
    """Which test images each of an entry's completed runs got right, bool (seeds, num_test).

    Raises:
        UserError: If predictions or labels can't be had.
    """
    return np.stack(
        [
            store.read_predictions(run, path.with_suffix(".npy")) == true_labels(path, run)
            for path, run in runs.items()
        ]
    )


def _measured(run: RunRecord) -> dict[str, Any]:
    """What the runs of one row must share: the config but for the seed and the data's place, and the model."""
    place = {"data.source": None, "data.dir": None, "data.unproven": None}  # they are of one version
    return config.complete(run.config) | place | {"seed": None, "num_params": run.num_params}


def true_labels(path: Path, record: RunRecord) -> np.ndarray:
    """The true test labels of the record's data; `path` is the record's, <results_dir>/runs/<name>.json."""
    if store.has_own_labels(record):
        return store.read_labels(record, path.parents[1])
    if record.data_version in proof.SHA256:  # else there is nothing to look for, in the network perhaps
        dataset = fashion_mnist.load_once("sample" if record.data_version == "sample" else "tfds")
        here = (dataset.version, dataset.sha256, len(dataset.test_labels))
        if here == (record.data_version, record.data_sha256, record.num_test):
            return dataset.test_labels
    raise UserError(f"{record.name} was made on data of version {record.data_version}, not at hand here.")


def _markdown_table(rows: list[Row]) -> str:
    """The table of one condition."""
    lines = [
        "| rank | entry | params | test accuracy, % | val. accuracy, % | train time, s | core-seconds "
        "| to 90 / 92 / 94 %, s | images/s | compile, s |",
        "|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for rank, runs in rows:
        first = runs[0]
        mark = code_mark(runs)
        cells = [
            "n = 1" if rank is None else str(rank),
            f"{generated.link(first.entry, first.config_file, '../')}{mark}",
            f"{first.num_params:,}",
            f"{_percent([run.test_accuracy for run in runs])} ({len(runs)})",
            _percent([run.val_accuracy for run in runs]),
            *(["-"] * 5 if first.environment.shared_by else _times(runs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += code_notes([run for row in rows for run in row.runs])
    if mixed := [f"{row.runs[0].entry}: {mix}" for row in rows if (mix := what_differs(row.runs))]:
        lines += ["", f"Seeds of one row that differ: {'. '.join(mixed)}."]
    return "\n".join(lines)


def _times(runs: list[RunRecord]) -> list[str]:
    """Training time, core-seconds, time to targets, speed and compile time."""
    return [
        _median_text([run.train_seconds for run in runs]),
        _median_text([run.train_core_seconds for run in runs]) + (" busy" if any(map(is_busy, runs)) else ""),
        _targets_text(runs),
        f"{statistics.median(run.train_images_per_sec or 0 for run in runs):,.0f}",
        compile_text(runs),
    ]


def code_mark(runs: list[RunRecord]) -> str:
    """Behind an entry's name, if the code of a run is not exactly a commit, or not known to be one."""
    dirty = {run.environment.git_dirty for run in runs}
    return (" \\*" if True in dirty else "") + (" ‡" if None in dirty else "")


def code_notes(runs: list[RunRecord]) -> list[str]:
    """Lines below a table that explain the marks of `code_mark` in it."""
    lines = []
    if any(run.environment.git_dirty for run in runs):
        lines += ["", "\\* Trained from code that is not exactly a commit."]
    unknown = [
        run.environment.git_unknown or "git did not say" for run in runs if run.environment.git_dirty is None
    ]
    if unknown:
        lines += [
            "",
            f"‡ Whether the code is a commit's is not known ({generated.text('; '.join(sorted(set(unknown))))}).",
        ]
    return lines


def _accelerators(runs: list[RunRecord]) -> list[str]:
    """A sentence on the driver, the libraries and the clocks behind a table; on CPUs there is none."""
    used = [accelerator for run in runs for accelerator in run.environment.accelerators or ()]
    parts = []
    for name in ("NVIDIA driver", "CUDA", "cuDNN"):
        if versions := {run.environment.versions[name] for run in runs if name in run.environment.versions}:
            parts.append(generated.text(f"{name} {', '.join(sorted(versions))}"))
    for name, field in {"SM": "sm_clock_mhz", "memory": "memory_clock_mhz"}.items():
        if clocks := {clock for accelerator in used if (clock := getattr(accelerator, field))}:
            span = " to ".join(str(clock) for clock in sorted({min(clocks), max(clocks)}))
            parts.append(f"{name} clock {span} MHz at the runs' ends")
    return [f"{'; '.join(parts)}."] if parts else []


def _percent(fractions: list[float | None]) -> str:
    known = [fraction for fraction in fractions if fraction is not None]
    if not known:
        return "-"
    mean, std = mean_and_std(known)
    return f"{100 * mean:.2f}" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f}"


def _median_text(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):,.1f}"


def _targets_text(runs: list[RunRecord]) -> str:
    if runs[0].watched is None:
        return "-"
    medians = [_median_time_to(target, runs) for target in TARGETS]
    text = " / ".join("miss" if median is None else f"{median:,.1f}" for median in medians)
    return f"{text} (test)" if runs[0].watched == "test" else text


def _median_time_to(target: str, runs: list[RunRecord]) -> float | None:
    return median_with_misses([run.time_to_target[target] for run in runs])


def compile_text(runs: list[RunRecord]) -> str:
    """Median of the cold compile times in seconds, or 'cached', if there was none."""
    cold = [run.compile_seconds for run in runs if not run.compile_cached]
    return _median_text(cold) if cold else "cached"


def _median_of(name: str, runs: list[RunRecord]) -> float:
    return statistics.median(getattr(run, name) or 0 for run in runs)


def _markdown_verified(checked: list[tuple[RunRecord, Verification]]) -> str:
    lines = ["Of these records the run was trained once more, whole or its first epochs, by `fmbench.verify`."]
    lines += ["", "| entry | seed | epochs | found | on | commit | when |", "|:--|--:|--:|:--|:--|:--|:--|"]
    for record, verification in checked:
        here = verification.environment
        commit = (here.git_commit or "not known")[:7] + ("" if here.git_dirty is False else " \\*")
        cells = [record.entry, str(record.seed), f"{verification.num_epochs} of {record.num_epochs}"]
        cells += [verification.found, here.machine_title, commit, verification.created[:10]]
        lines.append(f"| {' | '.join(map(generated.text, cells))} |")
    return "\n".join(lines)


def _markdown_implausible(records: dict[Path, RunRecord], why: dict[Path, str]) -> str:
    lines = [
        "No training is known to leave the like of these, so they have no rank ([rules](../docs/measuring.md))."
    ]
    lines += ["", "| entry | seed | test accuracy, % | implausible: why |", "|:--|--:|--:|:--|"]
    for path, reason in sorted(why.items()):
        record = records[path]
        lines.append(f"| {record.entry} | {record.seed} | {_percent([record.test_accuracy])} | {reason} |")
    return "\n".join(lines)


def _markdown_mixed(records: list[RunRecord]) -> str:
    lines = [
        "The processes that made these differ in code, libraries, machine or settings, so their times are no "
        "machine's, and they have no rank.",
        "",
        "| entry | seed | test accuracy, % | processes | in what they differ |",
        "|:--|--:|--:|--:|:--|",
    ]
    for record in records:
        cells = [record.entry, str(record.seed), _percent([record.test_accuracy]), str(len(record.processes))]
        lines.append(f"| {' | '.join([*cells, generated.text(record.mixture)])} |")
    return "\n".join(lines)


def markdown_unfinished(records: list[RunRecord]) -> str:
    """A table of runs that were not completed."""
    lines = ["| entry | seed | status | epochs |", "|:--|--:|:--|--:|"]
    for record in records:
        planned = record.config["num_epochs"]
        lines.append(f"| {record.entry} | {record.seed} | {record.status} | {record.num_epochs} of {planned} |")
    return "\n".join(lines)


def _csv(tables: dict[Condition, list[Row]]) -> str:
    """One line per entry and condition, with plain numbers: fractions and seconds."""
    lines = []
    for condition, rows in tables.items():
        for rank, runs in rows:
            first = runs[0]
            is_timed = first.environment.shared_by is None
            test_mean, test_std = mean_and_std([run.test_accuracy or 0.0 for run in runs])
            val = [run.val_accuracy for run in runs if run.val_accuracy is not None]
            lines.append(
                condition._asdict()
                | {
                    "rank": rank,
                    "entry": first.entry,
                    "config_file": first.config_file,
                    "model": first.model,
                    "num_params": first.num_params,
                    "num_seeds": len(runs),
                    "test_accuracy": test_mean,
                    "test_accuracy_std": test_std,
                    "val_accuracy": mean_and_std(val)[0] if val else None,
                    **{name: _median_of(name, runs) if is_timed else None for name in TIMES},
                    "compile_cached": all(run.compile_cached for run in runs),
                    "watched": first.watched,
                }
                | {f"time_to_{target}": _median_time_to(target, runs) if is_timed else None for target in TARGETS}
            )
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: generated.cell(value) for key, value in line.items()} for line in lines)
    return text.getvalue()

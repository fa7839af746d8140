"""results/index.html: the leaderboard as one page for a browser, which asks nothing of a network.

Its data stand in it as JSON, a line for each entry, run and picture, so that a new record changes few lines.
"""

import base64
import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmbench.data import fashion_mnist, proof
from fmbench.pages import generated, leaderboard
from fmbench.pages.leaderboard import Condition, Row
from fmbench.records import store
from fmbench.records.load import is_busy
from fmbench.records.schema import RunRecord
from fmbench.records.statistics import mean_and_std

MOST_WRONG, MOST_NEVER_RIGHT = 8, 100  # pictures of an entry, and of all runs
DIGITS = 5  # of fractions and losses

Json = dict[str, Any]
# Number in the test set, true class, predicted class, and how many runs are wrong, or predict that.
Mistake = tuple[int, int, int, int]


def files(results_dir: Path, tables: dict[Condition, list[Row]]) -> dict[Path, str]:
    """The page; `tables` are those of `leaderboard.rows_by_condition`, of the records in `results_dir`.

    Raises:
        UserError: If predictions, labels or the images that are shown can't be had.
    """
    return {results_dir / "index.html": html(content(results_dir, tables))}


def html(data: Json) -> str:
    """The page around its data.

    The browser runs no other script than the page's two and loads nothing: a policy in its head says so.
    """
    library, _, _ = _read("chart.umd.min.js").rpartition("//# sourceMappingURL")
    parts = {"style": _read("page.css"), "library": library, "script": _read("page.js"), "data": _json(data)}
    parts["hashes"] = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode()}'"
        for name in ("library", "script")
    )
    return re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], _read("page.html"))


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _json(data: Json) -> str:
    """JSON that ends no script element and holds only ASCII; each item of the outer lists is a line."""
    parts = []
    for name, value in data.items():
        if isinstance(value, list):
            lines = ",\n".join(map(json.dumps, value))
            parts.append(f'"{name}": [\n{lines}\n]')
        elif name == "images":
            lines = ",\n".join(f'"{index}": "{pixels}"' for index, pixels in value.items())
            parts.append(f'"{name}": {{\n{lines}\n}}')
        else:
            parts.append(f'"{name}": {json.dumps(value)}')
    text = "{" + ",\n".join(parts) + "}"
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def content(results_dir: Path, tables: dict[Condition, list[Row]]) -> Json:
    """What the page knows; fractions lie in [0, 1], seconds are wall seconds."""
    standard = any(condition.data_version == proof.STANDARD for condition in tables)
    # Pictures and what no run gets right are of today's data alone.
    images = fashion_mnist.load_once("tfds").test_images if standard else np.zeros((0, 28, 28), np.uint8)
    entries, runs = [], []
    every_wrong, labels_of_today = [], np.zeros(0, np.uint8)
    for condition, rows in tables.items():
        first = rows[0].runs[0]  # whose data are those of all
        labels = leaderboard.true_labels(results_dir / "runs" / first.name, first)
        for row in rows:
            paths = [results_dir / "runs" / f"{run.name}.json" for run in row.runs]
            predictions = np.stack(
                [
                    store.read_predictions(run, path.with_suffix(".npy"))
                    for path, run in zip(paths, row.runs, strict=True)
                ]
            )
            has_images = condition.data_version == proof.STANDARD and len(images) == len(labels)
            wrong = _most_often_wrong(predictions, labels) if has_images else []
            entries.append(_entry(condition, row) | {"confusion": _confusion(predictions, labels), "wrong": wrong})
            runs += [_run(run, entries[-1]["key"]) for run in row.runs]
            if has_images:
                every_wrong.append(predictions)
                labels_of_today = labels
    never_right = _never_right(every_wrong, labels_of_today)
    shown = {
        index for mistakes in (never_right["images"], *(e["wrong"] for e in entries)) for index, *_ in mistakes
    }
    return {
        "classes": list(fashion_mnist.CLASS_NAMES),
        "num_test": len(labels_of_today),
        "never_right": never_right,
        "entries": entries,
        "runs": runs,
        "images": {index: _packed(images[index]) for index in sorted(shown)},
    }


def _entry(condition: Condition, row: Row) -> Json:
    runs, first = row.runs, row.runs[0]
    test_mean, test_std = mean_and_std([run.test_accuracy or 0.0 for run in runs])
    val = [run.val_accuracy for run in runs if run.val_accuracy is not None]
    features = first.config.get("features")  # which older records don't have
    return {
        "key": first.name,
        "entry": first.entry,
        "condition": generated.one_line(condition.title),
        "data_version": condition.data_version,
        "dtype": first.dtype,
        "rank": row.rank,
        "num_seeds": len(runs),
        "test_accuracy": round(test_mean, DIGITS),
        "test_std": _round(test_std),
        "val_accuracy": _round(mean_and_std(val)[0] if val else None),
        "num_params": first.num_params,
        "num_epochs": first.num_epochs,
        "train_seconds": round(statistics.median(run.train_seconds for run in runs), 2),
        "core_seconds": round(statistics.median(run.train_core_seconds for run in runs), 2),
        "busy": any(map(is_busy, runs)),
        "flops": first.flops_per_image * first.batch_size * first.num_steps,
        "competes": not (features and features["backbone"]),  # else the costs are a head's alone
        "watched": first.watched,
        "model": generated.one_line(first.model),
        "config_file": generated.one_line(first.config_file),
        "software": [generated.one_line(version) for version in first.environment.software],
    }


def _run(run: RunRecord, entry: str) -> Json:
    history = run.history
    held_out = "test" if run.watched == "test" else "val"
    seconds = np.cumsum([epoch.train_core_seconds for epoch in history])
    curves = {
        f"{ours}_{quantity}": [_round(getattr(epoch, f"{split}_{quantity}")) for epoch in history]
        for ours, split in (("train", "train"), ("held_out", held_out))
        for quantity in ("loss", "accuracy")
    }
    return {
        "name": run.name,
        "of": entry,
        "seed": run.seed,
        "test_accuracy": run.test_accuracy,
        "curves": curves | {"core_seconds": [round(float(value), 2) for value in seconds]},
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def _confusion(predictions: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """How often each true class (row) was predicted as each class (column), over all runs."""
    counts = np.zeros((256, 256), int)  # for they are bytes, in strangers' files any
    np.add.at(counts, (np.broadcast_to(labels, predictions.shape), predictions), 1)
    num_classes = len(fashion_mnist.CLASS_NAMES)
    return counts[:num_classes, :num_classes].tolist()


def _most_often_wrong(predictions: np.ndarray, labels: np.ndarray) -> list[Mistake]:
    """The images that most of the runs get wrong; of equals the first."""
    times = (predictions != labels).sum(axis=0)
    order = np.argsort(-times, kind="stable")[:MOST_WRONG]
    return [(*_mistake(predictions, labels, index)[:3], int(times[index])) for index in order if times[index]]


def _never_right(every: Sequence[np.ndarray], labels: np.ndarray) -> Json:
    """Of the images that every run gets wrong: how many there are, and the first of them."""
    if not every:
        return {"runs": 0, "count": 0, "images": []}
    predictions = np.concatenate(every)
    indices = np.flatnonzero((predictions != labels).all(axis=0))
    mistakes = [_mistake(predictions, labels, index) for index in indices[:MOST_NEVER_RIGHT]]
    return {"runs": len(predictions), "count": len(indices), "images": mistakes}


def _mistake(predictions: np.ndarray, labels: np.ndarray, index: int) -> Mistake:
    """With the wrong class that most runs predict, of equals the first, and how many do."""
    wrong: Iterable[int] = (int(label) for label in predictions[:, index] if label != labels[index])
    predicted, times = min(Counter(wrong).items(), key=lambda item: (-item[1], item[0]))
    return int(index), int(labels[index]), predicted, times


def _packed(image: np.ndarray) -> str:
    """28 x 28 pixels of 16 grey levels, two a byte, in base64: compressed, they'd depend on zlib's version."""
    levels = np.round(image.reshape(-1, 2) / 17.0).astype(np.uint8)
    return base64.b64encode((levels[:, 0] << 4 | levels[:, 1]).tobytes()).decode()

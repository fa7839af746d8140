"""What every kind of fault needs: undisturbed runs to compare with, commands, and judgement of how they end."""

import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from children import TIMEOUT, Child, Result, Zygote, start

from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.models import exported, split_model
from fmbench.records import store

REPOSITORY = Path(__file__).parents[2]
NUM_EPOCHS, STEPS_PER_EPOCH = 4, 11
SMALL_RUN = (
    "--config=mlp",
    "--config.data.source=sample",
    "--config.data.split=default",
    "--config.watch=validation",
    "--config.batch_size=40",
    f"--config.num_epochs={NUM_EPOCHS}",
)
CONVOLUTIONS = (
    "--config=cnn2",
    "--config.data.source=sample",
    "--config.data.split=default",
    "--config.batch_size=8",
    "--config.num_epochs=2",
)

Outcome = Literal["survived", "lost", "hung", "believed", "traceback"]


class Verdict(NamedTuple):
    """What became of a fault.

    'survived': everything is right, at once or after one line that says what is wrong and what helps did help;
    'lost': more work than the current epoch is gone, or the command does not go on; 'hung'; 'believed': wrong
    numbers, and exit code 0; 'traceback': or an abort, or an exit code that means nothing.
    """

    outcome: Outcome
    detail: str = ""
    inputs: int = 1  # tried


class Kind(NamedTuple):
    """A row of the table."""

    title: str
    cases: Callable[["References"], Iterable[str]]  # names, by which each is tried again alike
    attempt: Callable[["Scene", str], Verdict]
    obstacle: Callable[[], str] = lambda: ""  # why this machine cannot cause it


def numbered(count: int) -> Callable[["References"], Iterable[str]]:
    return lambda _: map(str, range(count))


def listed(*names: str) -> Callable[["References"], Iterable[str]]:
    return lambda _: names


class References(NamedTuple):
    """Undisturbed runs, in folders with `work` and `results` each; never written to."""

    folder: Path

    @property
    def finished(self) -> Path:
        return self.folder / "finished"

    @property
    def half(self) -> Path:
        """The same run, killed in its fourth epoch."""
        return self.folder / "half"

    @property
    def foreign(self) -> Path:
        """Another seed's, finished."""
        return self.folder / "foreign"

    @property
    def foreign_half(self) -> Path:
        return self.folder / "foreign_half"

    @property
    def convolutions(self) -> Path:
        return self.folder / "convolutions"

    @property
    def picture(self) -> Path:
        return self.folder / "picture.png"

    @property
    def data_cache(self) -> Path:
        """FMBENCH_CACHE, filled with the sample in the place of the whole data set."""
        return self.folder / "data_cache"


class Scene:
    """Where a fault is tried: an empty folder, and commands to run there."""

    def __init__(self, warm: Zygote, references: References, folder: Path, seed: str):
        self.warm, self.references, self.folder = warm, references, folder
        self.rng = random.Random(seed)
        home = folder / "home"
        home.mkdir(parents=True)
        folder.chmod(0o755)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(REPOSITORY),
            "FMBENCH_CACHE": str(references.folder / "cache"),
        }

    def start(self, module: str, *args: str | Path, fresh: bool = False, **settings: Any) -> Child:
        env = {**self.env, **settings.pop("env", {})}
        env = {name: value for name, value in env.items() if value is not None}
        return start(None if fresh else self.warm, self.folder, module, *map(str, args), env=env, **settings)

    def run(self, module: str, *args: str | Path, timeout: float = TIMEOUT, **settings: Any) -> Result:
        with self.start(module, *args, **settings) as child:
            return child.wait(timeout)

    def train(self, *more: str, place: Path | None = None, run: tuple[str, ...] = SMALL_RUN, **settings) -> Result:
        return self.run("fmbench.main", *run, *places(place or self.folder), *more, **settings)

    def copy(self, reference: Path) -> None:
        """Lays a reference's work directory and results into the folder."""
        for name in ("work", "results"):
            if (reference / name).exists():
                shutil.copytree(reference / name, self.folder / name, symlinks=True)


def places(folder: Path) -> tuple[str, str]:
    return f"--workdir={folder / 'work'}", f"--results_dir={folder / 'results'}"


def prepare(warm: Zygote, folder: Path) -> References:
    """Makes the undisturbed runs."""
    references = References(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def train(where: Path, *flags: str, stop_at: int | None = None) -> None:
        scene = Scene(warm, references, where, "")
        under = str(where / "work" / "checkpoints" / str(stop_at))
        die = {"number": 1, "under": under} if stop_at else None
        result = scene.train(*flags[1:], run=SMALL_RUN if flags[0] == "mlp" else CONVOLUTIONS, die=die)
        if result.code != (-signal.SIGKILL if stop_at else 0):
            raise RuntimeError(f"the undisturbed run {where.name} ended with {result.code}: {result.err}")
        for unfinished in (where / "work" / "checkpoints").glob("[!0-9]*"):  # what damage is in vain for
            shutil.rmtree(unfinished)

    last = NUM_EPOCHS * STEPS_PER_EPOCH
    train(references.finished, "mlp")
    train(references.half, "mlp", stop_at=last)
    train(references.foreign, "mlp", "--config.seed=1")
    train(references.foreign_half, "mlp", "--config.seed=1", stop_at=last)
    train(references.convolutions, "cnn")
    import PIL.Image

    image = fashion_mnist.load("sample").test_images[0]
    PIL.Image.fromarray(image).save(references.picture)
    scene = Scene(warm, references, references.folder / "datasets", "")
    result = prepare_data(scene, references.data_cache)
    if result.code != 0:
        raise RuntimeError(f"the sample did not pass for the whole data set: {result.err}")
    return references


def prepare_data(scene: Scene, cache: Path, *args: str, **settings: Any) -> Result:
    """`python -m fmbench.datasets`, from the idx files of the sample to arrays in the cache."""
    env = {"FMBENCH_CACHE": str(cache), "FMBENCH_DATA_DIR": str(fashion_mnist.SAMPLE_DIRECTORY)}
    env |= settings.pop("env", {})
    return scene.run("fmbench.datasets", *args, env=env, small_data=True, **settings)


# Judgement.

MOST_MEMORY = 1 << 30  # bytes
TROUBLE = re.compile(r"Traceback \(most recent call|Fatal Python error|^Exception ignored|terminate called", re.M)


def trouble(result: Result, *codes: int) -> Verdict | None:
    """What is wrong with how a command ended, whatever it was asked; None if nothing."""
    if result.code is None:
        return Verdict("hung", result.last_line)
    if result.memory > MOST_MEMORY:
        return Verdict("traceback", f"{result.memory / 2**30:.1f} GiB of memory: {result.last_line}")
    if result.code < 0 and result.code not in codes:
        return Verdict("traceback", f"ended by {signal.Signals(-result.code).name}: {result.last_line}")
    if TROUBLE.search(result.err):
        ours = re.findall(r'File ".*?(fmbench/\S+)", line \d+, in (\S+)', result.err)
        where = f" ({ours[-1][0]}, {ours[-1][1]})" if ours else ""
        last = next((line for line in reversed(result.err.splitlines()) if re.match(r"\w[\w.]*: ", line)), "")
        return Verdict("traceback", f"{last or result.last_line}{where}")
    if result.code not in codes:
        return Verdict("traceback", f"exit code {result.code}: {result.last_line}")
    if result.code == 2 and not re.match(r"fmbench\S*: ", result.last_line):
        return Verdict("traceback", f"exit code 2, and no line of fmbench's: {result.last_line}")
    return None


def learned(work: Path) -> dict[str, Any]:
    """What a finished run must have alike, however it was disturbed.

    Raises:
        UserError: If its record or its model cannot be read.
    """
    record = store.read(work / "record.json")
    model, _ = exported.load_model(work)
    metrics = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return {
        "status": record.status,
        "predictions": store.read_predictions(record, work / "record.npy").tobytes(),
        "losses": [epoch.train_loss for epoch in record.history],
        "validation": [epoch.val_loss for epoch in record.history],
        "parameters": [np.asarray(leaf).tobytes() for leaf in _leaves(split_model(model)[1:])],
        "metrics": [line["step"] for line in metrics],
    }


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def compare(folder: Path, reference: Path) -> Verdict:
    """Whether the finished run in a folder, and what it published, are the reference's."""
    try:
        found, expected = learned(folder / "work"), learned(reference / "work")
        (published,) = (folder / "results" / "runs").glob("*.json")
        if (
            store.read(published).predictions_sha256
            != store.read(reference / "work/record.json").predictions_sha256
        ):
            return Verdict("believed", f"{published.name} is another run's")
        store.read_predictions(store.read(published), published.with_suffix(".npy"))
    except (UserError, OSError, ValueError) as error:
        return Verdict("lost", f"{type(error).__name__}: {error}")
    for name in ("losses", "validation"):  # sums of an epoch's halves
        if len(found[name]) == len(expected[name]) and np.allclose(
            found[name], expected[name], rtol=1e-12, atol=0
        ):
            found[name] = expected[name]
    if found["metrics"] != expected["metrics"]:
        return Verdict("lost", f"metrics.jsonl has the steps {found['metrics']}")
    differing = [name for name in expected if found[name] != expected[name]]
    if differing:
        return Verdict("believed", f"other {', '.join(differing)} than the undisturbed run's")
    return Verdict("survived")


def epochs_told(result_or_child: Result | Child) -> list[int]:
    """The epochs that a run has told of."""
    return [int(epoch) for epoch in re.findall(r"^epoch (\d+)/", result_or_child.err, re.M)]


def goes_on(
    scene: Scene, done: int, reference: Path | None = None, run: tuple[str, ...] = SMALL_RUN, **settings: Any
) -> Verdict:
    """Runs the same command again, which must end as the undisturbed run.

    Args:
        scene: With `work` and `results` in its folder.
        done: Epochs whose work must not be done again.
        reference: The undisturbed run.
        run: The command's flags.
    """
    result = scene.train(run=run, **settings)
    if wrong := trouble(result, 0, 2):
        return wrong
    if result.code == 2:
        return Verdict("lost", f"does not go on: {result.last_line}")
    first = min(epochs_told(result), default=sys.maxsize)
    verdict = compare(scene.folder, reference or scene.references.finished)
    if verdict.outcome == "survived" and first <= done:
        return Verdict("lost", f"begins with epoch {first}, though {done} were done")
    return verdict


def refused(result: Result, *names: str) -> Verdict:
    """That a command refused, with one line that has one of the names in it."""
    if wrong := trouble(result, 2):
        if result.code == 0 and wrong.detail.startswith("exit code 0"):
            return Verdict("believed", (result.out.strip().splitlines() or [result.last_line])[0][:160])
        return wrong
    if names and not any(name in result.last_line for name in names):
        return Verdict("traceback", f"a line that names none of {', '.join(names)}: {result.last_line}")
    return Verdict("survived", result.last_line)

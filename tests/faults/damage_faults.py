"""Every file below a work directory, of the results and of the data cache, damaged in every way."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kill_faults import prepared
from scene import (
    NUM_EPOCHS,
    STEPS_PER_EPOCH,
    Kind,
    References,
    Scene,
    Verdict,
    compare,
    goes_on,
    listed,
    prepare_data,
    refused,
    trouble,
)


def delete(path: Path, rng: random.Random, foreign: Path) -> None:
    path.unlink()


def cut(path: Path, rng: random.Random, foreign: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def empty(path: Path, rng: random.Random, foreign: Path) -> None:
    os.truncate(path, 0)


def zero(path: Path, rng: random.Random, foreign: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path, rng: random.Random, foreign: Path) -> None:
    """One bit, as cosmic rays and bad cables do."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def take_foreign(path: Path, rng: random.Random, foreign: Path) -> None:
    """The same file of another run: of its name or, where names are hashes, of its place."""
    other = foreign if foreign.exists() else next(iter(sorted(foreign.parent.iterdir())))
    path.write_bytes(other.read_bytes())


def folder(path: Path, rng: random.Random, foreign: Path) -> None:
    path.unlink()
    path.mkdir()


MODES: dict[str, Callable[[Path, random.Random, Path], None]] = {
    "delete": delete,
    "cut": cut,
    "empty": empty,
    "zero": zero,
    "flip": flip,
    "foreign": take_foreign,
    "folder": folder,
}


def files_below(top: Path, *, without: tuple[str, ...] = (".lock",)) -> Iterator[str]:
    """Relative paths; what comes of the time or of chance in names is left to `find`."""
    for path in sorted(top.rglob("*")):
        if path.is_file() and path.name not in without:
            yield str(path.relative_to(top))


def cases_of(choose: Callable[[References], Path], *parts: str) -> Callable[[References], Iterable[str]]:
    """'file|mode', each file by its number in its folder, since some names are hashes."""

    def cases(references: References) -> Iterable[str]:
        top = choose(references)
        for number, name in enumerate(files_below(top)):
            if not name.startswith(parts):
                continue
            for mode in MODES:
                if (top / name).stat().st_size or mode in ("delete", "foreign", "folder"):
                    yield f"{number} {plain(name)} {mode}"

    return cases


def plain(name: str) -> str:
    """A name without what chance puts in it."""
    parts = Path(name).parts
    return "/".join("HASH" if len(part) == 32 else "events" if "tfevents" in part else part for part in parts)


def damage(scene: Scene, case: str, top: Path, foreign: Path) -> str:
    """Damages the case's file; returns its name."""
    number, _, mode = case.split()
    name = list(files_below(top))[int(number)]
    MODES[mode](top / name, scene.rng, foreign / name)
    return name


def unfinished(scene: Scene, case: str) -> Verdict:
    """A run that was killed in its last epoch: from the checkpoint before that at the latest."""
    scene.copy(scene.references.half)
    work = scene.folder / "work"
    name = damage(scene, case, work, scene.references.foreign_half / "work")
    if name.startswith("checkpoints"):
        return goes_on(scene, NUM_EPOCHS - 2)
    result = scene.train()
    if result.code == 2:
        return named_and_forced(scene, result, Path(name).name)
    if wrong := trouble(result, 0):
        return wrong
    return compare(scene.folder, scene.references.finished)


def named_and_forced(scene: Scene, result, *names: str) -> Verdict:
    """The refusal names the file, and --force does what it says."""
    verdict = refused(result, *names)
    if verdict.outcome != "survived":
        return verdict
    forced = scene.train("--force")
    return trouble(forced, 0) or compare(scene.folder, scene.references.finished)._replace(detail=verdict.detail)


def finished_record(scene: Scene, case: str) -> Verdict:
    """A finished run whose record, predictions or config is damaged: made again from its checkpoint, or named."""
    scene.copy(scene.references.finished)
    shutil.rmtree(scene.folder / "results")
    name = damage(scene, case, scene.folder / "work", scene.references.foreign / "work")
    result = scene.train()
    if result.code == 2:
        return named_and_forced(scene, result, Path(name).name)
    return trouble(result, 0) or compare(scene.folder, scene.references.finished)


def exported_model(scene: Scene, case: str) -> Verdict:
    """Refused or as it was; and the command that trained it makes it anew."""
    scene.copy(scene.references.finished)
    model, picture = scene.folder / "work" / "model", scene.references.picture
    damage(scene, case, model, scene.references.foreign / "work" / "model")
    predicted = scene.run("fmbench.predict", f"--model={scene.folder / 'work'}", "--json", picture)
    expected = scene.run("fmbench.predict", f"--model={scene.references.finished / 'work'}", "--json", picture)
    if wrong := trouble(predicted, 0, 2):
        return wrong
    if predicted.code == 0 and predicted.out != expected.out:
        return Verdict("believed", f"predicts {predicted.out[:120]}")
    return goes_on(scene, NUM_EPOCHS)


def published(scene: Scene, case: str) -> Verdict:
    """A damaged record in the results, or its predictions, is named; training mends both."""
    scene.copy(scene.references.finished)
    name = damage(scene, case, scene.folder / "results", scene.references.foreign / "results")
    left = scene.run("fmbench.leaderboard", f"--results_dir={scene.folder / 'results'}")
    if not (scene.folder / "results" / name).exists() and name.endswith(".json"):
        verdict = trouble(left, 0, 2) or Verdict("survived")  # without a record there is nothing to tell
    else:
        verdict = refused(left, Path(name).stem)
    if verdict.outcome != "survived":
        return verdict
    if (scene.folder / "results" / name).is_dir():
        return verdict
    return goes_on(scene, NUM_EPOCHS)


def data_cache_cases(references: References) -> Iterable[str]:
    """TFDS's files are read only where an array has to be made anew, so one way of damage is enough for them."""
    cases = cases_of(lambda references: references.data_cache, "")(references)
    return (case for case in cases if "/tfds/" not in case or case.endswith("delete"))


def data_cache(scene: Scene, case: str) -> Verdict:
    shutil.copytree(scene.references.data_cache, scene.folder / "cache")
    top = scene.folder / "cache"
    name = damage(scene, case, top, scene.references.data_cache)
    if case.endswith("folder"):  # somebody's, perhaps: not thrown away
        result = prepare_data(scene, top)
        if result.code == 2:
            return refused(result, Path(name).name)
    return prepared(scene, top)


# Folders and links where a checkpoint or a state should be.


def junk(scene: Scene, case: str) -> Verdict:
    scene.copy(scene.references.half)
    checkpoints = scene.folder / "work" / "checkpoints"
    newest = max(
        (path for path in checkpoints.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)
    )
    foreign = scene.references.foreign / "work" / "checkpoints"
    last = str(NUM_EPOCHS * STEPS_PER_EPOCH)
    match case:
        case "an empty folder 999":
            (checkpoints / "999").mkdir()
        case "a folder 999 with a text":
            (checkpoints / "999").mkdir()
            (checkpoints / "999" / "notes.txt").write_text("mine\n")
        case "a file 999":
            (checkpoints / "999").write_text("mine\n")
        case "a copy of the newest as 999":
            shutil.copytree(newest, checkpoints / "999")
        case "another run's last checkpoint beside it":
            shutil.copytree(foreign / last, checkpoints / last)
        case "another run's checkpoint in its place":
            shutil.rmtree(newest)
            shutil.copytree(scene.references.foreign_half / "work/checkpoints" / newest.name, newest)
        case "a folder with somebody's name":
            (checkpoints / "backup").mkdir()
            shutil.copytree(newest, checkpoints / "backup" / newest.name)
        case "a temporary folder of a killed process":
            shutil.copytree(newest, checkpoints / f"{last}.orbax-checkpoint-tmp-1234")
        case "a link to itself":
            (checkpoints / "999").symlink_to(checkpoints / "999")
        case "the newest is a link to another run's":
            shutil.rmtree(newest)
            newest.symlink_to(scene.references.foreign_half / "work/checkpoints" / newest.name)
    return goes_on(scene, NUM_EPOCHS - 2)


def all_gone(scene: Scene, case: str) -> Verdict:
    """More is damaged than anybody can mend: it is said, and --force, or starting anew, works."""
    scene.copy(scene.references.half)
    work = scene.folder / "work"
    match case:
        case "every checkpoint zeroed":
            for name in files_below(work / "checkpoints"):
                zero(work / "checkpoints" / name, scene.rng, work)
        case "every file zeroed":
            for name in files_below(work):
                zero(work / name, scene.rng, work)
        case "every file empty":
            for name in files_below(work):
                empty(work / name, scene.rng, work)
        case "no checkpoints, but metrics":
            shutil.rmtree(work / "checkpoints")
        case "checkpoints is a file":
            shutil.rmtree(work / "checkpoints")
            (work / "checkpoints").write_text("")
        case "checkpoints is a link to nowhere":
            shutil.rmtree(work / "checkpoints")
            (work / "checkpoints").symlink_to(work / "nowhere")
        case "config.json is another run's":
            shutil.copy(scene.references.foreign / "work/config.json", work / "config.json")
        case "config.json is deep":
            (work / "config.json").write_text("[" * 100_000)
        case "config.json is a list":
            (work / "config.json").write_text(json.dumps([1, 2]))
        case "config.json is not UTF-8":
            (work / "config.json").write_bytes(b"\xff\xfe{}")
    result = scene.train()
    if result.code == 2:
        verdict = refused(result)
        if verdict.outcome != "survived":
            return verdict
        result = scene.train("--force")
        if result.code == 2 and "files that are not a run's" in result.last_line:
            return Verdict("survived", result.last_line)  # what is no run's is not thrown away
    return trouble(result, 0) or compare(scene.folder, scene.references.finished)


KINDS = [
    Kind(
        "damage of a checkpoint's files, resuming",
        cases_of(lambda references: references.half / "work", "checkpoints/"),
        unfinished,
    ),
    Kind(
        "damage of an unfinished run's other files",
        cases_of(
            lambda references: references.half / "work", "config", "data", "metrics", "tensorboard", "record"
        ),
        unfinished,
    ),
    Kind(
        "damage of a finished run's record",
        cases_of(lambda references: references.finished / "work", "record", "config", "data.json", "metrics"),
        finished_record,
    ),
    Kind(
        "damage of an exported model",
        cases_of(lambda references: references.finished / "work/model", ""),
        exported_model,
    ),
    Kind(
        "damage of a published record",
        cases_of(lambda references: references.finished / "results", "runs"),
        published,
    ),
    Kind("damage of the data cache", data_cache_cases, data_cache),
    Kind(
        "junk among the checkpoints",
        listed(
            "an empty folder 999",
            "a folder 999 with a text",
            "a file 999",
            "a copy of the newest as 999",
            "another run's last checkpoint beside it",
            "another run's checkpoint in its place",
            "a folder with somebody's name",
            "a temporary folder of a killed process",
            "a link to itself",
            "the newest is a link to another run's",
        ),
        junk,
    ),
    Kind(
        "a work directory beyond mending",
        listed(
            "every checkpoint zeroed",
            "every file zeroed",
            "every file empty",
            "no checkpoints, but metrics",
            "checkpoints is a file",
            "checkpoints is a link to nowhere",
            "config.json is another run's",
            "config.json is deep",
            "config.json is a list",
            "config.json is not UTF-8",
        ),
        all_gone,
    ),
]

"""Full disks, files too large, permissions, few file handles: at every writer, and room again afterwards."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from kill_faults import prepared
from scene import (
    NUM_EPOCHS,
    SMALL_RUN,
    Kind,
    Scene,
    Verdict,
    compare,
    goes_on,
    listed,
    numbered,
    places,
    prepare_data,
    refused,
    trouble,
)


@cache
def not_root() -> str:
    return "" if os.getuid() == 0 else "only root may mount a file system"


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs below `folder`."""
    where = folder / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=False)


def more_room(where: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", where], check=True)


def full_work_directory(scene: Scene, case: str) -> Verdict:
    """One line; and with more room, the same command goes on."""
    with small_disk(scene.folder, int(case.split()[0])) as where:
        flags = f"--workdir={where / 'work'}", f"--results_dir={scene.folder / 'results'}"
        result = scene.run("fmbench.main", *SMALL_RUN, *flags)
        if wrong := trouble(result, 0, 2):
            return wrong
        more_room(where)
        again = scene.run("fmbench.main", *SMALL_RUN, *flags)
        if wrong := trouble(again, 0):
            return Verdict("lost", wrong.detail) if again.code == 2 else wrong
        shutil.copytree(where / "work", scene.folder / "work")
        return compare(scene.folder, scene.references.finished)


def full_results(scene: Scene, case: str) -> Verdict:
    with small_disk(scene.folder, int(case.split()[0])) as where:
        flags = f"--workdir={scene.folder / 'work'}", f"--results_dir={where}"
        result = scene.run("fmbench.main", *SMALL_RUN, *flags)
        if wrong := trouble(result, 0, 2):
            return wrong
        more_room(where)
        again = scene.run("fmbench.main", *SMALL_RUN, *flags)
        if wrong := trouble(again, 0):
            return Verdict("lost", wrong.detail) if again.code == 2 else wrong
        shutil.copytree(where, scene.folder / "results")
        return compare(scene.folder, scene.references.finished)


def full_page(scene: Scene, case: str) -> Verdict:
    """Where the leaderboard should go: the old one stays whole."""
    with small_disk(scene.folder, 400) as where:
        shutil.copytree(scene.references.finished / "results", where / "results")
        first = scene.run("fmbench.leaderboard", f"--results_dir={where / 'results'}")
        if wrong := trouble(first, 0):
            return wrong
        before = (where / "results/leaderboard.md").read_bytes()
        shutil.copytree(scene.references.foreign / "results", where / "results", dirs_exist_ok=True)
        with (where / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(512))
        result = scene.run("fmbench.leaderboard", f"--results_dir={where / 'results'}")
        if (where / "results/leaderboard.md").read_bytes() != before and result.code:
            return Verdict("lost", "the old page is gone")
        return trouble(result, 2) or Verdict("survived", result.last_line)


def full_cache(scene: Scene, case: str) -> Verdict:
    """The data cache, and XLA's of compiled programs."""
    with small_disk(scene.folder, int(case.split()[0])) as where:
        env = {"FMBENCH_CACHE": str(where / "cache")}
        if case.endswith("data"):
            result = prepare_data(scene, where / "cache")
            if wrong := trouble(result, 0, 2):
                return wrong
            more_room(where)
            return prepared(scene, where / "cache")
        result = scene.train(env=env)
        return trouble(result, 0) or compare(scene.folder, scene.references.finished)


def file_too_large(scene: Scene, case: str) -> Verdict:
    """What a command says is in a file as well, so that no less than that is allowed."""
    result = scene.train(limits={"RLIMIT_FSIZE": int(case.split()[0])})
    return trouble(result, 0, 2) or goes_on(scene, 0)


def few_handles(scene: Scene, case: str) -> Verdict:
    result = scene.train(limits={"RLIMIT_NOFILE": int(case)})
    return trouble(result, 0, 2) or goes_on(scene, 0)


def full_output(scene: Scene, case: str) -> Verdict:
    """Standard output is /dev/full: a line, and no exit code 0."""
    work, results = scene.references.finished / "work", scene.references.finished / "results"
    command: list[str]
    match case:
        case "predict":
            command = ["fmbench.predict", f"--model={work}", str(scene.references.picture)]
        case "evaluate":
            command = ["fmbench.evaluate", f"--model={work}"]
        case "leaderboard":
            command = ["fmbench.leaderboard", f"--results_dir={results}", "--check"]
            scene.copy(scene.references.finished)
            scene.run("fmbench.leaderboard", f"--results_dir={scene.folder / 'results'}")
            command[1] = f"--results_dir={scene.folder / 'results'}"
        case "help":
            command = ["fmbench.main", "--help"]
        case _:
            command = ["fmbench.datasets"]
    data = {"FMBENCH_CACHE": str(scene.references.data_cache)} if command[0].endswith("datasets") else {}
    result = scene.run(*command, stdout="/dev/full", env=data, small_data=bool(data))
    if result.code == 0:
        return Verdict("believed", "exit code 0, and nothing written")
    return trouble(result, 1, 2) or Verdict("survived", result.last_line)


def forbidden(scene: Scene, case: str) -> Verdict:
    """A user who has no right to something."""
    scene.copy(scene.references.half)
    reader = scene.references.finished / "work"
    cache_folder = scene.folder / "home" / "cache"
    scene.env["FMBENCH_CACHE"] = str(cache_folder)
    work = scene.folder / "work"
    flags = [*SMALL_RUN, *places(scene.folder)]
    target: Path
    match case:
        case "work directory not writable":
            target = work
        case "checkpoints not writable":
            target = work / "checkpoints"
        case "checkpoints not readable":
            target = work / "checkpoints"
            target.chmod(0)
        case "config.json not readable":
            target = work / "config.json"
            target.chmod(0)
        case "metrics.jsonl not writable":
            target = work / "metrics.jsonl"
        case "a checkpoint's file not readable":
            target = next(path for path in sorted((work / "checkpoints").rglob("*")) if path.is_file())
            target.chmod(0)
        case "results not writable":
            target = scene.folder / "results"
            target.mkdir()
        case "cache not writable":
            target = cache_folder
            target.mkdir()
        case "the folder above may not be entered":
            target = scene.folder / "closed"
            target.mkdir()
            target.chmod(0)
            flags = [*SMALL_RUN, *places(target)]
        case _:  # the model cannot be read
            target = scene.folder / "model"
            shutil.copytree(reader / "model", target)
            (target / "model.json").chmod(0)
            flags = []
    if target.stat().st_mode & 0o700:
        target.chmod(0o500 if target.is_dir() else 0o400)
    if flags:
        result = scene.run("fmbench.main", *flags, obedient=True)
        if result.code == 0:  # it could do without
            return compare(scene.folder, scene.references.finished)
    else:
        result = scene.run("fmbench.predict", f"--model={target}", scene.references.picture, obedient=True)
    verdict = refused(result)
    if verdict.outcome != "survived" or not flags:
        return verdict
    target.chmod(0o755)
    return goes_on(scene, NUM_EPOCHS - 2)._replace(detail=verdict.detail)


KINDS = [
    Kind(
        "a full disk under the work directory",
        listed(
            *(
                f"{size} kB"
                for size in (4, 16, 64, 256, 1000, 2000, 4000, 4500, 5000, 6000, 8000, 9000, 10000, 12000)
            )
        ),
        full_work_directory,
        not_root,
    ),
    Kind(
        "a full disk under the results", listed(*(f"{size} kB" for size in (4, 8, 12, 16))), full_results, not_root
    ),
    Kind("a full disk under a page", numbered(2), full_page, not_root),
    Kind(
        "a full disk under the caches",
        listed(
            *(f"{size} kB, {what}" for size in (4, 64, 300, 600, 900, 1200) for what in ("data",)),
            *(f"{size} kB, programs" for size in (4, 64, 300)),
        ),
        full_cache,
        not_root,
    ),
    Kind(
        "files may not be large (RLIMIT_FSIZE)",
        listed(
            *(
                f"{size} bytes"
                for size in (1000, 2000, 3000, 5000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 4_000_000)
            )
        ),
        file_too_large,
    ),
    Kind(
        "few file handles (RLIMIT_NOFILE)",
        listed(*map(str, (4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 64))),
        few_handles,
    ),
    Kind("standard output is full", listed("predict", "evaluate", "leaderboard", "help", "datasets"), full_output),
    Kind(
        "no permission",
        listed(
            "work directory not writable",
            "checkpoints not writable",
            "checkpoints not readable",
            "config.json not readable",
            "metrics.jsonl not writable",
            "a checkpoint's file not readable",
            "results not writable",
            "cache not writable",
            "the folder above may not be entered",
            "model.json not readable",
        ),
        forbidden,
    ),
]

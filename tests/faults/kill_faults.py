"""kill -9 at random moments and before random file operations, and the same command again."""

import shutil
import signal
import time
from pathlib import Path

from scene import (
    NUM_EPOCHS,
    SMALL_RUN,
    Kind,
    Scene,
    Verdict,
    compare,
    epochs_told,
    goes_on,
    numbered,
    places,
    prepare_data,
    trouble,
)

from fmbench.data.fashion_mnist import SAMPLE_DIRECTORY as SAMPLE

SECONDS = 1.5  # of an undisturbed command that was forked, on an idle machine


def done_for_certain(told: list[int]) -> int:
    """Epochs whose checkpoint is complete: the next one begins when it is."""
    return max(max(told, default=0) - 1, 0)


def killed_training(scene: Scene, case: str) -> Verdict:
    """At any moment from its start to its end."""
    with scene.start("fmbench.main", *SMALL_RUN, *places(scene.folder)) as child:
        child.is_running(scene.rng.uniform(0, SECONDS))
        child.kill()
        result = child.wait()
    verdict = goes_on(scene, done_for_certain(epochs_told(result)))
    return verdict._replace(detail=verdict.detail or f"killed after epoch {max(epochs_told(result), default=0)}")


def killed_at_an_epoch(scene: Scene, case: str) -> Verdict:
    """As soon as an epoch is told of, and a little later: training, evaluation, checkpoint."""
    epoch = scene.rng.randint(1, NUM_EPOCHS)
    with scene.start("fmbench.main", *SMALL_RUN, *places(scene.folder)) as child:
        while child.is_running(0.002) and epoch not in epochs_told(child):
            pass
        time.sleep(scene.rng.uniform(0, 0.15))
        child.kill()
        told = epochs_told(child.wait())
    verdict = goes_on(scene, done_for_certain(told))
    return verdict._replace(detail=verdict.detail or f"killed after epoch {max(told)} was told")


def killed_before_a_file_operation(folder: str, most: int):
    """Before the n-th change of a file below a folder; n is drawn anew, and lower, until there are so many."""

    def attempt(scene: Scene, case: str) -> Verdict:
        number = scene.rng.randint(1, most)
        die = {"number": number, "under": str(scene.folder / folder)}
        result = scene.train(die=die)
        if result.code == 0:  # there were not so many
            return Verdict("survived", f"fewer than {number} operations") if number == 1 else attempt(scene, case)
        if result.code != -signal.SIGKILL:
            return trouble(result, 0) or Verdict("survived")
        verdict = goes_on(scene, done_for_certain(epochs_told(result)))
        return verdict._replace(detail=verdict.detail or f"killed before operation {number}")

    return attempt


def killed_data_cache(scene: Scene, case: str) -> Verdict:
    cache = scene.folder / "cache"
    with_count = scene.rng.random() < 0.5
    die = {"number": scene.rng.randint(1, 40), "under": str(cache)} if with_count else None
    env = {"FMBENCH_CACHE": str(cache), "FMBENCH_DATA_DIR": str(SAMPLE)}
    with scene.start("fmbench.datasets", env=env, die=die, small_data=True) as child:
        child.is_running(SECONDS if with_count else scene.rng.uniform(0, SECONDS))
        child.kill()
        child.wait()
    return prepared(scene, cache)


def prepared(scene: Scene, cache: Path) -> Verdict:
    """Whether the cache can be filled, or is, and gives the proven arrays."""
    again = prepare_data(scene, cache)
    if wrong := trouble(again, 0, 2):
        return wrong
    if again.code:
        return Verdict("lost", again.last_line)
    expected = prepare_data(scene, scene.references.data_cache)
    hashes = [line.split()[-1] for line in again.out.splitlines() if "uint8" in line]
    if hashes != [line.split()[-1] for line in expected.out.splitlines() if "uint8" in line] or len(hashes) != 4:
        return Verdict("believed", again.out)
    left = [
        path.name for path in cache.rglob("*") if "unfinished" in path.name or path.name.startswith("incomplete")
    ]
    return Verdict("lost", f"left behind: {', '.join(left)}") if left else Verdict("survived")


def killed_twice(scene: Scene, case: str) -> Verdict:
    """Again while it goes on, at any moment."""
    done = 0
    for _ in range(3):
        with scene.start("fmbench.main", *SMALL_RUN, *places(scene.folder)) as child:
            child.is_running(scene.rng.uniform(0.6, SECONDS))
            child.kill()
            done = max(done, done_for_certain(epochs_told(child.wait())))
    return goes_on(scene, done)


def killed_python(scene: Scene, case: str) -> Verdict:
    """A process that was not forked: from Python's first moment on."""
    with scene.start("fmbench.main", *SMALL_RUN, *places(scene.folder), fresh=True) as child:
        child.is_running(scene.rng.uniform(0, 4))
        child.kill()
        result = child.wait()
    return goes_on(scene, done_for_certain(epochs_told(result)))


def forced_then_killed(scene: Scene, case: str) -> Verdict:
    """While --force throws away a finished run: what is left is taken for nothing else than it is."""
    shutil.copytree(scene.references.foreign / "work", scene.folder / "work")
    die = {"number": scene.rng.randint(1, 25), "under": str(scene.folder / "work")}
    scene.train("--force", die=die)
    result = scene.train("--force")
    return trouble(result, 0) or compare(scene.folder, scene.references.finished)


KINDS = [
    Kind("kill -9 in training, any moment", numbered(25), killed_training),
    Kind("kill -9 in training, about an epoch's end", numbered(20), killed_at_an_epoch),
    Kind("kill -9 three times in one run", numbered(5), killed_twice),
    Kind("kill -9 of a process from its first moment", numbered(5), killed_python),
    Kind("kill -9 in a checkpoint", numbered(15), killed_before_a_file_operation("work/checkpoints", 60)),
    Kind("kill -9 in the export", numbered(10), killed_before_a_file_operation("work/model", 8)),
    Kind("kill -9 in writing and publishing a record", numbered(10), killed_before_a_file_operation("results", 6)),
    Kind("kill -9 in anything a run writes", numbered(10), killed_before_a_file_operation("", 100)),
    Kind("kill -9 under --force", numbered(5), forced_then_killed),
    Kind("kill -9 in filling the data cache", numbered(15), killed_data_cache),
]

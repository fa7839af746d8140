"""Ctrl-C, SIGTERM and SIGSTOP, in convolutions, in the first second, twice, and in every command."""

import signal
import time
from pathlib import Path

from scene import (
    CONVOLUTIONS,
    SMALL_RUN,
    Kind,
    Scene,
    Verdict,
    compare,
    epochs_told,
    goes_on,
    listed,
    numbered,
    places,
    trouble,
)

LAYERS = str(Path(__file__).with_name("convolve.py"))


def wait_until(child, condition) -> None:
    while child.is_running(0.005) and not condition():
        pass


def in_a_convolution_of_layers(scene: Scene, case: str) -> Verdict:
    """A script that takes only the layers, catches KeyboardInterrupt, and must compute the same afterwards."""
    with scene.start(LAYERS, env={"JAX_COMPILATION_CACHE_DIR": scene.env["FMBENCH_CACHE"] + "/xla"}) as child:
        wait_until(child, lambda: "ready" in child.out)
        time.sleep(scene.rng.uniform(0, 0.3))
        child.send(signal.SIGINT)
        result = child.wait(30)
    if wrong := trouble(result, 0, 1):
        return wrong
    return Verdict("survived") if result.code == 0 else Verdict("believed", result.last_line)


def in_training(signum: int, again: bool = False):
    """In the steps of a net with convolutions: a checkpoint, exit code 130, and on to the same bits."""

    def attempt(scene: Scene, case: str) -> Verdict:
        with scene.start("fmbench.main", *CONVOLUTIONS, *places(scene.folder)) as child:
            wait_until(child, lambda: "trainable parameters" in child.err)
            time.sleep(scene.rng.uniform(0, 0.8))
            child.send(signum)
            if again:
                time.sleep(scene.rng.uniform(0, 0.1))
                child.send(signum)
            result = child.wait()
        if wrong := trouble(result, 0, 130):
            return wrong
        done = max(epochs_told(result), default=0) - again
        return goes_on(scene, done, scene.references.convolutions, CONVOLUTIONS)

    return attempt


def copied_results(scene: Scene) -> Path:
    scene.copy(scene.references.finished)
    return scene.folder / "results"


COMMANDS = {
    "evaluate": lambda scene: ["--model", scene.references.convolutions / "work"],
    "predict": lambda scene: [
        "--model",
        scene.references.convolutions / "work",
        *[scene.references.picture] * 5000,
    ],
    "figures": lambda scene: [f"--model={scene.references.convolutions / 'work'}", f"--output={scene.folder}"],
    "embed": lambda scene: [
        *(f"--model={scene.references.convolutions / 'work'}", f"--output={scene.folder}", "--num_images=200"),
    ],
    "datasets": lambda scene: [],
    "leaderboard": lambda scene: [f"--results_dir={copied_results(scene)}"],
    "cross_validate": lambda scene: [
        *("--config=cnn2", "--config.data.source=sample", "--config.num_epochs=1", "--folds=2"),
        *("--config.batch_size=40", f"--workdir={scene.folder / 'work'}"),
        f"--results_dir={scene.folder}",
    ],
}


def of_a_command(scene: Scene, case: str) -> Verdict:
    """At any moment: one line and exit code 130, or done."""
    name = case.split()[0]
    env = {"FMBENCH_CACHE": str(scene.references.data_cache)} if name == "datasets" else {}
    with scene.start(f"fmbench.{name}", *COMMANDS[name](scene), env=env, small_data=name == "datasets") as child:
        child.is_running(scene.rng.uniform(0.02, 1.5))
        child.send(signal.SIGINT)
        result = child.wait()
    return ended_politely(result)


def ended_politely(result) -> Verdict:
    if wrong := trouble(result, 0, 130):
        return wrong
    lines = [line for line in result.err.splitlines() if "interrupted" in line]
    if result.code == 130 and len(lines) != 1:
        return Verdict("traceback", f"exit code 130 and {len(lines)} lines: {result.last_line}")
    return Verdict("survived", result.last_line)


def in_the_first_second(scene: Scene, case: str) -> Verdict:
    """Of a process that was not forked. Until Python has reached fmbench, how it ends is Python's affair."""
    with scene.start("fmbench.main", *SMALL_RUN, *places(scene.folder), fresh=True) as child:
        child.is_running(scene.rng.uniform(0.05, 2))
        child.send(signal.SIGINT)
        result = child.wait()
    if result.code in (1, -signal.SIGINT) and "/fmbench/" not in result.err:
        return in_the_first_second(scene, case)
    if result.code == 0:
        return Verdict("believed", "trained on as if nothing had been")
    return trouble(result, 130) or goes_on(scene, max(epochs_told(result), default=0))


def stopped_and_continued(scene: Scene, case: str) -> Verdict:
    """As a laptop's lid does: the results are the same, and no time of training is the time asleep."""
    with scene.start("fmbench.main", *CONVOLUTIONS, *places(scene.folder)) as child:
        wait_until(child, lambda: "trainable parameters" in child.err)
        child.is_running(scene.rng.uniform(0, 0.5))
        child.send(signal.SIGSTOP)
        time.sleep(2)
        child.send(signal.SIGCONT)
        result = child.wait()
    return trouble(result, 0) or compare(scene.folder, scene.references.convolutions)


def while_another_runs(scene: Scene, case: str) -> Verdict:
    """The same command twice at once: one trains, the other says that it must wait."""
    with scene.start("fmbench.main", *SMALL_RUN, *places(scene.folder)) as child:
        child.is_running(scene.rng.uniform(0, 1))
        other = scene.train()
        result = child.wait()
    ends = sorted((result.code or 0, other.code or 0))
    for one in (result, other):
        if wrong := trouble(one, 0, 2):
            return wrong
    if ends == [2, 2]:
        return Verdict("lost", "both were refused")
    return compare(scene.folder, scene.references.finished)


KINDS = [
    Kind("Ctrl-C in a convolution, layers alone", numbered(30), in_a_convolution_of_layers),
    Kind("Ctrl-C in a convolution, training", numbered(20), in_training(signal.SIGINT)),
    Kind("Ctrl-C twice, training", numbered(5), in_training(signal.SIGINT, again=True)),
    Kind("SIGTERM in training", numbered(10), in_training(signal.SIGTERM)),
    Kind(
        "Ctrl-C in another command",
        listed(*(f"{name} {number}" for name in COMMANDS for number in range(5))),
        of_a_command,
    ),
    Kind("Ctrl-C in the first two seconds", numbered(10), in_the_first_second),
    Kind("SIGSTOP and SIGCONT in training", numbered(5), stopped_and_continued),
    Kind("two at once in one work directory", numbered(5), while_another_runs),
]

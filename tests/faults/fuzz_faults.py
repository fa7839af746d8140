"""Fuzzing with hypothesis: a child tries some inputs of a kind, and counts them."""

from pathlib import Path

from scene import Kind, Scene, Verdict, numbered, trouble

CHILD = str(Path(__file__).with_name("fuzz.py"))
INPUTS = 100  # of each child


def fuzzed(target: str):
    def attempt(scene: Scene, case: str) -> Verdict:
        settings = [target, case, str(INPUTS), str(scene.references.finished)]
        result = scene.run(CHILD, *settings, limits={"RLIMIT_AS": 3 << 29}, timeout=120)
        if result.code == 0:
            return Verdict("survived", inputs=int(result.out.split()[-1]))
        wrong = trouble(result, 0) or Verdict("traceback", result.last_line)
        falsifying = [line for line in result.err.splitlines() if "alsifying" in line or "input" in line][:1]
        outcome = "believed" if "AssertionError" in wrong.detail else wrong.outcome
        return Verdict(outcome, f"{wrong.detail} {' '.join(falsifying)}")

    return attempt


KINDS = [
    Kind("fuzzing: idx files", numbered(4), fuzzed("idx")),
    Kind("fuzzing: CSV files", numbered(4), fuzzed("csv")),
    Kind("fuzzing: pictures", numbered(6), fuzzed("pictures")),
    Kind("fuzzing: records", numbered(4), fuzzed("records")),
    Kind("fuzzing: descriptions of exported models", numbered(4), fuzzed("descriptions")),
    Kind("fuzzing: config overrides", numbered(4), fuzzed("overrides")),
]

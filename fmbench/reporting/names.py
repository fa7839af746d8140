"""What viewers call a measurement: they group by what stands before the slash."""

from collections.abc import Mapping


def tag(name: str) -> str:
    """'val_loss' -> 'loss/val'; what is of no split: 'learning_rate' -> 'run/learning_rate'."""
    split, _, quantity = name.partition("_")
    return f"{quantity}/{split}" if split in ("train", "val", "test") else f"run/{name}"


def tagged(scalars: Mapping[str, float]) -> dict[str, float]:
    return {tag(name): value for name, value in scalars.items() if name != "step"}

"""The speeds that fmbench means to reach, and what was measured of them."""

import statistics
from typing import Literal, NamedTuple

from fmbench.throughput.measurements import YARDSTICK, Measurements, Variant


class SpeedTarget(NamedTuple):
    """Training of `model`: the best of `ours` divided by the best of `peers`, which all have to be there."""

    model: str
    ours: tuple[Variant, ...]
    peers: tuple[Variant, ...]
    least: float
    jax: str = ""  # measured with this series of jax; any, if empty


class RunTarget(NamedTuple):
    """A property of the warm run of an entry."""

    entry: str
    text: str
    field: str  # of `Run`
    unit: Literal["s", "%"]
    bound: float
    at_most: bool


ENTRIES = ("mlp", "fc-b", "baseline", "cnn1", "cnn2", "cnn3", "cnn4", "vgg_like", "resnet-20-paper")
BOTH_DTYPES: tuple[Variant, ...] = (("fmbench", "float32"), ("fmbench", "bfloat16"))
FLAX: Variant = ("stock Flax", "float32")
TORCH: tuple[Variant, ...] = (("PyTorch eager", "float32"), ("PyTorch compile", "float32"))
LIBRARIES: tuple[Variant, ...] = (*TORCH, ("Keras", "float32"))
TORCH_BFLOAT16: tuple[Variant, ...] = (("PyTorch eager", "bfloat16"), ("PyTorch compile", "bfloat16"))

SPEED = (
    SpeedTarget("vgg_like", (YARDSTICK,), (FLAX,), 2.5, jax="0.12"),
    SpeedTarget("vgg_like", (YARDSTICK,), (FLAX,), 3.0, jax="0.10"),
    SpeedTarget("vgg_like", (YARDSTICK,), (("PyTorch eager", "float32"),), 1.3),
    SpeedTarget("vgg_like", (YARDSTICK,), (("Keras", "float32"),), 1.2),
    SpeedTarget("vgg_like", BOTH_DTYPES, TORCH_BFLOAT16, 1.0),
    *(SpeedTarget(entry, (YARDSTICK,), LIBRARIES, 1.0) for entry in ENTRIES),
    SpeedTarget("speedrun-94", (YARDSTICK,), TORCH, 1.0),
    SpeedTarget("mlp", (YARDSTICK,), (FLAX, *LIBRARIES), 1.5),
)
GPU_TORCH: tuple[Variant, ...] = tuple(
    (f"PyTorch {mode}", dtype) for dtype in ("float32", "bfloat16") for mode in ("eager", "compile", "graph")
)
SPEED_ON_GPUS = tuple(
    SpeedTarget(entry, BOTH_DTYPES, GPU_TORCH, least)
    for least in (1.0, 1.5)
    for entry in ("vgg_like", "resnet-20-paper", "speedrun-94", "mlp")
)
RUN = (
    RunTarget("mlp", "start to first step, caches warm", "first_step_seconds", "s", 4.0, at_most=True),
    RunTarget("vgg_like", "wall time inside training steps", "train_share", "%", 0.97, at_most=False),
    RunTarget(
        "vgg_like", "wall time inside training and evaluation steps", "steps_share", "%", 0.97, at_most=False
    ),
)


def speed_ratio(target: SpeedTarget, measurements: Measurements) -> float | None:
    """How many times as fast the best of ours is as the best of the peers, by medians over the rounds.

    None unless all variants were measured: to beat some of the peers is not to beat the best of them.
    """
    model = measurements.models.get(target.model)
    if model is None:
        return None
    if target.jax and not model.conditions.environment.versions["jax"].startswith(f"{target.jax}."):
        return None
    best = []
    for variants in (target.ours, target.peers):
        rows = [row for variant in variants if (row := model.find(variant))]
        if len(rows) < len(variants):
            return None
        best.append(max(statistics.median(row.train_images_per_sec) for row in rows))
    return best[0] / best[1]


def run_value(target: RunTarget, measurements: Measurements) -> float | None:
    """What the target is of, in seconds or as a fraction; None if its entry had no warm run."""
    runs = measurements.overheads.runs if measurements.overheads else []
    warm = [run for run in runs if run.entry == target.entry and run.compile_cache == "warm"]
    return getattr(warm[0], target.field) if warm else None

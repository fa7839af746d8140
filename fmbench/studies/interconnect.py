"""How long a step takes on chips that are not here: by stated speeds, with rings, between two bounds.

A chip computes FLOPs at a stated rate times a stated utilisation. Collectives go around rings: over n devices an
all-reduce of B bytes takes 2(n - 1) hops and sends 2(n - 1)/n B bytes from each device. Where links are of several
kinds, each level has its ring, and the next one's moves what the one before has left to each device; the bytes of
all levels add up to those of one ring. What a step takes lies between computation and communication one after the
other (no overlap) and the longer of the two (full overlap).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fmbench.studies.compiled_step import Collective, CompiledStep


class Link(NamedTuple):
    """A ring of at most `size` members."""

    name: str
    size: float  # math.inf: any number
    bytes_per_sec: float  # one way, of each device
    hop_seconds: float


class Chip(NamedTuple):
    """What is stated of a device and its links."""

    name: str
    flops_per_sec: dict[str, float]  # by the computation's dtype
    memory_bytes: float | None
    links: tuple[Link, ...]  # the nearest first
    launch_seconds: float  # of each collective
    source: str


CHIPS = {
    "h100": Chip(
        "8 x NVIDIA H100 SXM a machine, NVLink within, InfiniBand NDR between",
        {"bfloat16": 989e12, "float32": 494e12},  # the latter in TF32, JAX's default there
        80e9,
        (Link("NVLink", 8, 450e9, 1.9e-6), Link("InfiniBand", math.inf, 50e9, 4.0e-6)),
        14e-6,
        "NVIDIA's data sheets (dense rates; NVLink 900 GB/s both ways; 400 Gbit/s a GPU); latencies as NCCL's "
        "tuning.cc has them for rings with protocol LL128",
    ),
    "tpu_v5e": Chip(
        "TPU v5e, a torus of 16 x 16",
        {"bfloat16": 197e12, "float32": 197e12},  # float32 products are computed in bfloat16, JAX's default there
        16e9,
        (Link("ICI, first axis", 16, 100e9, 1e-6), Link("ICI, second axis", 16, 100e9, 1e-6)),
        0.0,
        "Google's page of v5e (197 TFLOP/s, 4 ports of 50 GB/s each way, of which a ring in both directions of "
        "an axis uses two); 1 us a hop is assumed",
    ),
}


class Prediction(NamedTuple):
    """Of one training step, in seconds, and against as many steps of one device as the devices are worth."""

    compute_seconds: float
    communication_seconds: float
    without_overlap: float  # efficiency, from 0 to 1
    with_full_overlap: float


def wire_bytes(collective: Collective, devices: int) -> float:
    """What each device sends for it in a step, over one ring."""
    return sum(sent for _, sent in _traffic(collective, (devices,))) * collective.times


def communication_seconds(collectives: Iterable[Collective], devices: int, chip: Chip) -> float:
    """Of all of them, one after another."""
    if devices == 1:
        return 0.0
    sizes = _ring_sizes(devices, chip.links)
    total = 0.0
    for collective in collectives:
        seconds = chip.launch_seconds
        for link, (hops, sent) in zip(chip.links, _traffic(collective, sizes), strict=False):
            seconds += hops * link.hop_seconds + sent / link.bytes_per_sec
        total += collective.times * seconds
    return total


def most_devices(chip: Chip) -> float:
    """That its links join."""
    return math.prod(link.size for link in chip.links)


def _ring_sizes(devices: int, links: Sequence[Link]) -> tuple[int, ...]:
    """The members of each level's ring; the last takes what is left."""
    sizes = []
    for link in links:
        sizes.append(int(min(devices, link.size)))
        devices = math.ceil(devices / sizes[-1])
    return tuple(sizes)


def _traffic(collective: Collective, sizes: Sequence[int]) -> list[tuple[int, float]]:
    """Hops and bytes that a device sends, level by level, of one such collective."""
    if collective.kind == "collective-permute":
        farthest = max((level for level, size in enumerate(sizes) if size > 1), default=0)
        return [(1, collective.payload_bytes) if level == farthest else (0, 0.0) for level in range(len(sizes))]
    rounds = 2 if collective.kind == "all-reduce" else 1
    whole: float = collective.payload_bytes
    if collective.kind == "reduce-scatter":  # whose result is a part
        whole *= math.prod(sizes)
    levels = []
    for size in sizes:
        levels.append((rounds * (size - 1), rounds * (size - 1) / size * whole))
        whole /= size
    return levels


def predict(step: CompiledStep, alone: CompiledStep, chip: Chip, flops_per_sec: float) -> Prediction:
    """The step of `step.devices` devices beside that of one, at `flops_per_sec`: rate times utilisation."""
    speed_up = step.batch_size / alone.batch_size
    return _prediction(
        step.flops / flops_per_sec,
        communication_seconds(step.collectives, step.devices, chip),
        alone.flops / flops_per_sec * speed_up / step.devices,
    )


def _prediction(compute: float, communication: float, ideal: float) -> Prediction:
    return Prediction(
        compute, communication, ideal / (compute + communication), ideal / max(compute, communication)
    )


class Limit(NamedTuple):
    """The first number of devices whose efficiency is below a half; None: none of those looked at."""

    without_overlap: int | None
    with_full_overlap: int | None
    looked_up_to: int


def limit(compiled: Sequence[CompiledStep], chip: Chip, flops_per_sec: float, *, strong: bool) -> Limit:
    """Where an entry stops scaling, between the numbers of devices for which it was compiled.

    Under strong scaling numbers that divide the batch are looked at; their FLOPs lie on the line between those of
    the compiled ones, for they are a constant and so much an image. Under weak scaling they are one device's.

    Args:
        compiled: By the number of devices, from one.
        chip: The chip.
        flops_per_sec: Rate times utilisation.
        strong: Whether the global batch is fixed, not each device's.
    """
    alone, last = compiled[0], compiled[-1]
    shares = [step.batch_size / step.devices for step in reversed(compiled)]
    flops = [step.flops for step in reversed(compiled)]
    numbers = [n for n in range(2, last.devices + 1) if not strong or alone.batch_size % n == 0]

    def of(devices: int) -> Prediction:
        own = float(np.interp(alone.batch_size / devices, shares, flops)) if strong else alone.flops
        ideal = alone.flops / devices if strong else alone.flops
        communication = communication_seconds(last.collectives, devices, chip)
        return _prediction(own / flops_per_sec, communication, ideal / flops_per_sec)

    def first(efficiency: Callable[[Prediction], float]) -> int | None:
        return next((n for n in numbers if efficiency(of(n)) < 0.5), None)

    return Limit(
        first(lambda found: found.without_overlap),
        first(lambda found: found.with_full_overlap),
        max(numbers, default=1),
    )

"""Measured throughput: what results/throughput.json holds, and what follows from it."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fmbench.errors import UserError
from fmbench.records.schema import Count, Environment, Seconds

Positive = Annotated[float, Field(gt=0)]
Dtype = Literal["float32", "bfloat16"]
WaitPolicy = Literal["", "PASSIVE"]  # OMP_WAIT_POLICY; empty: the library's default
CompileCache = Literal["cold", "warm"]

# System and dtype. Ratios say how many times as fast as another variant the yardstick is.
Variant = tuple[str, str]
YARDSTICK: Variant = ("fmbench", "float32")


class _Strict(BaseModel):
    """No unknown fields, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Conditions(_Strict):
    """When, where and how long a section was measured."""

    created: str  # UTC, ISO 8601
    environment: Environment
    # What a large matrix product reaches on the machine, for each dtype.
    matmul_flops_per_sec: Annotated[dict[Dtype, Positive], Field(min_length=2)]
    # What a sum of two large arrays moves to and from memory; null where it was not measured.
    memory_bytes_per_sec: Positive | None = None
    rounds: Count
    seconds: Positive  # of training per round


class Row(_Strict):
    """What one system did with one model: a number per round, or the reason why there is none."""

    model: str  # the entry's name: mlp, resnet-20
    system: str
    dtype: Dtype
    batch_size: Count
    copies: Count = 1  # of the train set, in memory
    seeds: Count = 1  # trained together, each on its own batches; images are those of all of them
    arm: str = ""  # the way fmbench was run, where ways are compared
    wait_policy: WaitPolicy = ""  # by which it ran; of a row of the better of two, by which it trained faster
    failure: str | None = None
    description: str = ""  # the system in its own words
    versions: dict[str, str] = {}
    num_params: Count | None = None
    max_logit_difference: Annotated[float, Field(ge=0)] | None = None  # to the yardstick, from the same weights
    bytes_per_image: Positive | None = None  # the least memory traffic of a training step, where it was counted
    train_images_per_sec: list[Positive] = []
    train_core_seconds_per_1000: list[Seconds] = []  # images
    infer_images_per_sec: list[Positive] = []  # in batches of the model's infer_batch_size
    small_infer_images_per_sec: dict[int, list[Positive]] = {}  # by batch size; none in old measurements
    compile_seconds_cold: Seconds | None = None
    compile_seconds_warm: Seconds | None = None  # for systems whose compile cache is kept between processes
    peak_memory_bytes: Count | None = None

    @model_validator(mode="after")
    def _failed_or_measured(self) -> "Row":
        if (self.failure is None) != bool(self.train_images_per_sec):
            raise ValueError("needs either train_images_per_sec or a failure")
        return self

    @property
    def variant(self) -> Variant:
        return self.system, self.dtype


class ModelThroughput(_Strict):
    """One model in all systems, measured in one run."""

    conditions: Conditions
    config_file: str
    batch_size: Count
    infer_batch_size: Count
    flops_per_image: Positive | None  # of a training step, counted by XLA in fmbench's; null if fmbench failed
    rows: list[Row]  # one of each system and dtype
    ways: list[Row] = []  # what rows are the better ones of, where a system was measured with both wait policies

    def find(self, variant: Variant) -> Row | None:
        """The variant's row, if it was measured and did not fail."""
        return next((row for row in self.rows if row.variant == variant and row.failure is None), None)

    def ratio(self, row: Row, numbers: Callable[[Row], list[float]]) -> float | None:
        """How many times as fast as `row` the yardstick is: the ratio of the medians."""
        yardstick = self.find(YARDSTICK)
        if yardstick is None or not numbers(yardstick) or not numbers(row):
            return None
        return statistics.median(numbers(yardstick)) / statistics.median(numbers(row))

    def flops_per_sec(self, row: Row) -> float | None:
        """What the row's training achieves; the work of an image is the same in all systems."""
        speed = median(row.train_images_per_sec)
        return None if speed is None or self.flops_per_image is None else speed * self.flops_per_image

    def matmul_share(self, row: Row) -> float | None:
        """`flops_per_sec` as a fraction of what a large matrix product reaches."""
        achieved = self.flops_per_sec(row)
        return None if achieved is None else achieved / self.conditions.matmul_flops_per_sec[row.dtype]

    def bytes_per_image(self, row: Row) -> float | None:
        """The least memory traffic of a training step in the row's dtype, as fmbench counts it for all systems."""
        counted = self.find(("fmbench", row.dtype))
        return None if counted is None else counted.bytes_per_image

    def bytes_per_sec(self, row: Row) -> float | None:
        """The memory traffic that the row's training achieves, if it needs no more than the least."""
        speed, traffic = median(row.train_images_per_sec), self.bytes_per_image(row)
        return None if speed is None or traffic is None else speed * traffic

    def roofline_share(self, row: Row) -> float | None:
        """The least time of an image divided by the measured one.

        The least time is the larger of FLOPs / what a matrix product reaches and bytes / what memory moves.
        """
        compute, traffic = self.matmul_share(row), self.bytes_per_sec(row)
        bandwidth = self.conditions.memory_bytes_per_sec
        if compute is None or traffic is None or bandwidth is None:
            return None
        return max(compute, traffic / bandwidth)


def better_ways(rows: list[Row]) -> list[Row]:
    """One row of each system and dtype, in their order, with the better numbers of the ways that it was run in.

    Speeds are those of the way that is faster, and core-seconds those of the way that needs fewer, which may be
    the other: who is compared with others shall have the better of both.
    """
    better = []
    for variant in dict.fromkeys(row.variant for row in rows):
        ways = [row for row in rows if row.variant == variant]
        if measured := [row for row in ways if row.failure is None]:
            train = max(measured, key=lambda row: median(train_speeds(row)) or 0.0)
            infer = max(measured, key=lambda row: median(infer_speeds(row)) or 0.0)
            sizes = {size for row in measured for size in row.small_infer_images_per_sec}
            small = {size: [row.small_infer_images_per_sec.get(size, []) for row in measured] for size in sizes}
            cheapest = min(measured, key=lambda row: median(row.train_core_seconds_per_1000) or math.inf)
            ways[0] = train.model_copy(
                update={
                    "infer_images_per_sec": infer.infer_images_per_sec,
                    "small_infer_images_per_sec": {
                        size: max(ways_speeds, key=lambda speeds: median(speeds) or 0.0)
                        for size, ways_speeds in sorted(small.items())
                    },
                    "train_core_seconds_per_1000": cheapest.train_core_seconds_per_1000,
                }
            )
        better.append(ways[0])
    return better


class Sweep(_Strict):
    """fmbench's training under conditions that differ in one thing."""

    conditions: Conditions
    rows: list[Row]


class Layer(_Strict):
    """What a layer, or several that do as much, or a part of the step outside the net takes of a step."""

    layers: list[str]  # paths in the net, as 'blocks.0.conv1'; or what it is
    direction: str  # forward, kernel gradient, ...; empty where there is but one
    dtype: Dtype  # of the operands
    flops: Annotated[float, Field(ge=0)]  # of matrix products and convolutions
    bytes: Annotated[float, Field(ge=0)]  # the least to move, if nothing stays in a cache between rows
    seconds: Seconds

    def least_seconds(self, conditions: Conditions) -> float:
        """FLOPs / what a matrix product reaches, or bytes / what memory moves, whichever is longer."""
        traffic = self.bytes / conditions.memory_bytes_per_sec if conditions.memory_bytes_per_sec else 0.0
        return max(self.flops / conditions.matmul_flops_per_sec[self.dtype], traffic)

    def gap_seconds(self, conditions: Conditions) -> float:
        """What it takes over its least."""
        return self.seconds - self.least_seconds(conditions)


class Profile(_Strict):
    """A training step by layers."""

    batch_size: Count
    dtype: Dtype
    steps: Count  # in the profile, which is the median one of several by the time of a step
    step_seconds: Positive  # with the profiler running
    unprofiled_step_seconds: Positive  # median
    layers: list[Layer]

    @property
    def seconds_elsewhere(self) -> float:
        """In which no operation was seen to work."""
        return self.step_seconds - sum(layer.seconds for layer in self.layers)

    def gaps(self, conditions: Conditions) -> list[Layer]:
        """The layers by what they take over their least, the most first."""
        return sorted(self.layers, key=lambda layer: -layer.gap_seconds(conditions))


class Profiles(_Strict):
    """An entry's step by layers, in each dtype."""

    conditions: Conditions
    config_file: str
    profiles: list[Profile]


class Run(_Strict):
    """Where the time of one `python -m fmbench.main` went."""

    entry: str
    num_epochs: Count
    compile_cache: CompileCache
    process_seconds: Seconds  # from the start of the process to its end
    first_step_seconds: Seconds | None  # from the start of the process to the end of the first step
    wall_seconds: Positive  # this and the following are the record's
    train_seconds: Seconds
    eval_seconds: Seconds
    checkpoint_seconds: Seconds
    compile_seconds: Seconds
    setup_seconds: Seconds

    @property
    def train_share(self) -> float:
        """Fraction of the wall time inside training steps."""
        return self.train_seconds / self.wall_seconds

    @property
    def steps_share(self) -> float:
        """Fraction of the wall time inside training and evaluation steps."""
        return (self.train_seconds + self.eval_seconds) / self.wall_seconds


class Overheads(_Strict):
    conditions: Conditions
    runs: list[Run]


class Measurements(_Strict):
    """All that was measured on one kind of device; each part carries its own conditions."""

    schema_version: Literal[1] = 1
    models: dict[str, ModelThroughput] = {}
    overheads: Overheads | None = None
    batch_sizes: Sweep | None = None
    dataset_sizes: Sweep | None = None
    seeds_together: Sweep | None = None
    arms: dict[str, Sweep] = {}  # by model; the first row is the way fmbench runs by default
    layers: dict[str, Profiles] = {}  # by model

    @property
    def sections(self) -> dict[str, Overheads | Sweep | Profiles]:
        """What there is beside the models, by its title."""
        sections: dict[str, Overheads | Sweep | Profiles | None] = {
            "overheads": self.overheads,
            "batch sizes": self.batch_sizes,
            "dataset sizes": self.dataset_sizes,
            "seeds together": self.seeds_together,
            **{f"arms of {name}": arms for name, arms in sorted(self.arms.items())},
            **{f"layers of {name}": profiles for name, profiles in sorted(self.layers.items())},
        }
        return {title: section for title, section in sections.items() if section}


# Files: one for each kind of device, so that a machine with an accelerator replaces nothing that CPUs measured.

PLATFORMS = ("cpu", "gpu", "tpu")


def read_all(results_dir: Path) -> dict[str, Measurements]:
    """What was measured on each kind of device that has a file.

    Raises:
        UserError: As `read_measurements`.
    """
    return {
        platform: read_measurements(results_dir, platform)
        for platform in PLATFORMS
        if json_path(results_dir, platform).exists()
    }


def read_measurements(results_dir: Path, platform: str = "cpu") -> Measurements:
    """What was measured so far on that kind of device; nothing, if there is no file yet.

    Raises:
        UserError: If the file cannot be read or is not valid; names the file and the field.
    """
    path = json_path(results_dir, platform)
    try:
        return Measurements.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Measurements()
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(
            f"{path}: not valid measurements, field '{field}': {first['msg']}. Delete it and measure again."
        ) from error


def json_path(results_dir: Path, platform: str = "cpu") -> Path:
    return results_dir / ("throughput.json" if platform == "cpu" else f"throughput-{platform}.json")


def summary(measured: ModelThroughput, row: Row) -> dict[str, Any]:
    """A row with plain numbers, medians over the rounds, for programs to read."""
    return {
        "model": row.model,
        "system": row.system,
        "dtype": row.dtype,
        "batch_size": row.batch_size,
        "train_images_per_sec": median(row.train_images_per_sec),
        "train_images_per_sec_min": min(row.train_images_per_sec, default=None),
        "train_images_per_sec_max": max(row.train_images_per_sec, default=None),
        "train_ratio": measured.ratio(row, train_speeds),
        "infer_batch_size": measured.infer_batch_size,
        "infer_images_per_sec": median(row.infer_images_per_sec),
        "infer_images_per_sec_min": min(row.infer_images_per_sec, default=None),
        "infer_images_per_sec_max": max(row.infer_images_per_sec, default=None),
        "infer_ratio": measured.ratio(row, infer_speeds),
        "small_infer_images_per_sec": {
            size: median(speeds) for size, speeds in row.small_infer_images_per_sec.items()
        },
        "small_infer_ratio": {
            size: measured.ratio(row, small_infer_speeds(size)) for size in row.small_infer_images_per_sec
        },
        "core_seconds_per_1000": median(row.train_core_seconds_per_1000),
        "flops_per_image": measured.flops_per_image,
        "train_flops_per_sec": measured.flops_per_sec(row),
        "matmul_share": measured.matmul_share(row),
        "bytes_per_image": measured.bytes_per_image(row),
        "train_bytes_per_sec": measured.bytes_per_sec(row),
        "roofline_share": measured.roofline_share(row),
        "num_params": row.num_params,
        "max_logit_difference": row.max_logit_difference,
        "peak_memory_bytes": row.peak_memory_bytes,
        "compile_seconds_cold": row.compile_seconds_cold,
        "compile_seconds_warm": row.compile_seconds_warm,
        "failure": row.failure,
        "description": row.description,
        "versions": row.versions,
        "device": measured.conditions.environment.device_kind,
        "cpu": measured.conditions.environment.cpu,
        "cpu_cores": measured.conditions.environment.cpu_cores,
    }


def median(numbers: list[float]) -> float | None:
    """The median, if there is anything to take it of."""
    return statistics.median(numbers) if numbers else None


def train_speeds(row: Row) -> list[float]:
    return row.train_images_per_sec


def infer_speeds(row: Row) -> list[float]:
    return row.infer_images_per_sec


def small_infer_speeds(batch_size: int) -> Callable[[Row], list[float]]:
    """What takes a row's speeds of inference in batches of this size, of which there may be none."""
    return lambda row: row.small_infer_images_per_sec.get(batch_size, [])

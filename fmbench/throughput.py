"""Measured throughput, results/throughput.json, and the tables rendered from it, results/throughput.md."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fmbench import results
from fmbench.errors import UserError
from fmbench.results import Count, Environment, Seconds

Positive = Annotated[float, Field(gt=0)]
Dtype = Literal["float32", "bfloat16"]
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
    rounds: Count
    seconds: Positive  # of training per round


class Row(_Strict):
    """What one system did with one model: a number per round, or the reason why there is none."""

    model: str  # the entry's name: mlp, resnet-20
    system: str
    dtype: Dtype
    batch_size: Count
    copies: Count = 1  # of the train set, in memory
    failure: str | None = None
    description: str = ""  # the system in its own words
    versions: dict[str, str] = {}
    num_params: Count | None = None
    max_logit_difference: Annotated[float, Field(ge=0)] | None = None  # to the yardstick, from the same weights
    train_images_per_sec: list[Positive] = []
    train_core_seconds_per_1000: list[Seconds] = []  # images
    infer_images_per_sec: list[Positive] = []
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
    rows: list[Row]

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
        speed = _median(row.train_images_per_sec)
        return None if speed is None or self.flops_per_image is None else speed * self.flops_per_image

    def matmul_share(self, row: Row) -> float | None:
        """`flops_per_sec` as a fraction of what a large matrix product reaches."""
        achieved = self.flops_per_sec(row)
        return None if achieved is None else achieved / self.conditions.matmul_flops_per_sec[row.dtype]


class Sweep(_Strict):
    """fmbench's training under conditions that differ in one thing."""

    conditions: Conditions
    rows: list[Row]


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
    """All of results/throughput.json; each part carries its own conditions."""

    schema_version: Literal[1] = 1
    models: dict[str, ModelThroughput] = {}
    overheads: Overheads | None = None
    batch_sizes: Sweep | None = None
    dataset_sizes: Sweep | None = None


# Files.


def read(results_dir: Path) -> Measurements:
    """What was measured so far; nothing, if there is no file yet.

    Raises:
        UserError: If the file cannot be read or is not valid; names the file and the field.
    """
    path = json_path(results_dir)
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


def write(measurements: Measurements, results_dir: Path) -> None:
    """Writes <results_dir>/throughput.json and .md, each atomically.

    Raises:
        UserError: If they cannot be written there.
    """
    Measurements.model_validate(measurements.model_dump())
    json_text = measurements.model_dump_json(indent=1) + "\n"
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        for path, text in {json_path(results_dir): json_text, md_path(results_dir): render(measurements)}.items():
            with results.atomic_file(path) as file:
                file.write(text.encode())
    except OSError as error:
        raise UserError(f"{results_dir}: cannot write the measurements ({error.strerror}).") from error


def json_path(results_dir: Path) -> Path:
    return results_dir / "throughput.json"


def md_path(results_dir: Path) -> Path:
    return results_dir / "throughput.md"


def summary(measured: ModelThroughput, row: Row) -> dict[str, Any]:
    """A row with plain numbers, medians over the rounds, for programs to read."""
    return {
        "model": row.model,
        "system": row.system,
        "dtype": row.dtype,
        "batch_size": row.batch_size,
        "train_images_per_sec": _median(row.train_images_per_sec),
        "train_images_per_sec_min": min(row.train_images_per_sec, default=None),
        "train_images_per_sec_max": max(row.train_images_per_sec, default=None),
        "train_ratio": measured.ratio(row, _train_speeds),
        "infer_batch_size": measured.infer_batch_size,
        "infer_images_per_sec": _median(row.infer_images_per_sec),
        "infer_images_per_sec_min": min(row.infer_images_per_sec, default=None),
        "infer_images_per_sec_max": max(row.infer_images_per_sec, default=None),
        "infer_ratio": measured.ratio(row, _infer_speeds),
        "core_seconds_per_1000": _median(row.train_core_seconds_per_1000),
        "flops_per_image": measured.flops_per_image,
        "train_flops_per_sec": measured.flops_per_sec(row),
        "matmul_share": measured.matmul_share(row),
        "num_params": row.num_params,
        "max_logit_difference": row.max_logit_difference,
        "peak_memory_bytes": row.peak_memory_bytes,
        "compile_seconds_cold": row.compile_seconds_cold,
        "compile_seconds_warm": row.compile_seconds_warm,
        "failure": row.failure,
        "description": row.description,
        "versions": row.versions,
        "cpu": measured.conditions.environment.cpu,
        "cpu_cores": measured.conditions.environment.cpu_cores,
    }


def _median(numbers: list[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


def _train_speeds(row: Row) -> list[float]:
    return row.train_images_per_sec


def _infer_speeds(row: Row) -> list[float]:
    return row.infer_images_per_sec


# Targets.


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

SPEED_TARGETS = (
    SpeedTarget("vgg_like", (YARDSTICK,), (FLAX,), 2.5, jax="0.12"),
    SpeedTarget("vgg_like", (YARDSTICK,), (FLAX,), 3.0, jax="0.10"),
    SpeedTarget("vgg_like", (YARDSTICK,), (("PyTorch eager", "float32"),), 1.3),
    SpeedTarget("vgg_like", (YARDSTICK,), (("Keras", "float32"),), 1.2),
    SpeedTarget("vgg_like", BOTH_DTYPES, TORCH_BFLOAT16, 1.0),
    *(SpeedTarget(entry, (YARDSTICK,), LIBRARIES, 1.0) for entry in ENTRIES),
    SpeedTarget("speedrun-94", (YARDSTICK,), TORCH, 1.0),
    SpeedTarget("mlp", (YARDSTICK,), (FLAX, *LIBRARIES), 1.5),
)
RUN_TARGETS = (
    RunTarget("mlp", "start to first step, caches warm", "first_step_seconds", "s", 4.0, at_most=True),
    RunTarget("vgg_like", "wall time inside training steps", "train_share", "%", 0.97, at_most=False),
    RunTarget(
        "vgg_like", "wall time inside training and evaluation steps", "steps_share", "%", 0.97, at_most=False
    ),
)


def _speed_target_line(target: SpeedTarget, measurements: Measurements) -> str:
    value = _speed_ratio(target, measurements)
    met = None if value is None else value >= target.least
    ours = "fmbench in float32" if target.ours == (YARDSTICK,) else "fmbench in its better dtype"
    condition = f", on jax {target.jax}" if target.jax else ""
    cells = [
        f"{target.model}: {ours} / {_names(target.peers)}{condition}",
        f"≥ {target.least:.1f}x",
        _times(value),
        _verdict(met),
    ]
    return _line(cells)


def _speed_ratio(target: SpeedTarget, measurements: Measurements) -> float | None:
    """None unless all variants were measured: to beat some of the peers is not to beat the best of them."""
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


def _run_target_line(target: RunTarget, measurements: Measurements) -> str:
    runs = measurements.overheads.runs if measurements.overheads else []
    warm = [run for run in runs if run.entry == target.entry and run.compile_cache == "warm"]
    value: float | None = getattr(warm[0], target.field) if warm else None
    met = None if value is None else (value < target.bound if target.at_most else value >= target.bound)
    show = _percent if target.unit == "%" else _seconds
    bound = f"{'<' if target.at_most else '≥'} {show(target.bound)} {target.unit}"
    measured = "-" if value is None else f"{show(value)} {target.unit}"
    return _line([f"{target.entry}: {target.text}", bound, measured, _verdict(met)])


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: "-"}[met]


def _names(variants: tuple[Variant, ...]) -> str:
    """'the best of Keras, PyTorch eager in float32', for variants of one dtype."""
    names = ", ".join(system for system, _ in variants)
    return f"{'the best of ' if len(variants) > 1 else ''}{names} in {variants[0][1]}"


# Rendering.

HOW_MEASURED = """\
How many images per second the models of this repository train on and classify, in fmbench and, the same nets,
in other systems, on one machine. Each system is a process of its own. All start from the same weights and must
have the same number of parameters and give the same logits before they are timed; one that does not, or fails,
says so in its row. Then they take turns: in each round every system trains for some seconds on shuffled rows of
the real train set (gather, normalise, forward, backward with dropout, update) and classifies for half as long,
while the others wait; the order changes from round to round. Numbers are medians over the rounds with
(min-max). "fmbench is" says how many times as fast fmbench in float32 is, as the ratio of medians of the same
run. Core-seconds are processor time, which a busy machine does not stretch. FLOP/s are the FLOPs that XLA
counts in fmbench's training step times the speed; their share is of what a 2048 x 2048 matrix product in the
row's dtype reached on the machine. Peak memory is the process's. Compile time is cold and, where a system keeps
compiled programs between processes, warm.

Why the numbers are what they are, and what was tried: [docs/speed.md](../docs/speed.md). Generated from
`throughput.json` by `python -m fmbench.benchmark --peers=torch,keras`, after `benchmarks/setup_peers.sh`. Parts
measured at different times say so."""


def render(measurements: Measurements) -> str:
    """The text of throughput.md."""
    parts = ["# Throughput", HOW_MEASURED, "## Targets", _targets_table(measurements)]
    for name, model in sorted(measurements.models.items()):
        parts += [f"## {name}", _model_conditions(name, model), _model_table(model)]
    if measurements.overheads:
        parts += ["## Overheads", OVERHEADS_TEXT, _overheads_table(measurements.overheads)]
    if measurements.batch_sizes:
        parts += ["## Batch sizes", "fmbench's training, float32.", _sweep_table(measurements.batch_sizes)]
    if measurements.dataset_sizes:
        parts += ["## Sizes of the data set", DATASET_SIZES_TEXT, _sweep_table(measurements.dataset_sizes)]
    parts += ["## Versions and machines", _versions(measurements)]
    return "\n\n".join(parts) + "\n"


OVERHEADS_TEXT = """\
Whole runs of `python -m fmbench.main`: where the time went. Shares are of the record's wall time, which begins
when Python and the libraries are loaded; the process's includes that. The first step is counted from the start
of the process."""

DATASET_SIZES_TEXT = "fmbench's training, float32, with the 60,000 train images in memory as many times as said."


def _targets_table(measurements: Measurements) -> str:
    lines = ["| | target | measured | |", "|:--|--:|--:|:--|"]
    lines += [_speed_target_line(target, measurements) for target in SPEED_TARGETS]
    lines += [_run_target_line(target, measurements) for target in RUN_TARGETS]
    return "\n".join(lines)


def _model_conditions(name: str, model: ModelThroughput) -> str:
    yardstick = model.find(YARDSTICK)
    facts = [
        f"[{name}](../{model.config_file})",
        f"batch {model.batch_size:,}, inference {model.infer_batch_size:,}",
    ]
    if yardstick and yardstick.num_params:
        facts.append(f"{yardstick.num_params:,} parameters")
    if model.flops_per_image:
        facts.append(f"{model.flops_per_image / 1e6:,.1f} MFLOPs per image and training step")
    facts.append(f"{model.conditions.rounds} rounds of {model.conditions.seconds:g} s")
    matmul = model.conditions.matmul_flops_per_sec
    facts.append(
        f"matrix products {', '.join(f'{_giga(matmul[dtype])} GFLOP/s {dtype}' for dtype in sorted(matmul))}"
    )
    return "; ".join(facts) + "."


def _model_table(model: ModelThroughput) -> str:
    lines = [
        "| system | training, images/s | fmbench is | inference, images/s | fmbench is | core-s / 1,000 images "
        "| GFLOP/s | of matmul, % | peak memory, MB | compile cold / warm, s | logits differ by |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in model.rows:
        name = f"{row.system} {row.dtype}"
        if row.failure is not None:
            lines.append(_line([name, _failure(row), *[""] * 9]))
            continue
        compiling = [row.compile_seconds_cold, row.compile_seconds_warm]
        cells = [
            f"**{name}**" if row.variant == YARDSTICK else name,
            _spread(row.train_images_per_sec),
            _times(model.ratio(row, _train_speeds)),
            _spread(row.infer_images_per_sec),
            _times(model.ratio(row, _infer_speeds)),
            _number(_median(row.train_core_seconds_per_1000)),
            _giga(model.flops_per_sec(row)),
            _percent(model.matmul_share(row)),
            _megabytes(row.peak_memory_bytes),
            " / ".join(_seconds(seconds) for seconds in compiling),
            "-" if row.max_logit_difference is None else f"{row.max_logit_difference:.0e}",
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _overheads_table(overheads: Overheads) -> str:
    lines = [
        "| run | compile cache | first step, s | process, s | wall, s | training, % | evaluation, % "
        "| checkpoints, % | compile, % | set-up, % |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in overheads.runs:
        parts = (
            run.train_seconds,
            run.eval_seconds,
            run.checkpoint_seconds,
            run.compile_seconds,
            run.setup_seconds,
        )
        cells = [
            f"{run.entry}, {run.num_epochs} epoch{'s' if run.num_epochs > 1 else ''}",
            run.compile_cache,
            _seconds(run.first_step_seconds),
            _seconds(run.process_seconds),
            _seconds(run.wall_seconds),
            *(_percent(seconds / run.wall_seconds) for seconds in parts),
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _sweep_table(sweep: Sweep) -> str:
    lines = [
        "| model | batch size | copies | training, images/s | core-s / 1,000 images | peak memory, MB |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for row in sweep.rows:
        cells = [
            row.model,
            f"{row.batch_size:,}",
            str(row.copies),
            _spread(row.train_images_per_sec) if row.failure is None else _failure(row),
            _number(_median(row.train_core_seconds_per_1000)),
            _megabytes(row.peak_memory_bytes),
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _versions(measurements: Measurements) -> str:
    """Who was measured when and where; parts that share all of that share an item."""
    conditions = {name: model.conditions for name, model in sorted(measurements.models.items())}
    for name in ("overheads", "batch_sizes", "dataset_sizes"):
        if section := getattr(measurements, name):
            conditions[name.replace("_", " ")] = section.conditions
    places: dict[str, list[str]] = {}
    for name, condition in conditions.items():
        places.setdefault(_describe(condition), []).append(name)
    lines = [f"- {', '.join(names)}: {place}" for place, names in places.items()]
    systems: dict[str, list[str]] = {}
    for name, model in sorted(measurements.models.items()):
        for row in model.rows:
            if row.description:
                line = f"{row.system}, {row.dtype}: {row.description} ({_version_list(row.versions)})"
                systems.setdefault(line, []).append(name)
    lines += [f"- {line}: {', '.join(names)}" for line, names in systems.items()]
    return "\n".join(lines) if lines else "Nothing measured yet."


def _describe(conditions: Conditions) -> str:
    environment = conditions.environment
    commit = (environment.git_commit or "no commit")[:12]
    changed = "" if environment.git_dirty is False else ", with changes"
    return (
        f"{conditions.created[:10]}, {environment.cpu} ({environment.cpu_cores} cores), "
        f"{environment.operating_system}, Python {environment.python}, {_version_list(environment.versions)}; "
        f"commit {commit}{changed}"
    )


def _version_list(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _failure(row: Row) -> str:
    reason = (row.failure or "").replace("|", "\\|")  # which would end the cell
    return f"failed: {reason}"


def _spread(numbers: list[float]) -> str:
    if not numbers:
        return "-"
    return f"{statistics.median(numbers):,.0f} ({min(numbers):,.0f}-{max(numbers):,.0f})"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:,.1f}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _giga(number: float | None) -> str:
    return _number(None if number is None else number / 1e9)


def _megabytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e6:,.0f}"

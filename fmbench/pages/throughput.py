"""The page results/throughput.md: the measurements in tables, and the targets that they meet or miss."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fmbench.errors import UserError
from fmbench.pages import generated
from fmbench.system import files
from fmbench.throughput import targets
from fmbench.throughput.measurements import (
    YARDSTICK,
    Conditions,
    Layer,
    Measurements,
    ModelThroughput,
    Overheads,
    Profile,
    Profiles,
    Row,
    Sweep,
    Variant,
    infer_speeds,
    json_path,
    median,
    read_all,
    small_infer_speeds,
    train_speeds,
)


def write(measurements: Measurements, results_dir: Path, platform: str = "cpu") -> None:
    """Writes the platform's JSON file in `results_dir`, and the page, each atomically.

    Raises:
        UserError: If they cannot be written there.
    """
    Measurements.model_validate(measurements.model_dump())
    _write(json_path(results_dir, platform), measurements.model_dump_json(indent=1) + "\n")
    write_pages(results_dir)


def write_pages(results_dir: Path) -> None:
    """Writes the pages in `results_dir` from what was measured on all kinds of devices.

    Raises:
        UserError: If a file cannot be read or written there.
    """
    for path, text in render_pages(read_all(results_dir), results_dir).items():
        _write(path, text)


def render_pages(measured: Mapping[str, Measurements], results_dir: Path) -> dict[Path, str]:
    """throughput.md and, where steps were measured by layers, rooflines.md."""
    pages = {md_path(results_dir): render(measured)}
    if any(measurements.layers for measurements in measured.values()):
        pages[results_dir / ROOFLINES] = render_rooflines(measured)
    return pages


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write the measurements ({error.strerror}).") from error


def md_path(results_dir: Path) -> Path:
    return results_dir / "throughput.md"


# Targets.


def _speed_target_line(target: targets.SpeedTarget, value: float | None) -> str:
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


def _run_target_line(target: targets.RunTarget, value: float | None) -> str:
    met = None if value is None else (value < target.bound if target.at_most else value >= target.bound)
    show = _percent if target.unit == "%" else _seconds
    bound = f"{'<' if target.at_most else '≥'} {show(target.bound)} {target.unit}"
    measured = "-" if value is None else f"{show(value)} {target.unit}"
    return _line([f"{target.entry}: {target.text}", bound, measured, _verdict(met)])


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: "-"}[met]


def _names(variants: tuple[Variant, ...]) -> str:
    """'the best of Keras, PyTorch eager in float32'."""
    names = ", ".join(dict.fromkeys(system for system, _ in variants))
    dtypes = " or ".join(dict.fromkeys(dtype for _, dtype in variants))
    return f"{'the best of ' if len(variants) > 1 else ''}{names} in {dtypes}"


# Rendering.

HOW_MEASURED = """\
How many images per second the models of this repository train on and classify, in fmbench and, the same nets, in
other systems, on one machine. Each system is a process of its own. All start from the same weights and must have
the same number of parameters and give the same logits before they are timed; one that does not, fails, or would
leave out a part of the step says so in its row. Then they take turns: in each round every system does two steps
off the clock (since 2026-11-29: the memory of a process that waited is slow to come back) and trains for some
seconds on shuffled rows of the real train set (gather, normalise, forward, backward with dropout, update) and
classifies for half as long in batches of the size said, and for an eighth in batches of 1 and of 32 images,
while the others wait; the order changes from round to round. Numbers are medians over the rounds with (min-max).
"fmbench is" says how many times as fast fmbench in float32 is, as the ratio of
medians of the same run. Targets stand by the machine that they were measured on. Core-seconds are processor time,
which a busy machine stretches less than wall seconds, but does; so they are compared within a run alone. In
sections with a row of "stock Flax, oneDNN", the oneDNN within XLA, PyTorch and Keras were measured with OpenMP's
threads waiting as by default, which is to spin, and asleep, as fmbench's do, and have the better numbers of both;
in the others they spin. FLOP/s are the FLOPs that XLA counts in fmbench's training step times the speed; their
share is of what a 2048 x 2048 matrix product in the row's dtype reached on the machine. Peak memory is the
process's. Compile time is cold and, where a system keeps compiled programs between processes, warm.

"Of roofline" is the least time of a step divided by the measured one. The least time is the larger of FLOPs /
what a matrix product reaches, and bytes / what memory moves. The bytes are the least that a step moves if nothing
stays in a cache between its operations: each convolution and matrix product of the net and its gradient reads its
operands and writes its results once, so does the optimizer with parameters and its state, and all else is fused
into these. Systems share FLOPs, and the bytes of a dtype. A step whose arrays fit in a cache can so exceed 100 %.

Why the numbers are what they are, and what was tried: [docs/speed.md](../docs/speed.md). Generated from
`throughput.json` by `python -m fmbench.benchmark --peers=torch,keras`, after `benchmarks/setup_peers.sh`, and
from `throughput-gpu.json`, which the same command writes on a machine with a GPU. Parts measured at different
times say so."""

ON_ACCELERATORS = """\
As above, but: matrix products are of 8192 x 8192, on one device. Peak memory is the device's, as JAX and PyTorch
count what they have given out, without the CUDA context and libraries. "float32" multiplies as TF32, with 10 bits
of mantissa, in all systems: that is JAX's default, and PyTorch is told the same; the logits that are compared
before are of full float32 in all. PyTorch keeps its data on the device and has cuDNN time its algorithms
(`cudnn.benchmark`); "compile" is `torch.compile(mode="max-autotune")`, whose forward and backward passes are CUDA
graphs, and "graph" a whole compiled step, with augmentation and optimizer, in one CUDA graph. Workers take memory
as they need it (`XLA_PYTHON_CLIENT_PREALLOCATE=false`)."""

NOT_MEASURED = """\
Not measured yet. On a machine with one, `python -m fmbench.benchmark --peers=torch` fills this section;
[benchmarks/README.md](../benchmarks/README.md) says how PyTorch is found there."""


def render(measured: Mapping[str, Measurements]) -> str:
    """The text of throughput.md.

    Args:
        measured: What was measured, by the platform: cpu, gpu, tpu.
    """
    parts = ["# Throughput", HOW_MEASURED]
    for platform, measurements in ({"cpu": Measurements(), "gpu": Measurements()} | dict(measured)).items():
        kinds = sorted({condition.environment.device_kind for condition in _conditions(measurements).values()})
        parts.append(f"## {platform.upper()}{': ' if kinds else ''}{generated.text(', '.join(kinds))}")
        if platform != "cpu":
            parts.append(ON_ACCELERATORS if kinds else NOT_MEASURED)
        parts += ["### Targets", *_targets(measurements, platform)]
        parts += _sections(measurements)
    return "\n\n".join(parts) + "\n"


def _sections(measurements: Measurements) -> list[str]:
    """All that was measured on one kind of device."""
    parts = []
    for name, model in sorted(measurements.models.items()):
        parts += [f"### {generated.text(name)}", _model_conditions(name, model), _model_table(model)]
        if name in measurements.layers:
            parts.append(_largest_gaps(name, measurements.layers[name]))
    if measurements.overheads:
        parts += ["### Overheads", OVERHEADS_TEXT, _overheads_table(measurements.overheads)]
    if measurements.batch_sizes:
        parts += ["### Batch sizes", "fmbench's training, float32.", _sweep_table(measurements.batch_sizes)]
    if measurements.dataset_sizes:
        parts += ["### Sizes of the data set", DATASET_SIZES_TEXT, _sweep_table(measurements.dataset_sizes)]
    if measurements.seeds_together:
        parts += ["### Seeds together", SEEDS_TEXT, _sweep_table(measurements.seeds_together, "seeds")]
    if measurements.arms:
        parts += ["### Arms", ARMS_TEXT, _arms_table(measurements.arms)]
    if conditions := _conditions(measurements):
        parts += ["### Versions and machines", _versions(measurements, conditions)]
    return parts


OVERHEADS_TEXT = """\
Whole runs of `python -m fmbench.main`: where the time went. Shares are of the record's wall time, which begins
when Python and the libraries are loaded; the process's includes that. The first step is counted from the start
of the process."""

DATASET_SIZES_TEXT = "fmbench's training, float32, with the 60,000 train images in memory as many times as said."


SEEDS_TEXT = """\
fmbench's training of one net with several seeds in one program; images are those of all seeds together."""

ARMS_TEXT = """\
Ways of running fmbench's training, in turns as above, each a process with an empty cache of compiled programs. A
call of 3 epochs stands for a run in one call; its epochs share an order. An arm that this XLA does not know says
so.

"Images from disk, by grain" is `config.data.pipeline=grain`, the way for sets that outgrow the device: the same
batches, read and sent to it call by call. Images stay resident by default, since a gather on the device costs the
host nothing. Users report grain as 5 to 10 times slower than tf.data on MNIST, where it is handed image by image
([google/grain#1164](https://github.com/google/grain/issues/1164), open); here it is handed whole batches.
[docs/data.md](../docs/data.md) says when to take which."""


def _targets(measurements: Measurements, platform: str) -> list[str]:
    """A table for each machine that measured some of the targets, and one of those that none did."""
    tables: dict[str, list[str]] = {}
    for speed in targets.SPEED if platform == "cpu" else targets.SPEED_ON_GPUS:
        value = targets.speed_ratio(speed, measurements)
        machine = "" if value is None else _machine(measurements.models[speed.model].conditions)
        tables.setdefault(machine, []).append(_speed_target_line(speed, value))
    for target in targets.RUN if platform == "cpu" else ():
        value = targets.run_value(target, measurements)
        overheads = None if value is None else measurements.overheads
        tables.setdefault(_machine(overheads.conditions) if overheads else "", []).append(
            _run_target_line(target, value)
        )
    parts = []
    for machine, lines in sorted(tables.items(), key=lambda item: (not item[0], item[0])):
        parts.append(f"On {machine}:" if machine else "Not measured:")
        parts.append("\n".join(["| | target | measured | |", "|:--|--:|--:|:--|", *lines]))
    return parts


def _machine(conditions: Conditions) -> str:
    """'AMD EPYC (2 cores)', or the accelerators beside it."""
    environment = conditions.environment
    device = (
        "" if environment.device_platform == "cpu" else f"{environment.num_devices} x {environment.device_kind}, "
    )
    cores = f"{environment.cpu_cores} core{'s' if environment.cpu_cores != 1 else ''}"
    return f"{device}{environment.cpu} ({cores})"


def _model_conditions(name: str, model: ModelThroughput) -> str:
    yardstick = model.find(YARDSTICK)
    facts = [
        generated.link(name, model.config_file, "../"),
        _machine(model.conditions),
        f"batch {model.batch_size:,}, inference {model.infer_batch_size:,}",
    ]
    if yardstick and yardstick.num_params:
        facts.append(f"{yardstick.num_params:,} parameters")
    if model.flops_per_image:
        facts.append(f"{model.flops_per_image / 1e6:,.1f} MFLOPs per image and training step")
    facts.append(f"{model.conditions.rounds} rounds of {model.conditions.seconds:g} s")
    matmul = model.conditions.matmul_flops_per_sec
    if memory := model.conditions.memory_bytes_per_sec:
        facts.append(f"memory {_giga(memory)} GB/s")
    facts.append(
        f"matrix products {', '.join(f'{_giga(matmul[dtype])} GFLOP/s {dtype}' for dtype in sorted(matmul))}"
    )
    return "; ".join(facts) + "."


def _model_table(model: ModelThroughput) -> str:
    sizes = sorted({size for row in model.rows for size in row.small_infer_images_per_sec})
    lines = [
        "| system | training, images/s | fmbench is | inference, images/s | fmbench is "
        f"{''.join(f'| in batches of {size:,} | fmbench is ' for size in sizes)}| core-s / 1,000 images "
        "| GFLOP/s | of matmul, % | GB/s | of roofline, % | peak memory, MB | compile cold / warm, s "
        "| logits differ by |",
        f"|:--|{'--:|' * (12 + 2 * len(sizes))}",
    ]
    for row in model.rows:
        name = f"{row.system} {row.dtype}"
        if row.failure is not None:
            lines.append(_line([name, _failure(row), *[""] * (11 + 2 * len(sizes))]))
            continue
        compiling = [row.compile_seconds_cold, row.compile_seconds_warm]
        cells = [
            f"**{name}**" if row.variant == YARDSTICK else name,
            _spread(row.train_images_per_sec),
            _times(model.ratio(row, train_speeds)),
            _spread(row.infer_images_per_sec),
            _times(model.ratio(row, infer_speeds)),
            *(
                cell
                for speeds in map(small_infer_speeds, sizes)
                for cell in (_spread(speeds(row)), _times(model.ratio(row, speeds)))
            ),
            _number(median(row.train_core_seconds_per_1000)),
            _giga(model.flops_per_sec(row)),
            _percent(model.matmul_share(row)),
            _giga(model.bytes_per_sec(row)),
            _percent(model.roofline_share(row)),
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
            f"{generated.text(run.entry)}, {run.num_epochs} epoch{'s' if run.num_epochs > 1 else ''}",
            run.compile_cache,
            _seconds(run.first_step_seconds),
            _seconds(run.process_seconds),
            _seconds(run.wall_seconds),
            *(_percent(seconds / run.wall_seconds) for seconds in parts),
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _arms_table(arms: Mapping[str, Sweep]) -> str:
    lines = [
        "| model | arm | dtype | training, images/s | times default | compile, s | peak memory, MB |",
        "|:--|:--|:--|--:|--:|--:|--:|",
    ]
    for name, sweep in sorted(arms.items()):
        default = median(sweep.rows[0].train_images_per_sec)
        for row in sweep.rows:
            speed = median(row.train_images_per_sec)
            cells = [
                name,
                row.arm,
                row.dtype,
                _spread(row.train_images_per_sec) if row.failure is None else _failure(row),
                _times(speed / default if speed and default else None),
                _seconds(row.compile_seconds_cold),
                _megabytes(row.peak_memory_bytes),
            ]
            lines.append(_line(cells))
    return "\n".join(lines)


def _sweep_table(sweep: Sweep, varied: Literal["copies", "seeds"] = "copies") -> str:
    lines = [
        f"| model | batch size | {varied} | training, images/s | core-s / 1,000 images | peak memory, MB |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for row in sweep.rows:
        cells = [
            row.model,
            f"{row.batch_size:,}",
            str(getattr(row, varied)),
            _spread(row.train_images_per_sec) if row.failure is None else _failure(row),
            _number(median(row.train_core_seconds_per_1000)),
            _megabytes(row.peak_memory_bytes),
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _conditions(measurements: Measurements) -> dict[str, Conditions]:
    """Those of every part."""
    models = {name: model.conditions for name, model in sorted(measurements.models.items())}
    return models | {title: section.conditions for title, section in measurements.sections.items()}


def _versions(measurements: Measurements, conditions: Mapping[str, Conditions]) -> str:
    """Who was measured when and where; parts that share all of that share an item."""
    places: dict[str, list[str]] = {}
    for name, condition in conditions.items():
        places.setdefault(_describe(condition), []).append(name)
    lines = [generated.text(f"{', '.join(names)}: {place}") for place, names in places.items()]
    systems: dict[str, list[str]] = {}
    for name, model in sorted(measurements.models.items()):
        for row in model.rows:
            if row.description:
                line = f"{row.system}, {row.dtype}: {row.description} ({_version_list(row.versions)})"
                systems.setdefault(line, []).append(name)
    lines += [generated.text(f"{line}: {', '.join(names)}") for line, names in systems.items()]
    return "\n".join(f"- {line}" for line in lines)


def _describe(conditions: Conditions) -> str:
    environment = conditions.environment
    commit = environment.git_commit[:12] if environment.git_commit else "not known"
    changed = {False: "", True: ", with changes", None: ", whether changed is not known"}[environment.git_dirty]
    if environment.git_unknown:
        changed += f" ({environment.git_unknown})"
    return (
        f"{conditions.created[:10]}, {_machine(conditions)}, {environment.operating_system}, "
        f"Python {environment.python}, {_version_list(environment.versions)}; commit {commit}{changed}"
    )


def _version_list(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _failure(row: Row) -> str:
    return generated.text(row.failure or "")


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


# Steps by layers.

ROOFLINES = "rooflines.md"
GAPS = 3  # that are named beside a model's table
SMALL = 0.005  # of the step: rows that take less are one

ROOFLINES_TEXT = """\
What a training step of fmbench does layer by layer, beside the least time that each layer could take on the
machine: FLOPs / what a matrix product reaches, or bytes / what memory moves, whichever is longer. Gaps are the
measured less the least time; the largest are what there is to win.

Convolutions and dense layers have the FLOPs of their products (of a convolution with padding, without the taps
that lie outside), and the bytes of operands and results, each moved once. All else has no FLOPs that count, and
the bytes that it would move as one operation: what it reads of other rows, and what other rows read of it. So the
rows' least times suppose that nothing stays in a cache from one row to the next and add up to more than the step's
in [throughput.md](throughput.md), which supposes that all is fused into the products; a row whose arrays stay in a
cache can exceed 100 %. Layers that have as much to do are one row, as are all of a kind without products, and rows
of less than 0.5 % of the step.

The time is that of XLA's operations in a profile (`jax.profiler`) of real steps, of five the one with the median
step. Each is given to the layer that its name in the program says; a fusion has one name, its last operation's.
What several threads do at once shares the wall time equally. On CPUs the threads of oneDNN and of C++ of ours are
not in the profile, so what runs beside a convolution gets half of their common time, whatever it has of the cores.
The profiler itself takes some time: the line above a table has the step without it. Steps are single calls, on one
device, also on accelerators, where a call of many steps would leave less time between operations.

Generated by `python -m fmbench.benchmark --sections=layers`."""


def render_rooflines(measured: Mapping[str, Measurements]) -> str:
    """The text of rooflines.md.

    Args:
        measured: As `render` takes it.
    """
    parts = ["# Training steps by layers", ROOFLINES_TEXT]
    for platform, measurements in measured.items():
        if measurements.layers:
            parts.append(f"## {platform.upper()}")
        for name, profiles in sorted(measurements.layers.items()):
            parts.append(f"### {generated.text(name)}")
            for profile in profiles.profiles:
                parts += [_profile_conditions(name, profiles, profile), _profile_table(profiles, profile)]
    return "\n\n".join(parts) + "\n"


def _largest_gaps(name: str, profiles: Profiles) -> str:
    lines = []
    for profile in profiles.profiles:
        gaps = []
        for layer in profile.gaps(profiles.conditions)[:GAPS]:
            least = layer.least_seconds(profiles.conditions)
            share = f", {_percent(least / layer.seconds)} %" if layer.seconds > 0 else ""
            gaps.append(
                f"{_layer_name(layer)} {_milliseconds(layer.seconds - least)} ms "
                f"({_milliseconds(layer.seconds)}, at the least {_milliseconds(least)}{share})"
            )
        lines.append(
            f"- {profile.dtype}: of {_milliseconds(profile.unprofiled_step_seconds)} ms a step, {'; '.join(gaps)}."
        )
    heading = f"fmbench's largest gaps to the roofline ([all layers]({ROOFLINES}#{name})):"
    return "\n".join([heading, "", *lines])


def _layer_name(layer: Layer) -> str:
    """'blocks.0.conv1 and 5 more, kernel gradient'."""
    more = f" and {len(layer.layers) - 1} more" if len(layer.layers) > 1 else ""
    return generated.text(f"{layer.layers[0]}{more}{', ' if layer.direction else ''}{layer.direction}")


def _profile_conditions(name: str, profiles: Profiles, profile: Profile) -> str:
    conditions = profiles.conditions
    facts = [
        f"**{profile.dtype}**: {generated.link(name, profiles.config_file, '../')}",
        f"{conditions.created[:10]}, {_machine(conditions)}",
        f"batch {profile.batch_size:,}",
        f"{profile.steps} step{'s' if profile.steps > 1 else ''} of {_milliseconds(profile.step_seconds)} ms, "
        f"{_milliseconds(profile.unprofiled_step_seconds)} without the profiler",
        f"matrix products {_giga(conditions.matmul_flops_per_sec[profile.dtype])} GFLOP/s",
        f"memory {_giga(conditions.memory_bytes_per_sec)} GB/s",
    ]
    return "; ".join(facts) + "."


def _profile_table(profiles: Profiles, profile: Profile) -> str:
    conditions = profiles.conditions
    lines = [
        "| layer | | GFLOP | MB | at the least, ms | measured, ms | of roofline, % | gap, ms |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|",
    ]

    def add(name: str, direction: str, layers: list[Layer], seconds: float) -> None:
        least = sum(layer.least_seconds(conditions) for layer in layers)
        cells = [
            name,
            direction,
            _giga(sum(layer.flops for layer in layers)),
            _number(sum(layer.bytes for layer in layers) / 1e6),
            _milliseconds(least),
            _milliseconds(seconds),
            _percent(least / seconds if layers and seconds > 0 else None),
            _milliseconds(seconds - least),
        ]
        lines.append(_line(cells))

    ordered = profile.gaps(conditions)
    small = [layer for layer in ordered if layer.seconds < SMALL * profile.step_seconds]
    for layer in ordered:
        if layer not in small:
            name = _layer_name(layer.model_copy(update={"direction": ""}))
            add(name, layer.direction, [layer], layer.seconds)
    if small:
        add(f"{len(small)} smaller", "", small, sum(layer.seconds for layer in small))
    add("no operation seen", "", [], profile.seconds_elsewhere)
    add("**step**", "", profile.layers, profile.step_seconds)
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.{0 if abs(seconds) >= 0.1 else 1 if abs(seconds) >= 0.01 else 2}f}"

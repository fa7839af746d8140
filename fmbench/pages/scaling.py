"""What `fmbench.scaling` prints: steps on many devices, predictions and what they assume, measurements."""

from collections.abc import Mapping, Sequence

from fmbench.studies.compiled_step import CompiledStep
from fmbench.studies.interconnect import Chip, Limit, Prediction, wire_bytes
from fmbench.studies.loopback import Measurement, OneCore

BUSY = 0.05  # of the cores, with other processes


def render_steps(compiled: Sequence[CompiledStep | str]) -> str:
    """A row for each compiled step; a line for each that was refused, why."""
    rows = [
        "| devices | global batch | images a device | collectives a step | a device sends | FLOPs a device | "
        "memory a device: stays + a step | to compile |",
        "|--:|--:|--:|:--|--:|--:|--:|--:|",
    ]
    for step in compiled:
        if isinstance(step, str):
            continue
        sent = sum(wire_bytes(collective, step.devices) for collective in step.collectives)
        memory = f"{step.resident_bytes / 1e6:,.1f} + {step.temporary_bytes / 1e6:,.1f} MB"
        rows.append(
            f"| {step.devices} | {step.batch_size:,} | {step.batch_size // step.devices:,} | {_kinds(step)} | "
            f"{sent / 1e6:,.2f} MB | {step.flops / 1e9:,.3f} G | {memory} | "
            f"{step.compile_seconds:.0f} s, {step.compiler_peak_bytes / 1e9:.1f} GB |"
        )
    refused = [step for step in compiled if isinstance(step, str)]
    return "\n".join([*rows, *(f"\nRefused: {why}" for why in refused)]) + "\n"


def _kinds(step: CompiledStep) -> str:
    """As '13 all-reduce of 4.9 MB'."""
    kinds = dict.fromkeys(collective.kind for collective in step.collectives)
    parts = []
    for kind in kinds:
        own = [collective for collective in step.collectives if collective.kind == kind]
        payload = sum(collective.payload_bytes * collective.times for collective in own)
        parts.append(f"{sum(collective.times for collective in own)} {kind} of {payload / 1e6:,.2f} MB")
    return ", ".join(parts) or "none"


def render_assumptions(chip: Chip, dtype: str, utilisation: float) -> str:
    """Everything that a prediction on this chip takes as given."""
    links = "; ".join(
        f"{link.name}: rings of {'any number' if link.size == float('inf') else f'{link.size:.0f}'}, "
        f"{link.bytes_per_sec / 1e9:g} GB/s one way, {link.hop_seconds * 1e6:g} us a hop"
        for link in chip.links
    )
    memory = f"; {chip.memory_bytes / 1e9:g} GB of memory" if chip.memory_bytes else ""
    return (
        f"Assumed: {chip.flops_per_sec[dtype] / 1e12:g} TFLOP/s in {dtype}, of which {utilisation:.0%} are "
        f"reached, however few images a device has{memory}. {links}; {chip.launch_seconds * 1e6:g} us to begin a "
        "collective. Collectives come one after another, as in the program compiled for CPUs. Input, evaluation, "
        f"checkpoints and stragglers cost nothing. Source: {chip.source}.\n"
    )


def render_predictions(rows: Mapping[int, Prediction], *, strong: bool) -> str:
    """By the number of devices."""
    lines = [
        f"| {'strong' if strong else 'weak'}: devices | computes, us a step | communicates, us a step | "
        "efficiency: no overlap | full overlap |",
        "|--:|--:|--:|--:|--:|",
    ]
    for devices, row in rows.items():
        lines.append(
            f"| {devices} | {row.compute_seconds * 1e6:,.1f} | {row.communication_seconds * 1e6:,.1f} | "
            f"{row.without_overlap:.0%} | {row.with_full_overlap:.0%} |"
        )
    return "\n".join(lines) + "\n"


def render_limit(found: Limit, *, strong: bool, num_train: int, batch_size: int) -> str:
    """Where it stops, in a sentence or two."""

    def where(devices: int | None) -> str:
        return f"at {devices} devices" if devices else f"nowhere up to {found.looked_up_to} devices"

    which = "that share the batch equally" if strong else "each with a batch of its own"
    line = (
        f"Efficiency falls below 50 %, of devices {which}, {where(found.without_overlap)} without overlap and "
        f"{where(found.with_full_overlap)} with full overlap."
    )
    if not strong:
        most = num_train // batch_size
        line += f" Beyond {most} devices the global batch is larger than the train set's {num_train:,} images."
    return line + "\n"


def render_measurements(one: OneCore, rows: Sequence[Measurement]) -> str:
    """Measured trainings beside predictions."""
    lines = [
        f"Measured here, a core to each process: {one.cores} cores, so that more processes than that share them. "
        f"A core multiplies matrices at {one.flops_per_sec / 1e9:,.1f} GFLOP/s, of which the single process's "
        f"training reaches {one.utilisation:.0%}, both in core-seconds: those of its row agree by construction. "
        "All-reduces are gloo's over loopback, timed alone. Of all-reduces and epochs the fastest counts. "
        "Predictions are for cores that nobody else uses.\n",
        "| processes | computes, ms (predicted) | all-reduces, ms (timed alone) | step, ms: predicted, full to no "
        "overlap | measured | core-ms a step: predicted | measured | speed-up: predicted | measured | others' "
        "share of the cores |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    alone = rows[0]
    for row in rows:
        compute, all_reduce, devices = row.compute_seconds, row.all_reduce_seconds, row.step.devices
        least, most = max(compute, all_reduce), compute + all_reduce
        core_seconds = compute * min(devices, one.cores)
        others = "unknown" if row.others_share is None else f"{row.others_share:.0%}"
        busy = " (busy)" if (row.others_share or 0) > BUSY else ""
        lines.append(
            f"| {devices} | {compute * 1e3:,.2f} | {all_reduce * 1e3:,.2f} | {least * 1e3:,.2f} to "
            f"{most * 1e3:,.2f} | {row.step_seconds * 1e3:,.2f} | {core_seconds * 1e3:,.2f} | "
            f"{row.core_seconds * 1e3:,.2f} | {alone.compute_seconds / most:.2f} to "
            f"{alone.compute_seconds / least:.2f} | {alone.step_seconds / row.step_seconds:.2f} | {others}{busy} |"
        )
    return "\n".join(lines) + "\n"

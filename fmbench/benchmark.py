"""Measures throughput: training and inference of each model, beside stock Flax and, if asked for, other peers.

    python -m fmbench.benchmark
    python -m fmbench.benchmark --peers=torch,keras --configs=configs/vgg_like.py --dtype=float32

Results go to <results_dir>/throughput.json as soon as they are complete, those of accelerators to
throughput-gpu.json or -tpu.json beside it, and all are rendered to throughput.md and rooflines.md. What is
measured again replaces its earlier measurement; models and sections that are not measured this time stay. PyTorch
and Keras need environments of their own, made by benchmarks/setup_peers.sh, or interpreters that have them, in
FMBENCH_TORCH_PYTHON and FMBENCH_KERAS_PYTHON.

Exit codes: 0 done, 1 --check found a difference, 2 something given cannot be used, 130 interrupted.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmbench.errors import UserError
from fmbench.pages import throughput
from fmbench.records import store
from fmbench.system import command_line
from fmbench.system.peers import PEERS, say
from fmbench.system.peers import check as check_peers
from fmbench.throughput import arms, measure
from fmbench.throughput.measurements import (
    Overheads,
    json_path,
    read_all,
    read_measurements,
    summary,
)
from fmbench.throughput.overheads import measure_overheads
from fmbench.throughput.workers import (
    DTYPES,
    TIMEOUT,
    choose_systems,
    left_out,
)

# One entry for each net of which some peer does the whole training step.
CONFIGS = (
    *(f"configs/{name}.py" for name in ("mlp", "baseline", "cnn1", "cnn2", "cnn3", "cnn4", "vgg_like")),
    "configs/fc.py:b",
    "configs/resnet.py:20-paper",
    "configs/speedrun.py:94",
)

SECTIONS = ("models", "overheads", "batch_sizes", "dataset_sizes", "layers", "arms", "seeds_together")
CPU_SECTIONS = SECTIONS[:5]  # by default: what the others compare makes a difference on accelerators


@command_line.plain_errors("benchmark", "interrupted; what was complete is kept.")
def main() -> None:
    arguments = _parse_arguments()
    if arguments.render or arguments.check:
        sys.exit(_render(arguments.results_dir, check=arguments.check))
    _measure(arguments)


def _parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(
        "benchmark",
        usage="%(prog)s [options]",
        description=__doc__,
    )

    def add_list(flag: str, default: Sequence[str], text: str) -> None:
        shown = f" (default: {','.join(default)})" if default else ""
        parser.add_argument(flag, type=_split, default=default, metavar="A,B", help=text + shown)

    parser.add_argument(
        "--configs",
        type=_split,
        metavar="A,B",
        help="config files of the sections models, layers and arms, as fmbench.main takes them (default: those "
        f"that some peer trains alike; of arms {','.join(arms.CONFIGS)}, on CPUs {','.join(arms.CPU_CONFIGS)})",
    )
    add_list("--peers", (), f"further systems to measure, of {', '.join(PEERS)}; none by default")
    add_list("--dtype", DTYPES, "dtypes of the computation; fmbench in float32 is always measured")
    add_list(
        "--sections",
        (),
        f"what to measure, of {', '.join(SECTIONS)}; by default all, on CPUs the first five, with --json models",
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="training time of each system per round; inference takes half, and an eighth in each of two small "
        "batches (default: 2)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per model and system, and write no files"
    )
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--render", action="store_true", help="write the pages from the JSON files, and stop")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is not up to date, and stop")
    return parser.parse_args()


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part for part in text.split(",") if part))


def _render(results_dir: Path, *, check: bool) -> int:
    """Writes the pages, or looks whether they are what they should be. Returns the exit code."""
    measured = read_all(results_dir)
    if not measured:
        raise UserError(f"{json_path(results_dir)} does not exist; measure first.")
    if not check:
        throughput.write_pages(results_dir)
    for path, text in throughput.render_pages(measured, results_dir).items():
        if not path.exists() or path.read_bytes() != text.encode():
            print(
                f"{path} is not what the measurements say; run python -m fmbench.benchmark --render.",
                file=sys.stderr,
            )
            return 1
        print(f"{path} is {'what the measurements say' if check else 'rendered'}.")
    return 0


# What to measure.


def _check_arguments(arguments: argparse.Namespace) -> None:
    for flag, allowed in {"peers": PEERS, "dtype": DTYPES, "sections": SECTIONS}.items():
        for value in getattr(arguments, flag):
            if value not in allowed:
                raise UserError(f"--{flag}={value}: there is no such choice; choose from {', '.join(allowed)}.")
    for flag in ("configs", "dtype"):
        if getattr(arguments, flag) == ():
            raise UserError(f"--{flag} is empty.")
    if arguments.rounds < 1:
        raise UserError(f"--rounds={arguments.rounds}: at least 1 is needed.")
    if not 0 < arguments.seconds < TIMEOUT / 2:
        raise UserError(f"--seconds={arguments.seconds}: choose more than 0 and less than {TIMEOUT / 2:.0f}.")
    if arguments.json and set(arguments.sections) - {"models"}:
        raise UserError("--json prints the section models only; drop --sections, or --json.")
    check_peers(arguments.peers, "measuring")


def _measure(arguments: argparse.Namespace) -> None:
    """Measures the sections that were asked for; each result is kept as soon as there is one."""
    _check_arguments(arguments)
    configs = {spec: measure.load_config(spec) for spec in arguments.configs or CONFIGS}
    if not arguments.json:
        store.check_writable(arguments.results_dir)
        read_all(arguments.results_dir)

    def keep(**parts: Any) -> None:
        # Read again: hours may have passed, and another call may have written its part.
        measurements = read_measurements(arguments.results_dir, setting.platform)
        throughput.write(measure.merge(measurements, **parts), arguments.results_dir, setting.platform)

    with tempfile.TemporaryDirectory(prefix="fmbench-benchmark-") as directory:
        setting = measure.prepare(Path(directory), arguments.rounds, arguments.seconds)
        on_cpu = setting.platform == "cpu"
        sections = arguments.sections or (CPU_SECTIONS if on_cpu else SECTIONS)
        if arguments.json:
            sections = ("models",)
        if "models" in sections:
            missing = left_out(arguments.peers, setting.platform)
            for peer, reason in missing.items():
                say(f"{peer} is left out: {reason}.")
            peers = [peer for peer in arguments.peers if peer not in missing]
            systems = choose_systems(peers, arguments.dtype, setting.platform)
            for spec, run_config in configs.items():
                measured = measure.measure_model(run_config, spec, systems, setting)
                if arguments.json:
                    for row in measured.rows:
                        print(json.dumps(summary(measured, row)), flush=True)
                else:
                    keep(models={run_config.entry: measured})
        if "overheads" in sections:
            runs = measure_overheads(setting.scratch)
            keep(overheads=Overheads(conditions=measure.now(setting.conditions), runs=runs))
        if "batch_sizes" in sections:
            keep(batch_sizes=measure.measure_batch_sizes(setting))
        if "dataset_sizes" in sections:
            keep(dataset_sizes=measure.measure_dataset_sizes(setting))
        if "layers" in sections:
            for spec, run_config in configs.items():
                if profiles := measure.measure_layers(spec, arguments.dtype, setting):
                    keep(layers={run_config.entry: profiles})
        if "arms" in sections:
            for spec in arguments.configs or (arms.CPU_CONFIGS if on_cpu else arms.CONFIGS):
                sweep = measure.measure_arms(spec, setting)
                keep(arms={sweep.rows[0].model: sweep})
        if "seeds_together" in sections:
            keep(seeds_together=measure.measure_seeds_together(setting))
    if not arguments.json:
        written = json_path(arguments.results_dir, setting.platform), throughput.md_path(arguments.results_dir)
        print(f"{', '.join(sections)}: {' and '.join(map(str, written))} are written.")


if __name__ == "__main__":
    main()

"""Trains one benchmark entry and leaves its record, from whose predictions the accuracy can be recomputed.

    python -m fmbench.main --config=mlp
    python -m fmbench.main --config=resnet:20 --config.seed=1 --config.dtype=bfloat16
    python -m fmbench.main --config=path/to/mine.py --config.num_epochs=2

--config takes the name of a shipped config or the path of a file, and behind a colon its argument.
--config.KEY=VALUE sets a field otherwise; the fields are listed below.

Stopped by Ctrl-C or SIGTERM, a run saves a checkpoint; the same command goes on from there. Exit codes: 0 done,
2 something given cannot be used, 3 the loss diverged, 130 interrupted.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

from fmbench import config, entries
from fmbench.distributed import meeting, team
from fmbench.errors import UserError
from fmbench.system import command_line

if TYPE_CHECKING:
    from fmbench.records.schema import RunRecord

# What takes JAX is imported in the functions: help, and the answer to a mistake, should not wait for it.


def main() -> None:
    parser = command_line.Parser(
        "main",
        usage="%(prog)s --config=NAME [--config.KEY=VALUE ...] [options]",
        description=__doc__,
        epilog=_describe_fields(),
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="NAME", help=f"of a config, or a file: {', '.join(entries.names())}")
    parser.add_argument(
        "--workdir", type=Path, help="of the run (default: workdirs/<entry>-<device>-<dtype>-seed<k>)"
    )
    parser.add_argument(
        "--results_dir",
        type=Path,
        help="of the records (default: results; trials, if flags or edits change the entry or the code)",
    )
    parser.add_argument(
        "--machine",
        metavar="NAME",
        help="what to call this machine in records and their names (default: FMBENCH_MACHINE, or its processor)",
    )
    parser.add_argument("--summary", action="store_true", help="show the model's layers and FLOPs, and stop")
    parser.add_argument(
        "--force", action="store_true", help="start anew, throwing away what the work directory holds"
    )
    parser.add_argument(
        "--resume_elsewhere",
        action="store_true",
        help="go on with a run under other code, libraries, machine, cores or thread settings; it is then ranked "
        "nowhere (also FMBENCH_RESUME_ELSEWHERE=1)",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        default=(),
        metavar="A,B",
        help="train these seeds at once, in one program (accelerators)",
    )
    parser.add_argument(
        "--tracker",
        action="append",
        choices=["wandb", "mlflow"],
        default=[],
        help="tell Weights & Biases or MLflow of the run, too (pip install 'fmbench[wandb]'); may be given twice",
    )
    group = parser.add_argument_group("one training over several processes, of which this is one")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the others; where neither JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID nor "
        "the cluster (SLURM, Open MPI, Kubernetes, Cloud TPUs) say how, with:",
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N", help="of the run")
    group.add_argument("--process_id", type=int, metavar="I", help="of this one, from 0 to N - 1")
    group.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="to wait for the others (default: 60)"
    )
    with command_line.plain_errors("main"), contextlib.ExitStack() as stack:
        arguments, words = parser.parse_known_args()
        overrides, stray = entries.split(words)
        if stray:
            parser.refuse(stray[0])
        if arguments.seeds and "seed" in overrides:
            raise UserError("--seeds and --config.seed both say which seed; give one of them.")
        run_config = entries.resolve(arguments.config or "", overrides)
        if arguments.summary:
            print_summary(run_config)
            return
        if arguments.machine is not None:
            os.environ["FMBENCH_MACHINE"] = arguments.machine
        if arguments.resume_elsewhere:
            os.environ["FMBENCH_RESUME_ELSEWHERE"] = "1"
        if place := _meeting_place(arguments):
            stack.enter_context(meeting.joined(place, lambda: _identity(run_config, arguments.seeds)))
        from fmbench import api
        from fmbench.reporting import trackers

        trackers.require(arguments.tracker)
        workdir = arguments.workdir or api.default_workdir(run_config, arguments.seeds)
        results_dir = arguments.results_dir or api.default_results_dir(run_config)
        records = api.run(
            run_config,
            workdir,
            results_dir,
            seeds=arguments.seeds,
            force=arguments.force,
            trackers=tuple(dict.fromkeys(arguments.tracker)),
        )
        if team.present().is_first:
            _say_what_is_where(records, workdir, results_dir)
    sys.exit(max({"completed": 0, "diverged": 3, "interrupted": 130}[record.status] for record in records))


def _say_what_is_where(records: "list[RunRecord]", workdir: Path, results_dir: Path) -> None:
    """Where the runs that were completed left what, and what one may do with it next."""
    for record in records:
        if record.status == "completed":
            folder = workdir / f"seed{record.seed}" if len(records) > 1 else workdir
            lines = [
                f"record: {results_dir / 'runs' / record.name}.json",
                f"model: {folder / 'model'}",
                f"curves: {folder / 'metrics.jsonl'}, and tensorboard --logdir={shlex.quote(str(folder))} "
                "(pip install tensorboard)",
                f"next: fmbench evaluate --model={shlex.quote(str(folder))}",
                f"      fmbench figures --model={shlex.quote(str(folder))}",
                f"      fmbench leaderboard --results_dir={shlex.quote(str(results_dir))}",
            ]
            print("\n".join(lines), file=sys.stderr)


def _meeting_place(arguments: argparse.Namespace) -> meeting.Place | None:
    """Where the processes of a run meet; None for a run of one."""
    place = meeting.Place(
        arguments.coordinator_address, arguments.num_processes, arguments.process_id, arguments.timeout
    )
    if arguments.distributed:
        if not 1 <= place.timeout <= 86400:
            raise UserError(f"--timeout={place.timeout:g} must be from 1 to 86400 seconds.")
        return place
    if given := [name for name, value in place._asdict().items() if name != "timeout" and value is not None]:
        raise UserError(
            f"--{given[0].replace('address', 'coordinator_address')} means nothing without --distributed."
        )
    return None


def _identity(run_config: config_dict.ConfigDict, seeds: tuple[int, ...]) -> dict[str, str]:
    """What processes that train together must share."""
    from fmbench.records import machine

    fields = config.flatten(config.to_json(run_config))
    shared = {f"config.{key}": str(value) for key, value in fields.items() if key not in ("data.dir", "entry")}
    return shared | {"--seeds": str(seeds)} | machine.software()


def _seeds(text: str) -> tuple[int, ...]:
    """'0,1,2' -> (0, 1, 2)."""
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) < 2**32 for word in words):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of seeds like 0,1,2, each from 0 to 2**32 - 1")
    if len({*map(int, words)}) < len(words):
        raise argparse.ArgumentTypeError(f"'{text}' names a seed twice")
    return tuple(map(int, words))


def print_summary(run_config: config_dict.ConfigDict) -> None:
    """Prints the model's table of layers, shapes, parameters and FLOPs of one image's forward pass."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from flax.nnx.summary import filter_rng_streams

    from fmbench.system import runtime
    from fmbench.training import parallel, steps

    # Over two CPU devices convolutions stay in XLA, which counts their FLOPs; in oneDNN it cannot.
    try:
        jax.config.update("jax_num_cpu_devices", 2)
    except RuntimeError as error:  # JAX has its devices: in a notebook that has used it
        raise UserError("--summary needs a process of its own; in a notebook, begin its line with !.") from error
    mesh = parallel.make_mesh(runtime.find_devices()[:1])
    graphdef, state = steps.init_state(run_config, optax.identity(), mesh, np.uint32(run_config.seed))
    model = nnx.merge(graphdef, state.params, state.model_state)
    terminal = sys.stdout.isatty()
    console = {"force_terminal": terminal} if terminal else {"force_terminal": False, "width": 160}
    shape = (run_config.model.num_features,) if run_config.features.backbone else (28, 28, 1)
    image = jnp.zeros((1, *shape))

    def group_digits(row: Any) -> bool:
        """Writes the row's FLOPs as Flax writes its parameters; which rows are shown stays Flax's choice."""
        row.flops = f"{row.flops:,}"
        return filter_rng_streams(row)

    print(nnx.tabulate(model, image, row_filter=group_digits, compute_flops=True, console_kwargs=console).rstrip())
    graphdef, arrays = nnx.split(model)
    lowered = jax.jit(lambda arrays, image: nnx.merge(graphdef, arrays)(image)).lower(arrays, image)
    print(f"FLOPs of an image, forward: {(lowered.cost_analysis() or {})['flops']:,.0f}")


def _describe_fields() -> str:
    """Every field of a config, a line or more each: its default and its meaning."""
    indent = 44
    lines = ["fields, with their defaults; a config sets others:"]
    for field in config.fields():
        flag = f"  --config.{field.key}" + (f"={field.default}" if field.default else "")
        lines += textwrap.wrap(
            field.meaning,
            width=max(shutil.get_terminal_size().columns, indent + 40),
            initial_indent=flag.ljust(indent - 1) + " ",
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
    return "\n".join(lines).replace("%", "%%")


if __name__ == "__main__":
    main()

"""Trains one benchmark entry and leaves a verified record.

    python -m fmbench.main --config=configs/mlp.py
    python -m fmbench.main --config=configs/resnet.py:20 --config.seed=1 --config.dtype=bfloat16

The commonest overrides: --config.seed, --config.num_epochs, --config.batch_size, --config.dtype (float32,
bfloat16), --config.parallel (jit, pmap), --config.model.name, --config.optimizer.name, --config.data.source,
--config.data.dir. All fields with their defaults are in fmbench/config.py.

Stopped by Ctrl-C or SIGTERM, a run saves a checkpoint; the same command goes on from there. Exit codes: 0 done,
2 something given cannot be used, 3 the loss diverged, 130 interrupted.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from flax import nnx

from fmbench import config
from fmbench.errors import UserError
from fmbench.records import machine, schema
from fmbench.system import runtime
from fmbench.training import parallel, steps
from fmbench.training.run import train_and_evaluate

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory of the run. Default: workdirs/<name of the record>."
)
RESULTS_DIR = flags.DEFINE_string("results_dir", "results", "Where the records are collected.")
SUMMARY = flags.DEFINE_bool("summary", False, "Show the model's layers, parameters and FLOPs, and stop.")
FORCE = flags.DEFINE_bool("force", False, "Start anew, throwing away what the work directory holds.")
config.define_flags()


def main(argv: list[str]) -> int:
    del argv
    logging.set_verbosity(logging.ERROR)  # Orbax has much to say
    run_config = config.from_flags()
    if SUMMARY.value:
        print_summary(run_config)
        return 0
    runtime.set_up()
    name = schema.record_name(run_config.entry, machine.environment(), run_config.dtype, run_config.seed)
    if run_config.data.source in ("csv", "idx"):  # of which version is not known before they are read
        name += f"-{run_config.data.source}"
    record = train_and_evaluate(
        run_config,
        Path(WORKDIR.value or f"workdirs/{name}"),
        results_dir=Path(RESULTS_DIR.value),
        force=FORCE.value,
    )
    return {"completed": 0, "diverged": 3, "interrupted": 130}[record.status]


def print_summary(run_config) -> None:
    """Prints the model's table of layers, shapes, parameters and FLOPs of one image's forward pass."""
    # Over two CPU devices convolutions stay in XLA, which counts their FLOPs; in oneDNN it cannot.
    jax.config.update("jax_num_cpu_devices", 2)
    mesh = parallel.make_mesh(jax.devices()[:1])
    graphdef, state = steps.init_state(run_config, optax.identity(), mesh)
    model = nnx.merge(graphdef, state.params, state.model_state)
    terminal = sys.stdout.isatty()
    console = {"force_terminal": terminal} if terminal else {"force_terminal": False, "width": 160}
    shape = (run_config.model.num_features,) if run_config.features.backbone else (28, 28, 1)
    print(nnx.tabulate(model, jnp.zeros((1, *shape)), compute_flops=True, console_kwargs=console))


def run() -> None:
    """Entry point: user mistakes end in one line on standard error."""

    def parse(argv: list[str]) -> list[str]:
        if {"--help", "-h", "--helpfull"} & set(argv):
            print(__doc__, flags.FLAGS.module_help(config), flags.FLAGS.main_module_help(), sep="\n")
            sys.exit(0)
        return config.parse_flags(argv)

    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        print(f"fmbench.main: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()

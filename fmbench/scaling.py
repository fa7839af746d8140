"""Predicts an entry's training on many devices, from the program that XLA compiles for so many fake ones.

    python -m fmbench.scaling --config=vgg_like --config.batch_size=512 --devices=1,2,4,8,64,256
    python -m fmbench.scaling --config=mlp --devices=1,2,4 --measure=1,2,4

For each number of devices a process of its own compiles the training step for that many fake CPU devices, runs
nothing, and reads collectives, bytes, FLOPs and memory off the program. From these, and from stated speeds of
chips and links, which are printed, follow times and efficiency: between no overlap of computation and
communication, and full overlap. Strong scaling shares the entry's batch, weak scaling gives each device a batch of
that size. --measure trains the entry with so many processes on this machine's cores, beside what is predicted of
them.

Exit codes: 0 done, 2 something given cannot be used, 130 interrupted.
"""

import argparse
import math

from fmbench import entries
from fmbench.errors import UserError, nearest
from fmbench.pages import scaling as page
from fmbench.studies import interconnect, loopback
from fmbench.studies.compiled_step import CompiledStep, compile_for
from fmbench.studies.interconnect import CHIPS, Chip, Link
from fmbench.system import command_line
from fmbench.system.peers import say


@command_line.plain_errors("scaling")
def main() -> None:
    parser = command_line.Parser(
        "scaling",
        usage="%(prog)s --config=NAME [--config.KEY=VALUE ...] [options]",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="", metavar="NAME", help="as fmbench.main takes it")
    parser.add_argument(
        "--devices",
        type=_numbers,
        default=(1, 2, 4, 8),
        metavar="N,N",
        help="numbers of devices (default: 1,2,4,8)",
    )
    parser.add_argument(
        "--chips", default=",".join(CHIPS), metavar="A,B", help=f"to predict for (default: {','.join(CHIPS)})"
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=1 / 3,
        metavar="SHARE",
        help="of a chip's FLOP/s that the step reaches (default: a third)",
    )
    group = parser.add_argument_group("a chip of your own, in the place of --chips; all three")
    group.add_argument("--flops_per_sec", type=float, metavar="F", help="in the entry's dtype")
    group.add_argument("--bandwidth", type=float, metavar="B", help="bytes/s one way, of each device in a ring")
    group.add_argument("--latency", type=float, metavar="S", help="seconds a hop")
    group = parser.add_argument_group("trainings on this machine's cores")
    group.add_argument("--measure", type=_numbers, default=(), metavar="N,N", help="numbers of processes")
    group.add_argument("--measure_epochs", type=int, default=3, metavar="N", help="of each (default: 3)")
    arguments, words = parser.parse_known_args()
    if stray := entries.split(words)[1]:
        parser.refuse(stray[0])
    flags = [f"--config={arguments.config}", *words]
    config = entries.from_arguments(flags)
    chips = _chips(arguments, config.dtype)
    if not 0 < arguments.utilisation <= 1:
        raise UserError(f"--utilisation={arguments.utilisation:g} must be above 0, and 1 at most.")
    if arguments.measure_epochs < 1:
        raise UserError(f"--measure_epochs={arguments.measure_epochs} must be at least 1.")

    batch = config.batch_size
    numbers = sorted({1, *arguments.devices})
    print(f"# {config.entry}, {config.dtype}\n")
    known: dict[tuple[int, int], CompiledStep | str] = {}
    compiled: dict[bool, list[CompiledStep]] = {}
    for strong in (True, False):
        batches = {devices: batch if strong else batch * devices for devices in numbers}
        for key in batches.items():
            if key not in known:
                say(f"compiles for {key[0]} devices, batch {key[1]:,}")
                known[key] = _compile_or_refuse(flags, *key)
        rows = [known[key] for key in batches.items()]
        compiled[strong] = [row for row in rows if isinstance(row, CompiledStep)]
        title = "Strong scaling: all devices share a batch" if strong else "Weak scaling: each device has a batch"
        print(f"## {title} of {batch:,}\n\n{page.render_steps(rows)}", flush=True)
    for chip in chips:
        rate = chip.flops_per_sec[config.dtype] * arguments.utilisation
        print(f"## {chip.name}\n\n{page.render_assumptions(chip, config.dtype, arguments.utilisation)}")
        for strong, steps in compiled.items():
            alone, fitting = steps[0], [step for step in steps if step.devices <= interconnect.most_devices(chip)]
            predictions = {step.devices: interconnect.predict(step, alone, chip, rate) for step in fitting}
            found = interconnect.limit(fitting, chip, rate, strong=strong)
            print(page.render_predictions(predictions, strong=strong))
            if len(fitting) < len(steps):
                print(f"Its links join {interconnect.most_devices(chip):.0f} devices at most.\n")
            print(page.render_limit(found, strong=strong, num_train=alone.num_train, batch_size=batch), flush=True)
    if arguments.measure:
        steps = []
        for devices in sorted({1, *arguments.measure}):
            step = known.get((devices, batch))
            steps.append(step if isinstance(step, CompiledStep) else compile_for(flags, devices, batch))
        say(f"trains with {', '.join(str(step.devices) for step in steps)} processes")
        measured = loopback.measure(flags, steps, config.dtype, arguments.measure_epochs)
        print(f"## Measured: {arguments.measure_epochs} epochs\n\n{page.render_measurements(*measured)}")


def _compile_or_refuse(flags: list[str], devices: int, batch_size: int) -> CompiledStep | str:
    """The step; or why many devices cannot have this batch, where one can have its own."""
    try:
        return compile_for(flags, devices, batch_size)
    except UserError as error:
        if devices == 1:
            raise
        return str(error)


def _chips(arguments: argparse.Namespace, dtype: str) -> list[Chip]:
    own = {name: getattr(arguments, name) for name in ("flops_per_sec", "bandwidth", "latency")}
    given = {name: value for name, value in own.items() if value is not None}
    if given:
        if missing := [name for name in own if name not in given]:
            raise UserError(f"--{next(iter(given))} needs --{missing[0]} beside it.")
        if bad := [
            name
            for name, value in given.items()
            if not 0 <= value < math.inf or (value == 0 and name != "latency")
        ]:
            raise UserError(f"--{bad[0]}={given[bad[0]]:g} must be a number above 0.")
        link = Link("link", math.inf, own["bandwidth"], own["latency"])
        return [Chip("the chip given", {dtype: own["flops_per_sec"]}, None, (link,), 0.0, "the command line")]
    names = arguments.chips.split(",")
    if unknown := [name for name in names if name not in CHIPS]:
        raise UserError(f"--chips={unknown[0]}: there is no such chip{nearest(unknown[0], CHIPS)}.")
    return [CHIPS[name] for name in names]


def _numbers(text: str) -> tuple[int, ...]:
    """'1,2,4' -> (1, 2, 4)."""
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and 0 < int(word) <= 4096 for word in words):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers like 1,2,4, each from 1 to 4096")
    return tuple(map(int, words))


if __name__ == "__main__":
    main()

"""Makes the most of an accelerator that is at hand for minutes: checks it, then runs in the order of their worth.

    python -m fmbench.accelerator --minutes=8
    python -m fmbench.accelerator --minutes=3 check speedrun-94
    python -m fmbench.accelerator --minutes=3 check mlp --config.num_epochs=1    a rehearsal, on CPUs perhaps

Nothing is begun that cannot end in time, by a prediction or by what the same entry took before; a run that takes
several stays is stopped with a checkpoint. Records go to <results_dir>/runs as each run ends. Those of this kind
of device that are there, or came with the checkout, are not made again. Unfinished runs lie in
<results_dir>/unfinished: <results_dir> is all there is to take home, and to bring to the next such machine. At the
end a report says what ran and what is left; <results_dir>/accelerator.md keeps it.

Exit codes: 0 all went as meant, if not all that there is to run; 1 a check or a run failed; 2 something given
cannot be used; 130 interrupted.
"""

import multiprocessing
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker
from pathlib import Path

from fmbench import entries
from fmbench.errors import UserError, nearest
from fmbench.system import command_line, files, interrupt

# Measured last, section by section, with the time that is left: flags of `python -m fmbench.benchmark`.
MEASUREMENTS = {
    "arms": ("--sections=arms",),
    "seeds": ("--sections=seeds_together",),
    "throughput": ("--sections=models", "--peers=torch"),
}
LEAST_SECONDS = 60  # that a measurement takes


def main() -> None:
    parser = command_line.Parser("accelerator", usage="%(prog)s [PART ...] [options]", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="check, an entry, or a measurement; default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="all that this may take (default: 8)")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    with command_line.plain_errors("accelerator", "interrupted; finished records are kept."):
        arguments, words = parser.parse_known_args()
        overrides, stray = entries.split(words)
        if stray or "" in overrides:
            parser.refuse(stray[0] if stray else "--config")
        sys.exit(_use(arguments.parts, overrides, arguments.minutes, arguments.results_dir))


def _use(parts: list[str], overrides: dict[str, str], minutes: float, results_dir: Path) -> int:
    """Does what there is time for, and returns the exit code."""
    from fmbench.device import suite  # takes JAX, for which the answer to a mistake should not wait

    start = time.monotonic()
    known = ["check", *(entry.name for entry in suite.SUITE), *MEASUREMENTS]
    for part in parts:
        if part not in known:
            raise UserError(f"there is no part '{part}'{nearest(part, known)}; there are {', '.join(known)}.")
    if not 0 < minutes < float("inf"):
        raise UserError(f"--minutes={minutes:g}: it must be more than 0.")
    parts = parts or known
    chosen = [entry for entry in suite.SUITE if entry.name in parts]
    deadline = start + 60 * minutes

    # In a process of its own: when it ends, the device's memory is free for the measurements. Ctrl-C reaches it
    # too, SIGTERM is passed on, and it is the one to act on them; they wait until it can.
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    arguments = (sender, chosen, overrides, results_dir, deadline, "check" in parts)
    child = spawn.Process(target=suite.run_in_child, args=arguments)
    stopping = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: child.terminate()}
    resource_tracker.ensure_running()  # in `child.start`, where it may unblock signals, it would do so too early
    with interrupt.blocked():
        child.start()
        previous = {signum: signal.signal(signum, handler) for signum, handler in stopping.items()}
    sender.close()  # so that its end is the pipe's
    try:
        report = receiver.recv()
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGTERM:
            raise interrupt.Terminated from None
        raise UserError(
            f"the process that trains ended with exit code {child.exitcode}; finished records are kept, and the "
            "same command goes on."
        ) from None
    child.join()
    for signum, handler in previous.items():
        signal.signal(signum, handler)
    if isinstance(report, BaseException):
        raise report

    failed = [finding.name for finding in report.findings if not finding.ok]
    failed += [result.entry.name for result in report.results if result.failed]
    measured: dict[str, str] = {}
    for name in [] if report.interrupted else [name for name in MEASUREMENTS if name in parts]:
        measured[name] = _measure(MEASUREMENTS[name], results_dir, deadline - time.monotonic())
        if measured[name].startswith("failed"):
            failed.append(name)
    page = suite.markdown(report, measured, (time.monotonic() - start) / 60)
    with files.atomic_file(results_dir / "accelerator.md") as file:
        file.write(page.encode())
    print(page, end="")
    if report.interrupted:
        return 130
    if failed:
        print(f"fmbench.accelerator: failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def _measure(flags: tuple[str, ...], results_dir: Path, seconds: float) -> str:
    """Runs the benchmark for as long as there is time; it keeps what is complete. Says what came of it."""
    if seconds < LEAST_SECONDS:
        return f"not begun: {max(seconds, 0):.0f} s were left"
    command = [sys.executable, "-m", "fmbench.benchmark", *flags, f"--results_dir={results_dir}"]
    with subprocess.Popen(command) as process:
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
            return "stopped when the time was up; what was complete is kept"
    return "done" if status == 0 else f"failed, with exit status {status}"


if __name__ == "__main__":
    main()

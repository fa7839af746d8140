"""Where the time of whole runs goes: `python -m fmbench.main`, timed from outside and by its own record."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fmbench import config
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.system.peers import last_line, say
from fmbench.throughput.measurements import CompileCache, Run
from fmbench.throughput.workers import fresh_caches


def measure_overheads(scratch: Path) -> list[Run]:
    """Whole runs of fmbench.main, with cold and with warm compile caches; all they write goes to `scratch`."""
    environ = fresh_caches(scratch / "overheads-cache")
    runs = [
        _run_main("mlp", 5, "cold", scratch, environ),
        _run_main("mlp", 5, "warm", scratch, environ),
    ]
    _fill_compile_cache("vgg_like", 1, scratch, environ)
    runs.append(_run_main("vgg_like", 1, "warm", scratch, environ))
    return runs


def _main_command(name: str, num_epochs: int, directory: Path) -> list[str]:
    """A run of fmbench.main that keeps all it writes in `directory`."""
    return [
        *(sys.executable, "-m", "fmbench.main"),
        f"--config={config.REPOSITORY / 'configs' / name}.py",
        f"--config.num_epochs={num_epochs}",
        f"--workdir={directory / 'workdir'}",
        f"--results_dir={directory / 'results'}",
    ]


def _run_main(
    name: str, num_epochs: int, compile_cache: CompileCache, scratch: Path, environ: dict[str, str]
) -> Run:
    say(f"overheads: {name}, {num_epochs} epochs, {compile_cache} compile cache")
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        command = _main_command(name, num_epochs, Path(directory))
        start = time.perf_counter()
        done = subprocess.run(command, env=environ, cwd=config.REPOSITORY, capture_output=True, text=True)
        process_seconds = time.perf_counter() - start
        if done.returncode != 0:
            raise UserError(f"{' '.join(command)} failed: {last_line(done.stderr)}")
        (record,) = store.read_all(Path(directory) / "results").values()
    return Run(
        entry=name,
        num_epochs=num_epochs,
        compile_cache=compile_cache,
        process_seconds=process_seconds,
        first_step_seconds=getattr(record, "first_step_seconds", None),
        wall_seconds=record.wall_seconds,
        train_seconds=record.train_seconds,
        eval_seconds=record.eval_seconds,
        checkpoint_seconds=record.checkpoint_seconds,
        compile_seconds=record.compile_seconds,
        setup_seconds=record.setup_seconds,
    )


def _fill_compile_cache(name: str, num_epochs: int, scratch: Path, environ: dict[str, str]) -> None:
    """Starts a run and, when it has compiled, stops it as Ctrl-C would: a whole one would take minutes."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        command = _main_command(name, num_epochs, Path(directory))
        with subprocess.Popen(
            command,
            env=environ,
            cwd=config.REPOSITORY,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stderr
            try:
                lines = []
                for line in process.stderr:
                    lines.append(line)
                    if "trainable parameters" in line:  # what is said when training begins
                        process.terminate()
                returncode = process.wait()
            except BaseException:
                process.kill()
                raise
    if returncode != 130:
        raise UserError(f"{' '.join(command)} could not be interrupted: {last_line(''.join(lines))}")

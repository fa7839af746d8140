"""The processes that make a run: each is listed in its work directory from its first moment, whatever ends it."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ml_collections import config_dict
from pydantic import TypeAdapter, ValidationError

from fmbench import config as config_lib
from fmbench.errors import UserError
from fmbench.records import machine
from fmbench.records.schema import Environment, Process, unlike
from fmbench.system import import_path
from fmbench.system.files import atomic_file
from fmbench.system.suspension import Watch

ELSEWHERE = "FMBENCH_RESUME_ELSEWHERE"
Ending = Literal["completed", "interrupted", "diverged", "failed"]
_list_of_processes = TypeAdapter(list[Process])


class ProcessList:
    """All processes of a run so far, the present one last; kept in <workdir>/processes.json.

    Beside it, .pulse has the seconds of the present one, twice a second: what is left of one that is killed.

    Attributes:
        watch: The clock of the run.
    """

    def __init__(self, workdir: Path, config: config_dict.ConfigDict):
        """Takes the run's config for the modules that it names."""
        self._workdir = workdir
        self._file, self._pulse = workdir / "processes.json", workdir / ".pulse"
        self._config = config
        self._earlier = self._read()
        self.watch = Watch(self._beat)
        self._began = self.watch.awake()
        self._here = machine.environment(ask_driver=False)
        self._present = Process(
            began=machine.now(),
            git_commit=self._here.git_commit,
            git_dirty=self._here.git_dirty,
            git_unknown=self._here.git_unknown,
            conditions=self._here.conditions,
        )
        self._write()

    @property
    def all(self) -> list[Process]:
        """With the seconds of the present one until now, or until it ended."""
        if self._present.ended is None:
            self._stop_clock()
        return [*self._earlier, self._present]

    @property
    def num_resumes(self) -> int:
        return len(self._earlier)

    @property
    def wall_seconds(self) -> float:
        return sum(process.wall_seconds for process in self.all)

    def to_json(self, step: int) -> list[dict[str, Any]]:
        """What a checkpoint after `step` steps keeps of them, for `resume`."""
        self._present = self._present.model_copy(update={"last_step": step})
        return [process.model_dump() for process in self.all]

    def save(self) -> None:
        """Writes them down; to be called when a checkpoint is on disk."""
        self._write()

    def resume(self, step: int, saved: list[dict[str, Any]]) -> None:
        """Goes on from a checkpoint, or at step 0 without one.

        Args:
            step: Steps done.
            saved: What the checkpoint has from `to_json`: those whose work is in it.

        Raises:
            UserError: If they differ from this one in what may change bits or times, and that was not allowed.
        """
        made = _list_of_processes.validate_python(saved)
        nothing = {"first_step": 0, "last_step": 0}
        later = [process.model_copy(update=nothing) for process in self._earlier[len(made) :]]
        known = dict(enumerate(self._earlier))  # with the seconds and the end that a checkpoint does not know
        steps = [{"first_step": process.first_step, "last_step": process.last_step} for process in made]
        self._earlier = [
            _killed(known.get(index, process)).model_copy(update=steps[index])
            for index, process in enumerate(made)
        ] + later
        self._here = self._here.model_copy(update={"code_sha256": self._hash_code()})
        changed = {"first_step": step, "last_step": step, "conditions": self._here.conditions}
        self._present = self._present.model_copy(update=changed)
        if (difference := unlike(self.all)) and os.environ.get(ELSEWHERE, "") in ("", "0"):
            raise UserError(
                f"--workdir={self._workdir} holds a run of other conditions ({difference}). Resume it under "
                "those; or give --resume_elsewhere, and its record lists its processes and is ranked nowhere; or "
                "--force, to start anew."
            )
        self._write()

    def _hash_code(self) -> str:
        """Of fmbench, and of the modules that the config names."""
        names = set()
        for key, value in config_lib.flatten(self._config.to_dict()).items():
            if key.endswith((".name", ".function")) and import_path.is_import_path(value):
                import_path.load(value, f"config.{key}")
                names.add(value.partition(":")[0])
        return machine.sha256_of_modules(names)

    def environment(self) -> Environment:
        """This machine, now, with the code as this process began with it; dirty, if that of any process was."""
        dirty = {process.git_dirty for process in self.all}
        code = self._here.model_dump(include={"git_commit", "git_unknown", "code_sha256"})
        code["git_dirty"] = True if True in dirty else None if None in dirty else False
        code["git_unknown"] = next((process.git_unknown for process in self.all if process.git_unknown), None)
        return machine.environment().model_copy(update=code)

    def end(self, how: Ending) -> None:
        """Says how the present one ends, and when: now."""
        self._stop_clock()
        self._present = self._present.model_copy(update={"ended": how})
        self._write()

    def fail(self, error: BaseException) -> None:
        """Says that an error ended the present one, or forgets it, if it was refused before it did anything.

        A run that is interrupted before anything was trained leaves nothing, either.
        """
        did_nothing = self._present.first_step == self._present.last_step
        if did_nothing and not self._earlier and isinstance(error, (UserError, KeyboardInterrupt)):
            self._file.unlink()
        elif did_nothing and self._earlier and isinstance(error, UserError):
            self._write(self._earlier)
        else:
            self.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")

    def _stop_clock(self) -> None:
        times = {"wall_seconds": self.watch.awake() - self._began, "asleep_seconds": self.watch.asleep_seconds()}
        self._present = self._present.model_copy(update=times)

    def close(self) -> None:
        """Drops what only matters while it may still be killed."""
        self._pulse.unlink(missing_ok=True)

    def _read(self) -> list[Process]:
        """Those of the file; if it is damaged, a checkpoint has them, too."""
        try:
            processes = _list_of_processes.validate_json(self._file.read_bytes())
        except (OSError, ValidationError):
            return []
        if processes and processes[-1].ended is None:
            with contextlib.suppress(OSError, ValueError, TypeError):
                wall, asleep = map(float, self._pulse.read_text().split())
                if wall >= processes[-1].wall_seconds and asleep >= processes[-1].asleep_seconds:
                    times = {"wall_seconds": wall, "asleep_seconds": asleep}
                    processes[-1] = Process.model_validate(processes[-1].model_dump() | times)
        return [_killed(process) for process in processes]

    def _write(self, processes: list[Process] | None = None) -> None:
        listed = self.all if processes is None else processes
        with atomic_file(self._file) as file:
            file.write(json.dumps([process.model_dump() for process in listed], indent=1).encode())

    def _beat(self) -> None:
        """Not forced to disk: after a power cut, the seconds until the last checkpoint count."""
        present = self.all[-1]
        self._pulse.write_text(f"{present.wall_seconds:.3f} {present.asleep_seconds:.3f}\n")


@contextlib.contextmanager
def listed(workdir: Path, config: config_dict.ConfigDict) -> Iterator[ProcessList]:
    """Lists this process in the work directory of the run that it makes or goes on with."""
    processes = ProcessList(workdir, config)
    try:
        with processes.watch:
            yield processes
    except BaseException as error:
        with contextlib.suppress(OSError, UserError):  # of a full disk, perhaps, which `error` tells of
            processes.fail(error)
        raise
    finally:
        processes.close()


def _killed(process: Process) -> Process:
    """One that did not write down how it ended."""
    return process if process.ended else process.model_copy(update={"ended": "killed"})

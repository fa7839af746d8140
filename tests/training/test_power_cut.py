"""Power cuts: an ext4 file system of the run's own is shut down as it stands, nothing flushed."""

import contextlib
import fcntl
import os
import random
import re
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fmbench.models import exported, split_model

NUM_CUTS = int(os.environ.get("FMBENCH_POWER_CUTS", "2"))
FS_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2  # <linux/ext4.h>: what is not on disk yet never will be
STEPS_PER_EPOCH = 60
RUN = (
    "--config=configs/mlp.py",
    "--config.data.source=sample",
    "--config.batch_size=8",
    f"--config.num_epochs={10 * NUM_CUTS}",
)


class Disk:
    """A file system in a file."""

    def __init__(self, folder: Path):
        self.image, self.path = folder / "disk.img", folder / "disk"
        self.path.mkdir()
        with self.image.open("wb") as file:
            file.truncate(64 << 20)
        self._do("mkfs.ext4", "-q", "-m", "0", self.image)
        self.mount()

    def mount(self) -> None:
        self._do("mount", "-o", "loop", self.image, self.path)

    def unmount(self) -> None:
        self._do("umount", self.path)

    def cut_power(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def _do(self, *command: str | Path) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    try:
        disk = Disk(tmp_path)
    except OSError as error:
        pytest.skip(f"needs root, ext4 and a loop device: {error}")
    yield disk
    disk.unmount()


def places(path: Path) -> tuple[str, str]:
    return f"--workdir={path / 'work'}", f"--results_dir={path / 'results'}"


def outcome(path: Path):
    return split_model(exported.load_model(path / "work")[0])[1:], np.load(path / "work" / "record.npy")


@pytest.mark.slow
def test_a_power_cut_costs_the_current_epoch_at_most(start_main, run_main, disk, tmp_path):
    chance = random.Random(0)
    finished = cuts = 0  # epochs whose checkpoint was said to be there, as the next one had ended
    resumed_after = []
    while cuts < NUM_CUTS:
        process = start_main(*RUN, *places(disk.path))
        lines: list[str] = []
        reader = threading.Thread(target=lambda file, lines: lines.extend(file), args=(process.stderr, lines))
        reader.start()
        seen = chance.choice((0, 1, 1, 2, 3))  # epochs of this process
        while process.poll() is None and sum(line.startswith("epoch ") for line in lines) < seen:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.4) if seen else chance.uniform(0, 8))
        assert process.poll() is None, lines
        disk.cut_power()
        process.kill()
        process.wait()
        reader.join()
        disk.unmount()
        disk.mount()
        cuts += 1
        said = [int(match[1]) for line in lines if (match := re.search(r"after step (\d+) of", line))]
        if said:
            resumed_after.append(said[0])
            assert said[0] >= finished * STEPS_PER_EPOCH, (cuts, lines)
        else:
            assert not finished or not lines, (cuts, lines)  # killed before it said so
        assert not any("older checkpoint" in line or "damaged" in line for line in lines), lines
        epochs = [int(match[1]) for line in lines if (match := re.match(r"epoch (\d+)/", line))]
        finished = max([finished, *(epoch - 1 for epoch in epochs)])
    done = run_main(*RUN, *places(disk.path))
    assert done.returncode == 0, done.stderr
    (last,) = re.findall(r"after step (\d+) of", done.stderr) or [0]
    assert int(last) >= finished * STEPS_PER_EPOCH
    assert run_main(*RUN, *places(tmp_path)).returncode == 0
    jax.tree.map(np.testing.assert_array_equal, outcome(disk.path), outcome(tmp_path))
    print(f"\n{cuts} power cuts, 0 lost; went on after steps {[*resumed_after, int(last)]}")


@pytest.mark.slow
def test_a_record_and_an_export_outlive_a_cut_right_after_the_run(run_main, disk):
    done = run_main(*RUN, *places(disk.path))
    assert done.returncode == 0, done.stderr
    disk.cut_power()
    disk.unmount()
    disk.mount()
    again = run_main(*RUN, *places(disk.path))
    assert (again.returncode, again.stderr) == (0, "")
    assert "already finished" in again.stdout


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_with_room_the_same_command_goes_on(run_main, disk):
    short = (*RUN, "--config.num_epochs=3")
    for kibibytes in (0, 20, 1_000, 9_500, 12_000):
        path = disk.path / str(kibibytes)
        path.mkdir()
        filling = disk.path / "filling"
        with filling.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        os.sync()
        os.truncate(filling, filling.stat().st_size - 1024 * kibibytes)
        full = run_main(*short, *places(path))
        assert full.returncode == 2, (kibibytes, full.stderr)
        *_, line = full.stderr.splitlines()
        assert line.startswith("fmbench.main: "), (kibibytes, full.stderr)
        assert "No space left on device" in line, (kibibytes, full.stderr)
        assert "Traceback" not in full.stderr
        filling.unlink()
        done = run_main(*short, *places(path))
        assert done.returncode == 0, (kibibytes, done.stderr)
        shutil.rmtree(path)

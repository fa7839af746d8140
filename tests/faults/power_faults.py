"""Power cuts: an ext4 file system on a loop device, which forgets what was not written through to it."""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from kill_faults import prepared
from scene import (
    NUM_EPOCHS,
    SMALL_RUN,
    Kind,
    Scene,
    Verdict,
    compare,
    epochs_told,
    goes_on,
    numbered,
    places,
    trouble,
)

from fmbench.data.fashion_mnist import SAMPLE_DIRECTORY

FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32) of linux/fs.h
WITHOUT_THE_JOURNAL = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH: as the power cut does


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A file system of 200 MB of its own, mounted below `folder`."""
    image, where = folder / "disk.img", folder / "disk"
    with image.open("wb") as file:
        file.truncate(200 << 20)
    where.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    mount(image, where)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=False)


def mount(image: Path, where: Path) -> None:
    subprocess.run(["mount", "-t", "ext4", "-o", "loop", image, where], check=True)


def cut_power(where: Path) -> None:
    handle = os.open(where, os.O_RDONLY)
    fcntl.ioctl(handle, FS_IOC_SHUTDOWN, struct.pack("I", WITHOUT_THE_JOURNAL))
    os.close(handle)


def power_again(folder: Path) -> None:
    """Unmounts and mounts, which replays the journal."""
    subprocess.run(["umount", folder / "disk"], check=True)
    mount(folder / "disk.img", folder / "disk")


@cache
def obstacle() -> str:
    if os.getuid() != 0:
        return "only root may mount a file system"
    if not shutil.which("mkfs.ext4"):
        return "mkfs.ext4 is not installed"
    try:
        with tempfile.TemporaryDirectory() as name, disk(Path(name)) as where:
            cut_power(where)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no ext4 on a loop device can be mounted here ({error})"
    return ""


def in_training(scene: Scene, case: str) -> Verdict:
    """At any moment between the first epoch's end and that of the run."""
    epoch = scene.rng.randint(1, NUM_EPOCHS)
    with disk(scene.folder) as where:
        with scene.start("fmbench.main", *SMALL_RUN, *places(where)) as child:
            while child.is_running(0.002) and epoch not in epochs_told(child):
                pass
            child.is_running(scene.rng.uniform(0, 0.4))
            cut_power(where)
            child.kill()
            result = child.wait()
        done = max(epochs_told(result)) - 1
        power_again(scene.folder)
        return after(scene, where, done)


def after_the_end(scene: Scene, case: str) -> Verdict:
    """Just when the command has said that it is done: record, predictions and model are there to stay."""
    with disk(scene.folder) as where:
        result = scene.train(place=where)
        cut_power(where)
        power_again(scene.folder)
        if wrong := trouble(result, 0):
            return wrong
        return compare(where, scene.references.finished)


def in_the_data_cache(scene: Scene, case: str) -> Verdict:
    with disk(scene.folder) as where:
        env = {"FMBENCH_CACHE": str(where / "cache"), "FMBENCH_DATA_DIR": str(SAMPLE_DIRECTORY)}
        with scene.start("fmbench.datasets", env=env, small_data=True) as child:
            child.is_running(scene.rng.uniform(0.2, 2))
            cut_power(where)
            child.kill()
            child.wait()
        power_again(scene.folder)

        return prepared(scene, where / "cache")


def after(scene: Scene, where: Path, done: int) -> Verdict:
    """The same command, whose places are on the disk."""
    scene.folder, folder = where, scene.folder
    try:
        return goes_on(scene, done)
    finally:
        scene.folder = folder


KINDS = [
    Kind("power cut in training", numbered(20), in_training, obstacle),
    Kind("power cut after the end", numbered(5), after_the_end, obstacle),
    Kind("power cut in filling the data cache", numbered(5), in_the_data_cache, obstacle),
]

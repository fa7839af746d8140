"""Trains on synthetic sets of Fashion-MNIST's shape and many times its rows, and prints what memory that takes.

    python benchmarks/large_sets.py --times=1,4,16,64 --pipeline=grain

Each set, of random pixels in idx files, is written into a temporary folder (47 MB times the number; --scratch says
where), trained on for an epoch by `python -m fmbench.main`, and removed. A line each:

    own, MB     the most memory of the process that no file stands behind (RssAnon, looked at every 50 ms)
    all, MB     with pages of files, which the system takes back when it wants them (VmHWM, as the record has it)
"""

import argparse
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fmbench.data import sources
from fmbench.records import store
from fmbench.system.peers import last_line

NUM_TRAIN, NUM_TEST = 60_000, 10_000


def write_set(directory: Path, times: int) -> None:
    """The four idx files, of random pixels and of labels that take turns."""
    rng = np.random.default_rng(times)
    for prefix, number in (("train", times * NUM_TRAIN), ("t10k", NUM_TEST)):
        with (directory / sources.FILE_NAMES[f"{prefix}-images"]).open("wb") as file:
            file.write(struct.pack(">HBB3I", 0, 8, 3, number, 28, 28))
            for start in range(0, number, NUM_TEST):
                file.write(rng.integers(0, 256, (min(NUM_TEST, number - start), 784), np.uint8).tobytes())
        labels = (np.arange(number) % 10).astype(np.uint8)
        path = directory / sources.FILE_NAMES[f"{prefix}-labels"]
        path.write_bytes(sources.idx_header(labels) + labels.tobytes())


def train(data: Path, scratch: Path, flags: list[str]) -> tuple[int, int, float]:
    """The most memory that is no file's and the most of all, in bytes, and images per second."""
    command = [
        *(sys.executable, "-m", "fmbench.main", "--config.data.source=idx", "--config.data.unproven=true"),
        *("--config.num_epochs=1", f"--config.data.dir={data}", *flags),
        *(f"--workdir={scratch / 'workdir'}", f"--results_dir={scratch / 'results'}"),
    ]
    own, record = 0, scratch / "workdir" / "record.json"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not record.exists():  # then the machine is measured
            status = Path(f"/proc/{process.pid}/status").read_text()
            own = max([own, *(1024 * int(number) for number in re.findall(r"RssAnon:\s+(\d+) kB", status))])
            time.sleep(0.05)
        _, stderr = process.communicate()
        if process.returncode:
            sys.exit(last_line(stderr))
    ended = store.read(record)
    return own, ended.peak_memory_bytes, ended.train_images_per_sec or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--times", default="1,4,16,64", help="the train set's rows, in 60,000 (default: 1,4,16,64)"
    )
    parser.add_argument("--pipeline", default="grain", help="config.data.pipeline (default: grain)")
    parser.add_argument("--config", default="mlp", help="as fmbench.main takes it (default: mlp)")
    parser.add_argument("--split", default="default", help="config.data.split (default: default)")
    parser.add_argument("--scratch", type=Path, help="folder for the sets (default: the system's temporary one)")
    arguments = parser.parse_args()
    flags = [
        f"--config={arguments.config}",
        f"--config.data.pipeline={arguments.pipeline}",
        f"--config.data.split={arguments.split}",
    ]
    print(f"{'times':>6} {'train images':>14} {'own, MB':>8} {'all, MB':>8} {'images/s':>9}")
    for times in map(int, arguments.times.split(",")):
        with tempfile.TemporaryDirectory(prefix="fmbench-large-", dir=arguments.scratch) as directory:
            data = Path(directory, "data")
            data.mkdir()
            write_set(data, times)
            own, peak, speed = train(data, Path(directory), flags)
        cells = f"{times:>6} {times * NUM_TRAIN:>14,} {own / 1e6:>8,.0f} {peak / 1e6:>8,.0f} {speed:>9,.0f}"
        print(cells, flush=True)


if __name__ == "__main__":
    main()

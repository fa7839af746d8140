"""Several processes against one, on the real data: writes the table of docs/distributed.md.

    python tests/distributed/layouts.py FOLDER

Each net is trained for an epoch in each layout, with a work directory in FOLDER, which takes an hour on two cores.
What is finished there is kept: the same command goes on after an interruption.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmbench.pages import generated
from fmbench.records import store
from fmbench.records.schema import RunRecord

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "distributed.md"
MARKS = ("<!-- layouts: begin -->", "<!-- layouts: end -->")
Run = tuple[RunRecord, np.ndarray]  # and the predicted classes


class Layout(NamedTuple):
    num_processes: int
    num_devices: int  # of each process
    parallel: str = "jit"

    @property
    def alone(self) -> "Layout":
        """One process with as many devices, which rounds every mean alike."""
        return Layout(1, self.num_processes * self.num_devices)

    def __str__(self) -> str:
        return f"{self.num_processes} x {self.num_devices}, {self.parallel}"


ONE = Layout(1, 1)
LAYOUTS = [
    *(Layout(2, 1, parallel) for parallel in ("jit", "pmap")),
    Layout(4, 1),
    Layout(4, 1, "pmap"),
    *(Layout(2, 2, parallel) for parallel in ("jit", "pmap")),
    Layout(4, 2),
]
NETS = {"mlp": LAYOUTS, "cnn4": LAYOUTS, "vgg_like": LAYOUTS[:3]}


def main() -> None:
    folder = Path(sys.argv[1])
    lines = [
        "| net | processes x devices each, mapped by | against one process with as many devices: train loss | "
        "predictions that differ | against one with one device: train loss | predictions | test accuracy, % |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for net, layouts in NETS.items():
        one = train(net, ONE, folder)
        lines.append(f"| {net} | {ONE} |  |  |  |  | {accuracy(one)} |")
        for layout in layouts:
            several = train(net, layout, folder)
            told = [*difference(several, train(net, layout.alone, folder)), *difference(several, one)]
            lines.append(f"| {net} | {layout} | {' | '.join(told)} | {accuracy(several)} |")
    generated.write(generated.between_marks(PAGE, MARKS, ["\n".join(lines)]))


def train(net: str, layout: Layout, folder: Path) -> Run:
    """The record and the predictions of an epoch in a layout, trained unless they are there."""
    work = folder / f"{net} {layout}"
    if not (work / "record.json").exists():
        print(work.name, flush=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        several = ("--distributed", f"--coordinator_address={address}", f"--num_processes={layout.num_processes}")
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "fmbench.main", f"--config=configs/{net}.py", "--config.num_epochs=1"),
                    *(f"--config.parallel={layout.parallel}", f"--workdir={work}", f"--results_dir={folder}"),
                    *((*several, f"--process_id={index}") if layout.num_processes > 1 else ()),
                ],
                cwd=REPOSITORY,
                env=os.environ | {"JAX_NUM_CPU_DEVICES": str(layout.num_devices), "JAX_PLATFORMS": "cpu"},
            )
            for index in range(layout.num_processes)
        ]
        exit_codes = [process.wait() for process in processes]
        if any(exit_codes):
            raise SystemExit(f"{work.name}: failed, see above.")
    return store.read(work / "record.json"), np.load(work / "record.npy")


def accuracy(run: Run) -> str:
    return f"{100 * (run[0].test_accuracy or 0):.2f}"


def difference(one: Run, other: Run) -> list[str]:
    """Of the train loss, relative to the other's, and the number of predictions."""
    losses = [record.history[-1].train_loss for record, _ in (one, other)]
    relative = abs(losses[0] - losses[1]) / losses[1]
    return ["equal" if relative == 0 else f"{relative:.0e}", str(int((one[1] != other[1]).sum()))]


if __name__ == "__main__":
    main()

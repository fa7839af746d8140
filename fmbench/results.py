"""Prints the results in records in a form that others read.

    fmbench results --format=timm                       all of results/runs, as timm's tables of results
    fmbench results --format=huggingface RECORD.json    evaluation results for a model card (README.md)
    fmbench results --format=mllog RECORD.json          a run as MLPerf logs it, :::MLLOG
    fmbench results --format=dawnbench RECORD.json      a run as DAWNBench has it, epoch, hours, top1Accuracy

They are completed runs on the standard data; others of results/runs are left out. Accuracies are recomputed from
the predictions beside each record first, as the leaderboard does.

Exit codes: 0 done, 2 something given cannot be used.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fmbench.data import proof
from fmbench.errors import UserError
from fmbench.exchange import dawnbench, hugging_face, mllog, timm
from fmbench.pages import leaderboard
from fmbench.records import store
from fmbench.records.schema import RunRecord
from fmbench.system import command_line, files

OF_SEVERAL: dict[str, Callable[[Sequence[RunRecord]], str]] = {
    "timm": timm.render,
    "huggingface": hugging_face.render,
}
OF_ONE: dict[str, Callable[[RunRecord], str]] = {"mllog": mllog.render, "dawnbench": dawnbench.render}


@command_line.plain_errors("results")
def main() -> None:
    parser = command_line.Parser("results", description=__doc__)
    parser.add_argument("--format", choices=[*OF_SEVERAL, *OF_ONE], required=True)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    parser.add_argument(
        "records",
        type=Path,
        nargs="*",
        metavar="RECORD",
        help="file of a record; default: all of <results_dir>/runs",
    )
    arguments = parser.parse_args()
    records = _records(arguments.records, arguments.results_dir)
    if arguments.format in OF_SEVERAL:
        text = OF_SEVERAL[arguments.format](records)
    elif len(arguments.records) == 1:
        text = OF_ONE[arguments.format](records[0])
    else:
        raise UserError(f"--format={arguments.format} is the form of one run; name the file of its record.")
    if not arguments.output:
        sys.stdout.write(text)
        return
    with files.one_line(arguments.output), files.atomic_file(arguments.output) as file:
        file.write(text.encode())
    print(f"{arguments.output} written.")


def _records(named: Sequence[Path], results_dir: Path) -> list[RunRecord]:
    """Those that are named, or all that these forms can have.

    Raises:
        UserError: If one is not valid, or is named and not of such a run; if there are none.
    """
    records = {path: store.read(path) for path in named} if named else store.read_all(results_dir)
    for path, record in records.items():
        if named and not _is_fit(record):
            raise UserError(
                f"{path} is of a run that is {record.status}, on data of {record.data_version}; these forms have "
                f"completed runs on data of {proof.STANDARD}."
            )
    fit = {path: record for path, record in records.items() if _is_fit(record)}
    if not fit:
        raise UserError(f"--results_dir={results_dir} has no completed run on the standard data.")
    leaderboard.verify_accuracies(fit)
    return list(fit.values())


def _is_fit(record: RunRecord) -> bool:
    return record.status == "completed" and record.data_version == proof.STANDARD


if __name__ == "__main__":
    main()

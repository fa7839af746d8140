"""Trains a record's run once more, at its config and seed, and compares.

    python -m fmbench.verify results/runs/mlp-cpu-float32-seed0.json
    python -m fmbench.verify results/runs/speedrun-94-cpu-float32-seed0.json --epochs=1
    python -m fmbench.verify --cheap

Says what is not the same here as where the record was made (commit, machine, cores, libraries), how far the train
losses lie from the record's, epoch by epoch, and, of a whole run, how many test images are classified otherwise.
Where nothing differs a run repeats itself to the last bit. Elsewhere rounding differs, and losses drift apart from
epoch to epoch: verified is then the first epoch's, within 3 %, and of a whole run the test accuracy, within 1.5
points. Times are not compared.

--cheap takes the first epoch of one record of results/runs, another every day. --write leaves what was found, and
where, in <results_dir>/verified/<name of the record>.json, which the leaderboard shows.

Exit codes: 0 equal, or within that distance, 1 not, 2 something given cannot be used.
"""

import datetime
import sys
from pathlib import Path

from fmbench.errors import UserError
from fmbench.records import store, verified
from fmbench.system import command_line


@command_line.plain_errors("verify")
def main() -> None:
    parser = command_line.Parser("verify", description=__doc__)
    parser.add_argument("record", type=Path, nargs="?", help="file of the record, its predictions beside it")
    parser.add_argument("--epochs", type=int, help="how many, from the first (default: all; with --cheap 1)")
    parser.add_argument("--cheap", action="store_true", help="a record that is soon trained, drawn by the date")
    parser.add_argument("--write", action="store_true", help="leave what was found in <results_dir>/verified")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    arguments = parser.parse_args()
    if (arguments.record is None) != arguments.cheap:
        parser.error("name a record, or give --cheap")
    sys.exit(_verify(arguments.record, arguments.epochs, arguments.results_dir, arguments.write))


def _verify(path: Path | None, epochs: int | None, results_dir: Path, is_written: bool) -> int:
    """Exit code 0 if the record is verified, else 1."""
    from absl import logging

    from fmbench.records import machine
    from fmbench.studies import verification
    from fmbench.system import runtime

    if path is None:
        path, epochs = verification.cheap(store.read_all(results_dir), datetime.date.today()), epochs or 1
    record = store.read(path)
    if record.status != "completed":
        raise UserError(f"{path} is of a run that is {record.status}; only completed ones are verified.")
    epochs = record.num_epochs if epochs is None else epochs
    if not 1 <= epochs <= record.num_epochs:
        raise UserError(f"--epochs={epochs}: the record has 1 to {record.num_epochs}.")
    predictions = store.read_predictions(record, path.with_suffix(".npy"))
    logging.set_verbosity(logging.ERROR)  # Orbax has much to say
    runtime.set_up()
    print(f"{record.name}: {epochs} of {record.num_epochs} epochs", flush=True)
    not_the_same = verification.differences(record.environment, machine.environment())
    for difference in not_the_same:
        print(f"not the same: {difference}", flush=True)
    comparison = verification.retrain(record, predictions, epochs)
    for number, (epoch, distance) in enumerate(zip(record.history, comparison.distances, strict=False), 1):
        print(f"epoch {number}: train loss {epoch.train_loss:.6f}, differs by {distance:.3g} of it")
    if comparison.differing is not None:
        points = 100 * (comparison.accuracy_distance or 0)
        print(
            f"predictions: {comparison.differing:,} of {record.num_test:,} differ, accuracy by {points:.2f} points"
        )
    if is_written:
        print(verified.write(verification.outcome(record, comparison, not_the_same), results_dir))
    stated = f"within {verification.FIRST_EPOCH:.0%}"
    if comparison.accuracy_distance is not None:
        stated += f", and the test accuracy within {100 * verification.WHOLE_RUN} points"
    if comparison.is_equal:
        print("verified: bit for bit")
    elif comparison.is_within:
        print(f"verified: the first epoch's train loss is {stated}")
    else:
        print(f"NOT verified: the first epoch's train loss is not {stated}", file=sys.stderr)
    return 0 if comparison.is_within else 1


if __name__ == "__main__":
    main()

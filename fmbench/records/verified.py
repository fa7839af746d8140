"""Who trained a record's run again, where, and what differed: <results_dir>/verified/<record's name>.json."""

from collections.abc import Mapping
from pathlib import Path

from fmbench.errors import UserError
from fmbench.records import store
from fmbench.records.schema import Count, Environment, Fraction, RunRecord, Strict
from fmbench.system.files import atomic_file


class Verification(Strict):
    """One run trained once more. Like a record's its numbers are self-reported."""

    record: str  # its name
    predictions_sha256: str  # the record's: those of another run are not verified
    created: str  # UTC, ISO 8601
    num_epochs: Count  # compared, from the first
    train_loss_distances: list[float]  # as fractions of the record's, by epoch
    predictions_that_differ: Count | None  # None, if only a part was trained; likewise:
    test_accuracy_distance: Fraction | None
    is_equal: bool  # to the last bit
    is_within: bool  # the distance that `studies.verification` states
    not_the_same: list[str]  # here and where the record was made
    environment: Environment

    @property
    def found(self) -> str:
        """In words for a table."""
        if self.is_equal:
            return "the same bits"
        found = f"losses within {max(self.train_loss_distances):.2g} of them"
        if self.predictions_that_differ is not None:
            found += f", {self.predictions_that_differ:,} predictions differ"
        return found if self.is_within else f"NOT verified: {found}"


def write(verification: Verification, results_dir: Path) -> Path:
    """Writes it in the place of an earlier one of the record; returns where."""
    path = results_dir / "verified" / f"{verification.record}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(verification.model_dump_json(indent=1).encode() + b"\n")
    return path


def read_all(results_dir: Path, records: Mapping[Path, RunRecord]) -> list[tuple[RunRecord, Verification]]:
    """The verifications of `records`, each with its record, in the order of their names.

    Raises:
        UserError: If one is damaged, or is not of the record whose name it has.
    """
    by_name = {record.name: record for record in records.values()}
    found = []
    for path in sorted((results_dir / "verified").glob("*.json")):
        verification = store.read_as(Verification, path, "verification", "Delete it.")
        record = by_name.get(path.stem)
        if not record or (verification.record, verification.predictions_sha256) != (
            record.name,
            record.predictions_sha256,
        ):
            raise UserError(
                f"{path}: it is not of the record of that name; delete it, or verify the record again."
            )
        found.append((record, verification))
    return found

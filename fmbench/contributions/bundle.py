"""A submission: records, their predictions and logs in one .tar.gz, whose bytes follow from theirs."""

import gzip
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from fmbench.contributions.checks import Candidate
from fmbench.errors import UserError
from fmbench.records.schema import FILE_NAME, RunRecord
from fmbench.system.command_line import in_one_line

LOG = ".metrics.jsonl"
ENDINGS = (".json", ".npy", ".validation.npy", LOG)
MOST_FILES = 1000
# Bytes. A record has some 10,000, and its predictions as many.
LARGEST_PACKED = 64 << 20
LARGEST = 256 << 20


def pack(records: Sequence[tuple[Candidate, RunRecord]]) -> tuple[bytes, list[str]]:
    """The bytes of a submission, and the names of its files."""
    found: dict[str, Path] = {}
    for candidate, record in records:
        found[f"{record.name}.json"] = candidate.path
        found[f"{record.name}.npy"] = candidate.path.with_suffix(".npy")
        if record.val_predictions_sha256:
            found[f"{record.name}.validation.npy"] = candidate.path.with_suffix(".validation.npy")
        if candidate.log:
            found[record.name + LOG] = candidate.log
    packed = io.BytesIO()
    # No name, owner or time of this machine goes in.
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for name in sorted(found):
            content = found[name].read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue(), sorted(found)


def unpack(path: Path, folder: Path) -> list[Candidate]:
    """Writes the files of a submission, which may be anybody's, to a folder.

    Raises:
        UserError: If it is none, is too large, or has anything in it but the plain files of records.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; name a submission, as `fmbench submit` writes it.")
    try:
        contents = _contents(path)
        stems = [name.removesuffix(".json") for name in contents if name.endswith(".json")]
        if not contents:
            raise ValueError("it is empty")
        if strange := contents.keys() - {stem + ending for stem in stems for ending in ENDINGS}:
            raise ValueError(f"{min(strange)} belongs to no record")
    except Exception as error:  # gzip and tarfile raise many kinds for what is damaged or made to harm
        if isinstance(error, OSError) and error.errno:  # the machine's, not gzip's
            raise
        raise UserError(
            f"{path}: not a submission ({in_one_line(str(error))[:200]}); have it made again."
        ) from error
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    logs = {stem: folder / (stem + LOG) for stem in stems}
    return [
        Candidate(folder / f"{stem}.json", logs[stem] if logs[stem].exists() else None) for stem in sorted(stems)
    ]


def _contents(path: Path) -> dict[str, bytes]:
    """The files in an archive by name, without any folder, link or device.

    Raises:
        ValueError: If there is more in it, and others for damage.
    """
    with path.open("rb") as file:
        packed = file.read(LARGEST_PACKED + 1)
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as compressed:
        content = b"" if len(packed) > LARGEST_PACKED else compressed.read(LARGEST + 1)
    if len(packed) > LARGEST_PACKED or len(content) > LARGEST:
        raise ValueError(f"it is too large: {LARGEST_PACKED:,} bytes and, unpacked, {LARGEST:,} are the most")
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for member in archive:
            name = f"{member.name!r:.80}"
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                raise ValueError(f"{name} is no plain file")
            if not re.fullmatch(FILE_NAME, member.name) or not member.name.endswith(ENDINGS):
                raise ValueError(f"{name} is no name of a record's file")
            if member.name.casefold() in {one.casefold() for one in found}:
                raise ValueError(f"{name} is in it twice")
            if len(found) == MOST_FILES:
                raise ValueError(f"it has more than {MOST_FILES} files")
            plain = archive.extractfile(member)
            found[member.name] = plain.read() if plain else b""
            if len(found[member.name]) != member.size:
                raise ValueError(f"{name} is cut short")
    return found

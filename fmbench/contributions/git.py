"""What git knows of the repository in which a folder of results lies."""

import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from fmbench.errors import UserError
from fmbench.records.machine import GIT_REDIRECTIONS, GIT_TIMEOUT


def ask(folder: Path, *arguments: str, given: bytes = b"") -> bytes:
    """What git answers about the repository of `folder`, whatever repository the environment points to.

    Raises:
        UserError: If there is no git or no repository, or git refuses; says why in git's words.
    """
    done = _run(folder, *arguments, given=given)
    if done.returncode:
        first, *_ = done.stderr.decode(errors="replace").strip().splitlines() or [
            f"it ended with {done.returncode}"
        ]
        raise UserError(f"{folder}: git says: {first.removeprefix('fatal: ')}. A clone of fmbench is needed here.")
    return done.stdout


def agrees(folder: Path, *arguments: str) -> bool:
    """Whether git ends a question, as `cat-file -e` and `merge-base --is-ancestor` are, with 0."""
    return _run(folder, *arguments).returncode == 0


def _run(folder: Path, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in GIT_REDIRECTIONS}
    try:
        return subprocess.run(
            ["git", "--no-optional-locks", "-c", "log.showSignature=false", "-C", str(folder), *arguments],
            env=environment | {"LC_ALL": "C"},
            input=given,
            capture_output=True,
            timeout=GIT_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{folder}: git gave no answer in {GIT_TIMEOUT} s; try again.") from None
    except OSError as error:
        raise UserError(f"git cannot be run ({error.strerror}); install it.") from None


def blobs(folder: Path, ids: Iterable[str]) -> dict[str, bytes]:
    """The contents of files by the hashes that git has of them."""
    wanted = sorted(set(ids))
    answer = ask(folder, "cat-file", "--batch", given="".join(f"{one}\n" for one in wanted).encode())
    found, start = {}, 0
    for one in wanted:  # "<hash> blob <size>", the content, a newline
        end = answer.index(b"\n", start)
        _, kind, *size = answer[start:end].split()
        if kind != b"blob":
            raise UserError(f"{folder}: git lacks the file {one[:7]}; clone the repository anew, and whole.")
        start = end + 1 + int(size[0])
        found[one] = answer[end + 1 : start]
        start += 1
    return found


def files(folder: Path, commit: str, *names: str) -> dict[str, str]:
    """Files at a commit, those of `names` and below: by their path from `folder`, git's hash of each."""
    found = {}
    for line in ask(folder, "ls-tree", "-r", "-z", commit, "--", *names).decode(errors="replace").split("\0"):
        if line:
            about, _, path = line.partition("\t")
            found[path] = about.split()[2]
    return found


def code_sha256(repository: Path, commit: str) -> str:
    """What `records.machine.code_sha256` is of the code of a commit."""
    found = {path: one for path, one in files(repository, commit, "fmbench").items() if path.endswith(".py")}
    contents = blobs(repository, found.values())
    digest = hashlib.sha256()
    for path in sorted(map(PurePosixPath, found)):
        digest.update(f"{path.relative_to('fmbench').as_posix()}\0".encode())
        digest.update(hashlib.sha256(contents[found[path.as_posix()]]).digest())
    return digest.hexdigest()

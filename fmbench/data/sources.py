"""Where the four idx files of Fashion-MNIST come from.

Each source returns the files as they came, part by part, gzipped or not; nothing here decides
whether they are the right ones. That is proven in `datasets.py`, which asks the sources in turn. A
source that has nothing to give raises `UserError` with the reason in one line.

The idx format: two zero bytes, the type of the numbers (8 is uint8), the number of dimensions, each
dimension as a big-endian uint32, then the numbers in C order.
Source: https://github.com/zalandoresearch/fashion-mnist and http://yann.lecun.com/exdb/mnist.
"""

import gzip
import http.client
import math
import os
import queue
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmbench.errors import UserError

FILE_NAMES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "t10k-images": "t10k-images-idx3-ubyte",
    "t10k-labels": "t10k-labels-idx1-ubyte",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
OFFICIAL_URLS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
NO_ANSWER_SECONDS = 10  # for all URLs together
APT_IDLE_SECONDS = 12  # without a byte, before apt-get is given up


class IdxFile(NamedTuple):
    """One file as it came: its path or URL, for messages, and its bytes, gzipped or not."""

    where: str
    content: bytes


def sources(scratch: Path) -> dict[str, Callable[[], dict[str, IdxFile]]]:
    """Names the sources in the order to ask them; `scratch` is an existing, writable directory."""
    return {
        f"Debian's {DEBIAN_DIRECTORY}": lambda: read_directory(DEBIAN_DIRECTORY),
        "the official URLs": lambda: download(OFFICIAL_URLS),
        f"apt-get download {DEBIAN_PACKAGE}": lambda: apt_get_download(scratch),
    }


def decode_idx(file: IdxFile) -> np.ndarray:
    """Decodes an idx file, gzipped or not, into a read-only uint8 array.

    Raises:
      UserError: the file is truncated, damaged or not an idx file at all; the message names it.
    """
    content = file.content
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except EOFError as error:
            raise UserError(f"{file.where} is truncated: its gzip stream ends early.") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file.where} is damaged: its gzip check fails ({error}).") from error
    if content[:3] != b"\0\0\x08":
        raise UserError(
            f"{file.where} is not an idx file of bytes: it begins with {content[:15]!r}, "
            r"an idx file with b'\x00\x00\x08'."
        )
    header_size = 4 + 4 * content[3] if len(content) > 3 else 4
    if len(content) < header_size:
        raise UserError(f"{file.where} is truncated: it ends within the idx header.")
    shape = struct.unpack(f">{content[3]}I", content[4:header_size])
    found, expected = len(content) - header_size, math.prod(shape)
    if found != expected:
        problem = "truncated" if found < expected else "damaged"
        raise UserError(f"{file.where} is {problem}: its header promises {expected} bytes, {found} follow it.")
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def idx_header(array: np.ndarray) -> bytes:
    """The header of a uint8 array's idx file; the array's bytes in C order are all that follows it."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)


def read_directory(directory: Path) -> dict[str, IdxFile]:
    """Reads the four idx files of a directory, each with or without `.gz`."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory.")
    return {part: _read_file(directory, name) for part, name in FILE_NAMES.items()}


def _read_file(directory: Path, name: str) -> IdxFile:
    for path in (directory / f"{name}.gz", directory / name):
        try:
            return IdxFile(str(path), path.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    raise UserError(
        f"{directory} has no {name}.gz and no {name}; the four files expected there are "
        f"{', '.join(FILE_NAMES.values())}, each with or without .gz."
    )


def decode_directory(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Decodes the four idx files of a directory.

    Returns:
      The arrays, and the path each came from, for messages.
    """
    files = read_directory(directory)
    arrays = {part: decode_idx(file) for part, file in files.items()}
    return arrays, {part: file.where for part, file in files.items()}


def download(base_urls: tuple[str, ...]) -> dict[str, IdxFile]:
    """Downloads the four gzipped files from whichever of the servers answers first."""
    base_url = _first_to_answer(base_urls)
    print(f"Downloading Fashion-MNIST (31 MB) from {base_url}", file=sys.stderr, flush=True)
    return {part: download_file(f"{base_url}{name}.gz") for part, name in FILE_NAMES.items()}


def _first_to_answer(base_urls: tuple[str, ...]) -> str:
    """Asks all servers for a small file at the same time.

    A timeout of urllib holds for each address of a host anew, and not at all for finding its
    addresses. So the waiting is done in daemon threads: when the time is up, nobody waits for them,
    not even the exit of the program.
    """
    answers: queue.Queue[tuple[str, str | None]] = queue.Queue()

    def ask(base_url: str) -> None:
        try:
            with _open(f"{base_url}{FILE_NAMES['t10k-labels']}.gz") as response:
                is_gzip = response.read(2) == b"\x1f\x8b"
            answers.put((base_url, None if is_gzip else "answers with something else than the file"))
        except (OSError, http.client.HTTPException) as error:
            answers.put((base_url, str(error)))

    for base_url in base_urls:
        threading.Thread(target=ask, args=(base_url,), daemon=True).start()
    problems: dict[str, str | None]
    problems = dict.fromkeys(base_urls, f"no answer within {NO_ANSWER_SECONDS} seconds")
    deadline = time.monotonic() + NO_ANSWER_SECONDS
    for _ in base_urls:
        try:
            base_url, problem = answers.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if problem is None:
            return base_url
        problems[base_url] = problem
    raise UserError("; ".join(f"{_host(url)}: {problem}" for url, problem in problems.items()) + ".")


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc


def _open(url: str) -> http.client.HTTPResponse:
    return urllib.request.urlopen(url, timeout=NO_ANSWER_SECONDS)


def download_file(url: str) -> IdxFile:
    from tqdm import tqdm

    content = bytearray()
    try:
        with _open(url) as response:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(
                desc=url.rpartition("/")[2], total=total, unit="B", unit_scale=True, disable=None
            ) as progress:
                while chunk := response.read(1 << 16):
                    content += chunk
                    progress.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {error}.") from error
    return IdxFile(url, bytes(content))


def apt_get_download(scratch: Path) -> dict[str, IdxFile]:
    """Takes the files out of Debian's (and Ubuntu's) package without installing it, or root."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError("this machine has no apt-get.")
    print(f"apt-get download {DEBIAN_PACKAGE} (31 MB)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        directory = Path(name)
        apt_get = ["apt-get", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=0"]
        # Printing where it would download from needs no network, only the package lists.
        known = subprocess.run([*apt_get, "download", "--print-uris", DEBIAN_PACKAGE], capture_output=True)
        if known.returncode != 0:
            (directory / "lists" / "partial").mkdir(parents=True)
            apt_get += ["-o", f"Dir::State::lists={directory / 'lists'}"]
            apt_get += ["-o", f"Dir::Cache={directory}", "-o", "APT::Update::Error-Mode=any"]
            _run_while_bytes_arrive([*apt_get, "update"], directory)
        _run_while_bytes_arrive([*apt_get, "download", DEBIAN_PACKAGE], directory)
        (package,) = directory.glob("*.deb")
        _run_while_bytes_arrive(["dpkg-deb", "-x", str(package), name], directory)
        return read_directory(directory / DEBIAN_DIRECTORY.relative_to("/"))


def _run_while_bytes_arrive(command: list[str], directory: Path) -> None:
    """Runs a command that fills `directory`, and stops it when nothing more arrives there.

    apt's own timeouts hold for each address and each file anew and add up to minutes; one for the
    whole command would cut off a download that is slow but works.
    """
    with tempfile.TemporaryFile() as complaints:
        # A session of its own, so that the processes apt-get starts end with it.
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            start_new_session=True,
        )
        try:
            size, since = 0, time.monotonic()
            while process.poll() is None:
                time.sleep(0.1)
                if (new_size := _bytes_in(directory)) != size:
                    size, since = new_size, time.monotonic()
                if time.monotonic() - since > APT_IDLE_SECONDS:
                    raise UserError(f"nothing arrived for {APT_IDLE_SECONDS} seconds.")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        complaints.seek(0)
        lines = complaints.read().decode(errors="replace").strip().split("\n")
    if process.returncode != 0:
        reason = next((line for line in lines if line.startswith("E: ")), lines[-1])
        raise UserError(f"{' '.join(command[:1] + command[-2:])}: {reason.removeprefix('E: ')}")


def _bytes_in(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # apt renames its files when they are complete
            continue
    return total

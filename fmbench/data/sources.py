"""Where the four idx files of Fashion-MNIST come from.

Each source returns the files as they came, part by part, gzipped or not, and of each part all that
may hold it; nothing here decides whether they are the right ones. That is proven in
`fashion_mnist.py`, which asks the sources in turn. A source that has nothing to give raises
`UserError` with the reason in one line.

No more of a file is read or decompressed than its header promises, and no more than `MOST_BYTES`.

The idx format: two zero bytes, the type of the numbers (8 is uint8), the number of dimensions, each
dimension as a big-endian uint32, then the numbers in C order.
Source: https://github.com/zalandoresearch/fashion-mnist and http://yann.lecun.com/exdb/mnist.
"""

import gzip
import http.client
import io
import math
import mmap
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from absl import logging

from fmbench.errors import UserError

File = TypeVar("File")
Content = TypeVar("Content")
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
MOST_BYTES = 180 * 2**20  # of one file, decompressed: 240,000 images, as EMNIST has of digits


class IdxFile(NamedTuple):
    """One file as it came, gzipped or not: its path or URL, for messages, and its bytes, or where they lie."""

    where: str
    content: bytes | Path


Files = dict[str, list[IdxFile]]  # for each part those that may hold it, the likeliest first


def sources(scratch: Path) -> dict[str, Callable[[], Files]]:
    """Names the sources in the order to ask them; `scratch` is an existing, writable directory."""
    return {
        f"Debian's {DEBIAN_DIRECTORY}": lambda: read_directory(DEBIAN_DIRECTORY),
        "the official URLs": lambda: download(OFFICIAL_URLS),
        f"apt-get download {DEBIAN_PACKAGE}": lambda: apt_get_download(scratch),
    }


def decode_idx(file: IdxFile, *, mapped: bool = False) -> np.ndarray:
    """Decodes an idx file, gzipped or not, into a read-only uint8 array.

    Args:
      file: which.
      mapped: whether images stay in the file, if that is not gzipped: however many, they are mapped into memory.

    Raises:
      UserError: the file is truncated, damaged, too large or not an idx file at all; the message
        names it.
    """
    try:
        with io.BytesIO(file.content) if isinstance(file.content, bytes) else file.content.open("rb") as stream:
            is_gzip = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            if mapped and not is_gzip and isinstance(file.content, Path):
                return _map(stream, file.where)
            return _decode(gzip.GzipFile(fileobj=stream) if is_gzip else stream, file.where)
    except EOFError as error:
        raise UserError(f"{file.where} is truncated: its gzip stream ends early.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file.where} is damaged: its gzip check fails ({error}).") from error
    except OSError as error:
        raise UserError(f"{file.where} cannot be read: {error.strerror}.") from error


def _map(stream: IO[bytes], where: str) -> np.ndarray:
    shape = _read_shape(stream, where)
    expected, found = math.prod(shape), stream.seek(0, os.SEEK_END) - (offset := 4 + 4 * len(shape))
    if len(shape) < 3 or not expected:  # labels are small, and nothing cannot be mapped
        stream.seek(0)
        return _decode(stream, where)
    if found < expected:
        raise UserError(f"{where} is truncated: its header promises {expected} bytes, {found} follow it.")
    if found > expected:
        raise UserError(f"{where} is damaged: its header promises {expected} bytes, more follow it.")
    return np.memmap(stream, np.uint8, "r", offset, shape)


def expect_any_order(images: np.ndarray) -> None:
    """Tells the system that rows of a file that is mapped as `images` will be read here and there.

    Otherwise each would come from the disk with its neighbours, for a row of 784 bytes 128 KB.
    """
    if isinstance(images.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        images.base.madvise(mmap.MADV_RANDOM)


def _decode(stream: IO[bytes] | gzip.GzipFile, where: str) -> np.ndarray:
    shape = _read_shape(stream, where)
    expected, found = math.prod(shape), 0
    if expected > MOST_BYTES:
        raise UserError(
            f"{where} is damaged, or too large: its header promises {expected:,} bytes; no more than "
            f"{MOST_BYTES:,} are read. A larger file must not be gzipped, and needs --config.data.pipeline=grain."
        )
    array = np.empty(expected, np.uint8)
    while chunk := stream.read(min(2**20, expected - found)):
        array[found : found + len(chunk)] = np.frombuffer(chunk, np.uint8)
        found += len(chunk)
    if found < expected:
        raise UserError(f"{where} is truncated: its header promises {expected} bytes, {found} follow it.")
    if stream.read(1):  # which, at the end, makes gzip compare its check sum
        raise UserError(f"{where} is damaged: its header promises {expected} bytes, more follow it.")
    array.setflags(write=False)
    return array.reshape(shape)


def _read_shape(stream: IO[bytes] | gzip.GzipFile, where: str) -> tuple[int, ...]:
    """Reads an idx header."""
    beginning = stream.read(4)
    if beginning[:3] != b"\0\0\x08":
        raise UserError(
            f"{where} is not an idx file of bytes: it begins with {beginning + stream.read(11)!r}, "
            r"an idx file with b'\x00\x00\x08'."
        )
    num_dimensions = beginning[3] if len(beginning) == 4 else 1
    if not 1 <= num_dimensions <= 4:
        raise UserError(
            f"{where} is damaged: its header says {num_dimensions} dimensions, images have 3, labels 1."
        )
    sizes = stream.read(4 * num_dimensions)
    if len(sizes) < 4 * num_dimensions:
        raise UserError(f"{where} is truncated: it ends within the idx header.")
    return struct.unpack(f">{num_dimensions}I", sizes)


def idx_header(array: np.ndarray) -> bytes:
    """The header of a uint8 array's idx file; the array's bytes in C order are all that follows it."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)


def read_directory(directory: Path) -> Files:
    """Finds the four idx files of a directory, each with or without `.gz`.

    They may lie where torchvision puts them below its root, and be named as some programs that
    unpack them do, `train-images.idx3-ubyte`.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory.")
    return {part: _find(directory, name) for part, name in FILE_NAMES.items()}


def _find(directory: Path, name: str) -> list[IdxFile]:
    paths = [
        folder / f"{spelling}{ending}"
        for folder in (directory, directory / "raw", directory / "FashionMNIST" / "raw")
        for spelling in (name, name.replace("-idx", ".idx"))
        for ending in (".gz", "")
    ]
    if found := [IdxFile(str(path), path) for path in paths if path.is_file()]:
        return found
    raise UserError(
        f"{directory} has no {name}.gz and no {name}; the four files expected there are "
        f"{', '.join(FILE_NAMES.values())}, each with or without .gz."
    )


def first_good(files: Iterable[File], read: Callable[[File], Content]) -> Content:
    """What `read` makes of the first of the files that it takes; says why others were passed over.

    Raises:
      UserError: it takes none; that of the first.
    """
    problems: list[UserError] = []
    for file in files:
        try:
            content = read(file)
        except UserError as error:
            problems.append(error)
            continue
        for problem in problems:
            logging.warning("Another file is used instead. %s", problem)
        return content
    raise problems[0]


def decode_directory(directory: Path, *, mapped: bool = False) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Decodes the four idx files of a directory; `mapped` as for `decode_idx`.

    Returns:
      The arrays, and the path each came from, for messages.

    Raises:
      UserError: a part is missing or damaged, or two good files hold different ones.
    """
    arrays: dict[str, np.ndarray] = {}
    where: dict[str, str] = {}
    for part, files in read_directory(directory).items():
        arrays[part], where[part] = first_good(files, lambda file: (decode_idx(file, mapped=mapped), file.where))
        for file in files:
            if file.where != where[part] and _is_good_and_other(file, arrays[part]):
                raise UserError(f"{where[part]} and {file.where} hold different data; remove one of them.")
    return arrays, where


def _is_good_and_other(file: IdxFile, array: np.ndarray) -> bool:
    try:
        other = decode_idx(file)
    except UserError:
        return False
    # Row by row: there is no memory to spare for a comparison of all at once.
    return other.shape != array.shape or not all(map(np.array_equal, other, array))


def download(base_urls: tuple[str, ...]) -> Files:
    """Downloads the four gzipped files from whichever of the servers answers first."""
    base_url = _first_to_answer(base_urls)
    print(f"Downloading Fashion-MNIST (31 MB) from {base_url}", file=sys.stderr, flush=True)
    urls = {part: f"{base_url}{name}.gz" for part, name in FILE_NAMES.items()}
    return {part: [IdxFile(url, download_file(url))] for part, url in urls.items()}


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


def download_file(url: str) -> bytes:
    """Downloads a file of `MOST_BYTES` at the most."""
    from tqdm import tqdm

    content = bytearray()
    try:
        with _open(url) as response:
            total = int(length) if (length := response.headers.get("Content-Length", "")).isdecimal() else None
            with tqdm(
                desc=url.rpartition("/")[2], total=total, unit="B", unit_scale=True, disable=None
            ) as progress:
                while chunk := response.read(1 << 16):
                    content += chunk
                    if len(content) > MOST_BYTES:
                        raise UserError(f"{url} sends more than {MOST_BYTES:,} bytes.")
                    progress.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {error}.") from error
    return bytes(content)


def apt_get_download(scratch: Path) -> Files:
    """Takes the files out of Debian's (and Ubuntu's) package without installing it, or root."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError("this machine has no apt-get.")
    print(f"apt-get download {DEBIAN_PACKAGE} (31 MB)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".unfinished-") as name:
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
        found = read_directory(directory / DEBIAN_DIRECTORY.relative_to("/"))
        return {
            part: [IdxFile(file.where, Path(file.where).read_bytes()) for file in files]
            for part, files in found.items()
        }


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

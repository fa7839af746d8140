"""What people give: records, pictures and data files that are not what they seem."""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from scene import Kind, References, Scene, Verdict, listed, refused, trouble

from fmbench.data.fashion_mnist import SAMPLE_DIRECTORY
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.records.schema import RunRecord

# 4 GiB more than Python and JAX have taken: much of it is reserved and never used, by threads' stacks and pools.
# `scene.trouble` judges what is used, and this keeps the machine from harm.
MEMORY = {"RLIMIT_AS": 4 << 30}

# Records.


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


WRONG_VALUES: dict[str, tuple[str, Any]] = {
    "num_epochs is text": ("num_epochs", "100"),
    "num_epochs is negative": ("num_epochs", -1),
    "num_epochs is a fraction": ("num_epochs", 1.5),
    "num_test is huge": ("num_test", 10**15),
    "seed is negative": ("seed", -1),
    "seed is true": ("seed", True),
    "test_accuracy is better": ("test_accuracy", 0.999),
    "test_accuracy is above 1": ("test_accuracy", 1.5),
    "test_accuracy is text": ("test_accuracy", "0.9"),
    "test_accuracy is NaN": ("test_accuracy", float("nan")),
    "train_seconds is negative": ("train_seconds", -1.0),
    "train_seconds is infinite": ("train_seconds", float("inf")),
    "train_seconds is text": ("train_seconds", "1.0"),
    "status is unknown": ("status", "won"),
    "entry is a path": ("entry", "../../../etc/passwd"),
    "entry is HTML": ("entry", "<script>alert(1)</script>"),
    "entry is empty": ("entry", ""),
    "entry is 10 MB": ("entry", "x" * 10_000_000),
    "entry has lines": ("entry", "a\n| 1 | best |"),
    "history is empty": ("history", []),
    "history is a number": ("history", 3),
    "config is empty": ("config", {}),
    "config is a list": ("config", []),
    "environment is null": ("environment", None),
    "schema_version is of the future": ("schema_version", 99),
    "predictions_sha256 is another": ("predictions_sha256", "0" * 64),
    "predictions_sha256 is null": ("predictions_sha256", None),
    "data_sha256 is empty": ("data_sha256", {}),
    "data_version is unknown": ("data_version", "2038-01-19"),
    "a field nobody knows": ("won", True),
}
WRONG_FILES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"hello\n",
    "an array": b"[1, 2, 3]",
    "null": b"null",
    "nested 100,000 deep": deep(100_000).encode(),
    "a field nested 100,000 deep": b'{"entry": ' + deep(100_000).encode() + b"}",
    "not UTF-8": b'{"entry": "\xff\xfe"}',
    "UTF-16": '{"entry": "mlp"}'.encode("utf-16"),
    "a number of 100,000 digits": b'{"seed": ' + b"9" * 100_000 + b"}",
    "NUL bytes": bytes(5000),
    "20 MB of spaces": b" " * 20_000_000,
}


def wrong_record(scene: Scene, case: str) -> Verdict:
    scene.copy(scene.references.finished)
    path = next((scene.folder / "results" / "runs").glob("*.json"))
    field, value = WRONG_VALUES[case]
    record = json.loads(path.read_text())
    record[field] = value
    path.write_text(json.dumps(record))
    return rendered(scene, path)


def rendered(scene: Scene, path: Path) -> Verdict:
    result = scene.run(
        "fmbench.leaderboard", f"--results_dir={scene.folder / 'results'}", limits=MEMORY, timeout=30
    )
    return refused(result, path.stem)


def record_without(scene: Scene, case: str) -> Verdict:
    """A required field is missed; without another one the accuracy is the same, and proven as before."""
    scene.copy(scene.references.finished)
    path = next((scene.folder / "results" / "runs").glob("*.json"))
    record = json.loads(path.read_text())
    del record[case]
    path.write_text(json.dumps(record))
    if RunRecord.model_fields[case].is_required():
        return rendered(scene, path)
    result = scene.run("fmbench.leaderboard", f"--results_dir={scene.folder / 'results'}")
    if result.code == 2:
        return refused(result, path.stem)
    if wrong := trouble(result, 0):
        return wrong
    try:
        read = store.read(path)
        store.read_predictions(read, path.with_suffix(".npy"))
    except UserError as error:
        return Verdict("believed", f"the page takes what is refused elsewhere: {error}")
    accuracy = record.get("test_accuracy")
    return Verdict("survived") if read.test_accuracy == accuracy else Verdict("believed", f"{read.test_accuracy}")


def fields_of_records(references: References) -> list[str]:
    path = next((references.finished / "results" / "runs").glob("*.json"))
    return sorted(json.loads(path.read_text()))


def wrong_record_file(scene: Scene, case: str) -> Verdict:
    scene.copy(scene.references.finished)
    path = next((scene.folder / "results" / "runs").glob("*.json"))
    if case in WRONG_FILES:
        path.write_bytes(WRONG_FILES[case])
        return rendered(scene, path)
    predictions = path.with_suffix(".npy")
    path.touch()
    match case:
        case "a folder":
            path.unlink()
            path.mkdir()
        case "a link to a file of the system":
            path.unlink()
            path.symlink_to("/etc/passwd")
        case "a link to itself":
            path.unlink()
            path.symlink_to(path)
        case "a pipe":
            path.unlink()
            os.mkfifo(path)
        case "under another name":
            path = path.rename(path.with_stem("best"))
        case "predictions: a pickle":
            np.save(predictions, np.array([{}], dtype=object), allow_pickle=True)
        case "predictions: a program in a pickle":
            predictions.write_bytes(pickle.dumps(_Program()))
        case "predictions: of 64 TiB":
            header = "{'descr': '|u1', 'fortran_order': False, 'shape': (70368744177664,), }".ljust(117) + "\n"
            predictions.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
        case "predictions: floats":
            np.save(predictions, np.zeros(200, np.float32))
        case "predictions: of other numbers":
            np.save(predictions, np.zeros(200, np.uint8))
        case "predictions: a pipe":
            predictions.unlink()
            os.mkfifo(predictions)
    return rendered(scene, path)


class _Program:
    def __reduce__(self):
        return (print, ("believed",))


# Pictures.


def png(array: np.ndarray, **settings: Any) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(array).save(stream, "PNG", **settings)
    return stream.getvalue()


def encoded(image: PIL.Image.Image, kind: str, **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in 4 MB."""
    row = zlib.compressobj(9)
    content = b"".join(row.compress(bytes(60_001)) for _ in range(60_000)) + row.flush()
    return png_header(60_000, 60_000) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


# Bytes made of the article, and what predict must do: 'refused', 'same' label as the article itself, 'either'.
PICTURES: dict[str, tuple[str, str, Callable[[np.ndarray], bytes]]] = {
    "an empty file": ("x.png", "refused", lambda a: b""),
    "a text": ("x.png", "refused", lambda a: b"no image\n"),
    "an HTML page": ("x.jpg", "refused", lambda a: b"<!doctype html><html></html>"),
    "a PNG's first half": ("x.png", "refused", lambda a: png(a)[: len(png(a)) // 2]),
    "a PNG's signature": ("x.png", "refused", lambda a: png(a)[:8]),
    "a PNG with a flipped bit": ("x.png", "refused", lambda a: flipped(png(a), len(png(a)) - 40)),
    "a PNG of no pixels": ("x.png", "refused", lambda a: png_header(0, 0) + chunk(b"IEND", b"")),
    "a PNG of 60,000 x 60,000": ("x.png", "refused", lambda a: bomb()),
    "a PNG that only says 60,000 x 60,000": ("x.png", "refused", lambda a: png_header(60_000, 60_000)),
    "a PNG with 500 MB of text": (
        "x.png",
        "either",
        lambda a: png(a)[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(500_000_000))) + png(a)[33:],
    ),
    "a JPEG's first half": (
        "x.jpg",
        "either",
        lambda a: encoded(PIL.Image.fromarray(a), "JPEG")[:400],
    ),
    "a GIF": ("x.gif", "same", lambda a: encoded(PIL.Image.fromarray(a), "GIF")),
    "a palette": ("x.png", "same", lambda a: encoded(PIL.Image.fromarray(a).convert("P"), "PNG")),
    "RGB": ("x.png", "same", lambda a: encoded(PIL.Image.fromarray(a).convert("RGB"), "PNG")),
    "CMYK": ("x.jpg", "either", lambda a: encoded(PIL.Image.fromarray(a).convert("CMYK"), "JPEG", quality=95)),
    "16 bits of 0 to 65,535": ("x.png", "same", lambda a: png(a.astype(np.uint16) * 257)),
    "16 bits of 0 to 255": ("x.png", "same or refused", lambda a: png(a.astype(np.uint16))),
    "32 bits of 0 to 255": (
        "x.tif",
        "same or refused",
        lambda a: encoded(PIL.Image.fromarray(a.astype(np.int32)), "TIFF"),
    ),
    "floats of 0 to 1": (
        "x.tif",
        "same or refused",
        lambda a: encoded(PIL.Image.fromarray(a.astype(np.float32) / 255), "TIFF"),
    ),
    "floats of 0 to 255": (
        "x.tif",
        "same or refused",
        lambda a: encoded(PIL.Image.fromarray(a.astype(np.float32)), "TIFF"),
    ),
    "floats, NaN": (
        "x.tif",
        "refused",
        lambda a: encoded(PIL.Image.fromarray(np.full((28, 28), np.nan, np.float32)), "TIFF"),
    ),
    "all black": ("x.png", "doubted", lambda a: png(np.zeros((28, 28), np.uint8))),
    "all white": ("x.png", "doubted", lambda a: png(np.full((28, 28), 255, np.uint8))),
    "one pixel": ("x.png", "doubted", lambda a: png(np.zeros((1, 1), np.uint8))),
    "150 megapixels": ("x.png", "either", lambda a: png(np.zeros((12_000, 12_500), np.uint8), compress_level=1)),
    "1 x 60,000 pixels": ("x.png", "either", lambda a: png(np.zeros((60_000, 1), np.uint8))),
    "a PostScript program": ("x.eps", "refused", lambda a: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "an SVG": ("x.svg", "refused", lambda a: b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "a PDF": ("x.pdf", "refused", lambda a: b"%PDF-1.7\n"),
    "an iPhone's HEIC": ("x.heic", "refused", lambda a: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)),
}


def flipped(content: bytes, index: int) -> bytes:
    return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]


def picture(scene: Scene, case: str) -> Verdict:
    """Beside a good one, whose prediction must be what it always is."""
    name, expected, make = PICTURES[case]
    path = scene.folder / name
    path.write_bytes(make(np.asarray(PIL.Image.open(scene.references.picture))))
    return predicted(scene, path, expected)


def predicted(scene: Scene, path: Path, expected: str, name: str | None = None, **settings: Any) -> Verdict:
    good = scene.references.picture
    model = f"--model={scene.references.finished / 'work'}"
    alone = scene.run("fmbench.predict", model, "--json", good)
    result = scene.run("fmbench.predict", model, "--json", good, path, limits=MEMORY, timeout=60, **settings)
    if wrong := trouble(result, 0, 1, 2):
        return wrong
    lines = result.out.splitlines()
    if result.code != 2:
        if not lines:
            return Verdict("lost", f"the good picture beside it is not predicted: {result.last_line}")
        here, there = json.loads(lines[0]), json.loads(alone.out)
        # Sums of two rows may be rounded otherwise than those of one.
        if here["label"] != there["label"] or abs(here["probability"] - there["probability"]) > 1e-5:
            return Verdict("believed", "the good picture beside it is another")
    if result.code:
        named = (name or path.name) in result.err or repr(name or path.name)[1:-1] in result.err
        if "same" in expected and "refused" not in expected:
            return Verdict("lost", f"refused: {result.last_line}")
        return (
            Verdict("survived", result.last_line)
            if named
            else Verdict("traceback", f"not named: {result.last_line}")
        )
    one = json.loads(lines[1])
    if expected == "refused" or ("same" in expected and one["label"] != json.loads(lines[0])["label"]):
        return Verdict("believed", lines[1][:120])
    if expected == "doubted" and "unlike" not in result.err and "unlike" not in lines[1]:
        return Verdict("believed", lines[1][:120])
    return Verdict("survived")


def place(scene: Scene, case: str) -> Verdict:
    """What has an image's name and is none, and names that are no names."""
    folder, good = scene.folder / "pictures", scene.references.picture
    folder.mkdir()
    path = folder / "x.png"
    match case:
        case "a folder":
            path.mkdir()
            return predicted(scene, path, "refused", str(path))
        case "a pipe":
            os.mkfifo(path)
        case "a link to itself":
            path.symlink_to(path)
        case "a link to nowhere":
            path.symlink_to(folder / "nowhere")
        case "an endless device":
            path.symlink_to("/dev/zero")
        case "not there":
            pass
        case "a file without rights":
            shutil.copy(good, path)
            path.chmod(0)
            return predicted(scene, path, "refused", obedient=True)
        case "a name of two lines":
            path = folder / "x\nfake.png: label 1, Trouser 100.0%.png"
            shutil.copy(good, path)
            result = scene.run("fmbench.predict", f"--model={scene.references.finished / 'work'}", folder)
            lines = result.out.splitlines()
            forged = len(lines) > 1 or any(line.startswith("fake") for line in lines)
            return trouble(result, 0, 1, 2) or Verdict("believed" if forged else "survived", result.out[:100])
        case "a name with escapes":
            path = folder / "x\x1b[2J\x1b[31m.png"
            shutil.copy(good, path)
            result = scene.run("fmbench.predict", f"--model={scene.references.finished / 'work'}", folder)
            return trouble(result, 0, 1, 2) or Verdict("believed" if "\x1b" in result.out else "survived")
        case "a name that is not UTF-8":
            path = folder / os.fsdecode(b"x\xff\xfe.png")
            shutil.copy(good, path)
            result = scene.run("fmbench.predict", f"--model={scene.references.finished / 'work'}", folder)
            return trouble(result, 0) or Verdict("survived")
        case "macOS's companion":
            shutil.copy(good, path)
            (folder / "._x.png").write_bytes(b"\0\5\26\7" + bytes(60))
            result = scene.run("fmbench.predict", f"--model={scene.references.finished / 'work'}", folder)
            return trouble(result, 0) or Verdict("survived", result.last_line)
        case "HEIC beside PNG in a folder":
            shutil.copy(good, path)
            (folder / "y.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(500))
            result = scene.run("fmbench.predict", f"--model={scene.references.finished / 'work'}", folder)
            if wrong := trouble(result, 0, 1, 2):
                return wrong
            return Verdict("survived" if "heic" in result.err else "believed", result.last_line)
        case "an empty folder":
            result = scene.run("fmbench.predict", f"--model={scene.references.finished / 'work'}", folder)
            return trouble(result, 1, 2) or Verdict("survived", result.last_line)
        case "nothing on standard input" | "no end of standard input":
            source = os.devnull if case.startswith("nothing") else "/dev/zero"
            return predicted(scene, Path("-"), "refused", "-", stdin=source)
    return predicted(scene, path, "refused", str(path))


# Data files.


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def gzip_bomb() -> bytes:
    """4 GB of zeros, in 4 MB."""
    return gzip.compress(bytes(100_000_000)) * 40


TRAIN = "train-images-idx3-ubyte"
IDX_FILES: dict[str, Callable[[bytes], bytes]] = {  # of the true file's bytes, not gzipped
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut within the header": lambda content: content[:10],
    "a byte more": lambda content: content + b"\0",
    "a flipped bit": lambda content: flipped(content, 5000),
    "all zeros": lambda content: bytes(len(content)),
    "255 dimensions": lambda content: b"\0\0\x08\xff" + struct.pack(">255I", *[1] * 255) + b"\0",
    "255 dimensions and no sizes": lambda content: b"\0\0\x08\xff",
    "no dimension": lambda content: b"\0\0\x08\0\0",
    "sizes of 2**32 - 1": lambda content: b"\0\0\x08\x03" + b"\xff" * 12 + content[16:],
    "a size of 0": lambda content: b"\0\0\x08\x03" + struct.pack(">3I", 0, 28, 28),
    "floats": lambda content: b"\0\0\x0d" + content[3:],
    "little-endian": lambda content: content[:4] + content[4:16][::-1] + content[16:],
    "labels for images": lambda content: idx(np.zeros(480, np.uint8)),
    "a text": lambda content: b"404: Not Found\n",
    "gzipped twice": lambda content: gzip.compress(gzip.compress(content)),
    "a cut gzip": lambda content: gzip.compress(content)[:5000],
    "a gzip with a flipped bit": lambda content: flipped(gzip.compress(content), 5000),
    "a gzip's header": lambda content: gzip.compress(content)[:10],
    "4 GB of zeros, gzipped": lambda content: gzip_bomb(),
    "a zip": lambda content: b"PK\3\4" + content,
}


def original(part: str) -> bytes:
    return gzip.decompress((SAMPLE_DIRECTORY / f"{part}.gz").read_bytes())


def idx_file(scene: Scene, case: str) -> Verdict:
    data = scene.folder / "data"
    shutil.copytree(SAMPLE_DIRECTORY, data)
    (data / f"{TRAIN}.gz").unlink()
    content = IDX_FILES[case](original(TRAIN))
    path = data / (f"{TRAIN}.gz" if content[:2] == b"\x1f\x8b" else TRAIN)
    path.write_bytes(content)
    return refused(train_on(scene, "idx", data), TRAIN)


def train_on(scene: Scene, source: str, data: Path, *more: str, **settings: Any):
    return scene.run(
        "fmbench.main",
        "--config=mlp",
        f"--config.data.source={source}",
        f"--config.data.dir={data}",
        *("--config.batch_size=40", "--config.data.split=default", "--config.num_epochs=4", *more),
        "--config.watch=validation",
        f"--workdir={scene.folder / 'work'}",
        f"--results_dir={scene.folder / 'results'}",
        limits=MEMORY,
        timeout=60,
        **settings,
    )


def idx_folder(scene: Scene, case: str) -> Verdict:
    """What is unambiguous is accepted, and gives what the files give; the rest is named."""
    data = scene.folder / "data"
    shutil.copytree(SAMPLE_DIRECTORY, data)
    accepted = True
    match case:
        case "not gzipped":
            for path in list(data.iterdir()):
                path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
                path.unlink()
        case "torchvision's root":
            raw = data / "FashionMNIST" / "raw"
            raw.mkdir(parents=True)
            for path in list(data.glob("*.gz")):
                path.rename(raw / path.name)
        case "dots for dashes":
            for path in list(data.iterdir()):
                path.rename(data / path.name.replace("-idx", ".idx"))
        case "a cut gzip beside a good file":
            (data / TRAIN).write_bytes(original(TRAIN))
            (data / f"{TRAIN}.gz").write_bytes((data / f"{TRAIN}.gz").read_bytes()[:5000])
        case "a file is missing":
            (data / f"{TRAIN}.gz").unlink()
            accepted = False
        case "a file is a folder":
            (data / f"{TRAIN}.gz").unlink()
            (data / f"{TRAIN}.gz").mkdir()
            accepted = False
        case "a file is a pipe":
            (data / f"{TRAIN}.gz").unlink()
            os.mkfifo(data / f"{TRAIN}.gz")
            accepted = False
        case "a file is endless":
            (data / f"{TRAIN}.gz").unlink()
            (data / f"{TRAIN}.gz").symlink_to("/dev/zero")
            accepted = False
        case "an empty folder":
            shutil.rmtree(data)
            data.mkdir()
            accepted = False
        case "no folder":
            shutil.rmtree(data)
            accepted = False
        case "train and test exchanged":
            for one in ("images-idx3", "labels-idx1"):
                a, b = data / f"train-{one}-ubyte.gz", data / f"t10k-{one}-ubyte.gz"
                a.rename(data / "a")
                b.rename(a)
                (data / "a").rename(b)
            accepted = False
    result = train_on(scene, "idx", data)
    if not accepted:
        if (scene.folder / "work").exists():
            return refused(result)._replace(outcome="lost", detail="a refused run left its work directory behind")
        return refused(result)
    if wrong := trouble(result, 0):
        return wrong
    found, expected = (
        next((where / "results" / "runs").glob("*.npy")).read_bytes()
        for where in (scene.folder, scene.references.finished)
    )
    return Verdict("survived" if found == expected else "believed")


def csv_rows(count: int = 160, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    header = "label," + ",".join(f"pixel{number}" for number in range(1, 785))
    rows = [f"{row % 10}," + ",".join(map(str, rng.integers(0, 256, 784))) for row in range(count)]
    return [header, *rows]


CSV_FILES: dict[str, Callable[[list[str]], bytes]] = {
    "empty": lambda rows: b"",
    "only the header": lambda rows: rows[0].encode(),
    "no header": lambda rows: "\n".join(rows[1:]).encode(),
    "a value of 256": lambda rows: changed(rows, "256"),
    "a value of -1": lambda rows: changed(rows, "-1"),
    "a value of 1.5": lambda rows: changed(rows, "1.5"),
    "a value of NaN": lambda rows: changed(rows, "nan"),
    "a value that is missing": lambda rows: changed(rows, ""),
    "a text": lambda rows: changed(rows, "black"),
    "a value of 10,000 digits": lambda rows: changed(rows, "9" * 10_000),
    "Arabic digits": lambda rows: changed(rows, "\u0663"),
    "a column too few": lambda rows: "\n".join([*rows[:5], rows[5].rpartition(",")[0], *rows[6:]]).encode(),
    "a column too many": lambda rows: "\n".join([*rows[:5], rows[5] + ",0", *rows[6:]]).encode(),
    "a label of 10": lambda rows: "\n".join([*rows[:5], "10" + rows[5][1:], *rows[6:]]).encode(),
    "the last line cut": lambda rows: "\n".join(rows).encode()[:-500],
    "semicolons": lambda rows: "\n".join(rows).replace(",", ";").encode(),
    "NUL bytes": lambda rows: "\n".join(rows[:5]).encode() + bytes(3000),
    "not UTF-8": lambda rows: b"\xff\xfe" + "\n".join(rows).encode(),
    "UTF-16": lambda rows: "\n".join(rows).encode("utf-16"),
    "an open quotation mark": lambda rows: "\n".join([*rows[:5], '"' + rows[5], *rows[6:]]).encode(),
    "gzipped": lambda rows: gzip.compress("\n".join(rows).encode()),
}
SAME_NUMBERS = ("semicolons",)  # in another spelling, which is read


def changed(rows: list[str], value: str) -> bytes:
    cells = rows[7].split(",")
    cells[400] = value
    return "\n".join([*rows[:7], ",".join(cells), *rows[8:]]).encode()


def csv_file(scene: Scene, case: str) -> Verdict:
    data = scene.folder / "data"
    data.mkdir()
    train = data / "fashion-mnist_train.csv"
    (data / "fashion-mnist_test.csv").write_text("\n".join(csv_rows(seed=1)) + "\n")
    if case == "a line of 3 GB":
        train.write_text(csv_rows()[0] + "\n")
        os.truncate(train, 3 << 30)
    else:
        train.write_bytes(CSV_FILES[case](csv_rows()))
    result = train_on(scene, "csv", data, "--config.data.unproven=true")
    if case not in SAME_NUMBERS:
        return refused(result, train.name)
    if wrong := trouble(result, 0):
        return wrong
    found = next((scene.folder / "results/runs").glob("*.npy")).read_bytes()
    train.write_text("\n".join(csv_rows()))
    plain = train_on(scene, "csv", data, "--config.data.unproven=true", "--force")
    expected = next((scene.folder / "results/runs").glob("*.npy")).read_bytes()
    return trouble(plain, 0) or Verdict("survived" if found == expected else "believed")


KINDS = [
    Kind("hostile record: a wrong value", listed(*WRONG_VALUES), wrong_record),
    Kind("hostile record: a field left out", fields_of_records, record_without),
    Kind(
        "hostile record: a wrong file",
        listed(
            *WRONG_FILES,
            *("a folder", "a link to a file of the system", "a link to itself", "a pipe", "under another name"),
            *("predictions: a pickle", "predictions: a program in a pickle", "predictions: of 64 TiB"),
            *("predictions: floats", "predictions: of other numbers", "predictions: a pipe"),
        ),
        wrong_record_file,
    ),
    Kind("hostile picture: its content", listed(*PICTURES), picture),
    Kind(
        "hostile picture: its name or place",
        listed(
            *("a folder", "a pipe", "a link to itself", "a link to nowhere", "an endless device", "not there"),
            *("a file without rights", "a name of two lines", "a name with escapes", "a name that is not UTF-8"),
            *("macOS's companion", "HEIC beside PNG in a folder", "an empty folder", "nothing on standard input"),
            "no end of standard input",
        ),
        place,
    ),
    Kind("hostile idx file", listed(*IDX_FILES), idx_file),
    Kind(
        "idx files in a folder",
        listed(
            *("not gzipped", "torchvision's root", "dots for dashes", "a cut gzip beside a good file"),
            *(
                "a file is missing",
                "a file is a folder",
                "a file is a pipe",
                "a file is endless",
                "an empty folder",
            ),
            *("no folder", "train and test exchanged"),
        ),
        idx_folder,
    ),
    Kind("hostile CSV file", listed(*CSV_FILES, "a line of 3 GB"), csv_file),
]

"""Opens a page on this machine to try an exported model: drop, paste or draw a picture.

    python -m fmbench.serve workdirs/cnn3-cpu-float32-seed0

The page shows the 28 x 28 pixels that the net sees, its probabilities and what its convolutions make of them. It
is reached from this machine alone, asks nobody else for anything, and keeps no picture. Ctrl-C ends it.
"""

import argparse
import base64
import errno
import hashlib
import http.server
import io
import json
import re
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from fmbench.data import likeness, photos
from fmbench.errors import UserError
from fmbench.models import activations, exported
from fmbench.system import command_line, runtime
from fmbench.training import inference, input_pipeline

PAGE = Path(__file__).parent / "pages" / "serve.html"
HOST = "127.0.0.1"
MOST_BYTES = 20 * 2**20  # of a picture
MOST_SECONDS = 30  # for a request to arrive
MOST_MAPS = 16  # that are shown of a convolution


@command_line.plain_errors("serve", "stopped.")
def main() -> None:
    parser = command_line.Parser("serve", description=__doc__)
    parser.add_argument("model", type=Path, help="work directory or exported model")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: 8000)")
    arguments = parser.parse_args()
    runtime.set_up()
    _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.port < 2**16:
        raise UserError(f"--port={arguments.port}: ports are numbered from 0 to 65535.")
    model, description = exported.load_model(arguments.model)
    with Server(arguments.port, model, description) as server:
        answer(model, description, np.zeros((28, 28), np.uint8))  # compiles
        print(f"http://{HOST}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def answer(model: nnx.Module, description: dict[str, Any], image: np.ndarray) -> dict[str, Any]:
    """What the page is told of an image, uint8 (28, 28), in JSON.

    Arrays are bytes in base64: the image's, and of each convolution the first maps, int8, of which 127 stands for
    the largest number of the layer, whichever its sign.
    """
    (row,) = inference.classify(model, description, image[None])
    ranking = np.argsort(-row, stable=True)
    inputs = input_pipeline.normalize(image[None], description["normalization"])
    layers = []
    for name, (maps,) in activations.of_convolutions(model, inputs).items():
        shown = np.moveaxis(maps[:, :, :MOST_MAPS], -1, 0)
        scaled = np.rint(shown * (127 / max(float(np.abs(shown).max()), 1e-30))).astype(np.int8)
        layers.append({"name": name, "channels": maps.shape[-1], "shape": shown.shape, "maps": _base64(scaled)})
    return {
        "image": _base64(image),
        "classes": [[description["class_names"][label], float(row[label])] for label in ranking],
        "calibrated": bool(description.get("temperature")),
        "unlike": likeness.unlike(image, description["class_names"]),
        "layers": layers,
    }


class Server(http.server.ThreadingHTTPServer):
    """Listens on loopback; a thread for each connection, of which one at a time has a picture."""

    daemon_threads = True

    def __init__(self, port: int, model: nnx.Module, description: dict[str, Any]) -> None:
        """Takes what `exported.load_model` returns.

        Raises:
            UserError: If the port cannot be had.
        """
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UserError(
                f"--port={port}: {error.strerror}; name another, or 0 for any that is free."
            ) from error
        self.model, self.description = model, description
        self.one_picture = threading.Lock()
        self.names = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        page = PAGE.read_text(encoding="utf-8").replace("{{entry}}", _in_html(description.get("entry", "")))
        self.page = page.encode()
        hashes = {
            tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
        }
        self.policy = (
            f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # who asked has gone
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "fmbench", ""
    timeout = 10  # seconds without a byte

    def do_GET(self) -> None:
        if self._is_foreign():
            self._refuse(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
        elif self.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif self.path == "/classify":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "pictures are posted")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is only /")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self._is_foreign():
            self._refuse(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
        elif self.path != "/classify":
            self._refuse(HTTPStatus.NOT_FOUND, "pictures are posted to /classify")
        elif "Transfer-Encoding" in self.headers or not re.fullmatch(r"[0-9]{1,20}", length):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "Content-Length must say how many bytes the picture has")
        elif int(length) > MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a picture may have {MOST_BYTES // 2**20} MB")
        elif not self.server.one_picture.acquire(blocking=False):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "another picture is being looked at; try again")
        else:
            try:
                status, told = self._classify(int(length))
            finally:  # and before the answer: whoever has it may send the next picture
                self.server.one_picture.release()
            self._tell(status, told)

    def _classify(self, length: int) -> tuple[HTTPStatus, dict[str, Any]]:
        picture = self._read(length)
        if len(picture) < length:
            late = f"the picture did not arrive within {MOST_SECONDS} seconds"
            return HTTPStatus.REQUEST_TIMEOUT, {"error": late}
        try:
            image = photos.read_image(io.BytesIO(picture))
            return HTTPStatus.OK, answer(self.server.model, self.server.description, image)
        except UserError as error:
            return HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)}

    def _is_foreign(self) -> bool:
        """Whether another site's page asks, or one that took the address of this machine for its name."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        own_origins = {f"http://{name}" for name in self.server.names}
        return len(hosts) != 1 or hosts[0] not in self.server.names or not own_origins.issuperset(origins)

    def _read(self, length: int) -> bytes:
        """So many bytes of the body, or those that came in time."""
        content, deadline = io.BytesIO(), time.monotonic() + MOST_SECONDS
        while content.tell() < length and time.monotonic() < deadline:
            if not (part := self.rfile.read1(min(length - content.tell(), 2**16))):
                break
            content.write(part)
        return content.getvalue()

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._tell(status, {"error": why})

    def _tell(self, status: HTTPStatus, told: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(told).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", self.server.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the page says what there is to say."""


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _in_html(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=+:-]", "?", text)


if __name__ == "__main__":
    main()

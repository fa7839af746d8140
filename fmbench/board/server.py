"""The page on loopback, for a browser of this machine and for nobody else."""

import errno
import socketserver
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from fmbench.errors import UserError

ADDRESS = "127.0.0.1"


class Server(socketserver.ThreadingTCPServer):
    """Serves one file, read anew for each request, whose path has no part in that."""

    allow_reuse_address = True  # a port that was served a moment ago
    daemon_threads = True

    def __init__(self, page: Path, port: int) -> None:
        """Begins to listen.

        Args:
            page: The file.
            port: 0 for any that is free.

        Raises:
            UserError: If there is no such file, or no such port to be had.
        """
        self.page = page
        if not page.is_file():
            raise UserError(f"{page} is missing; python -m fmbench.leaderboard writes it.")
        if not 0 <= port <= 65535:
            raise UserError(f"--port={port}: ports are 0 to 65535.")
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            taken = "another program has it" if error.errno == errno.EADDRINUSE else error.strerror
            raise UserError(f"--port={port} cannot be had ({taken}); name another, or 0 for any.") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a browser that goes away before it has all."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 10  # seconds, of a browser that says nothing
    server_version, sys_version = "fmbench", ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        port = self.server.server_address[1]
        # A page elsewhere whose name was made to lead here (DNS rebinding) would read this one.
        if self.headers.get("Host") not in {f"{ADDRESS}:{port}", f"localhost:{port}"}:
            self.send_error(HTTPStatus.FORBIDDEN, "another host's name")
            return
        path, _, _ = self.path.partition("?")
        if path not in ("/", "/index.html"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            page = self.server.page.read_bytes()
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND, "the page is gone")
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

"""`fmbench leaderboard --serve`: loopback alone, one page, one line."""

import http.client
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from fmbench import leaderboard as command
from fmbench.board.server import Server
from fmbench.errors import UserError


@pytest.fixture
def served(tmp_path):
    """A server of a page, its port, and a secret beside the page."""
    (tmp_path / "index.html").write_text("<p>é")
    (tmp_path / "secret.txt").write_text("secret")
    with Server(tmp_path / "index.html", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read()


def test_the_page_is_served_as_it_is_now(served):
    assert ask(served) == ask(served, "/index.html?x") == (200, "<p>é".encode())
    assert ask(served, method="HEAD") == (200, b"")
    served.page.write_text("new")
    assert ask(served) == (200, b"new")
    served.page.unlink()
    assert ask(served)[0] == 404


@pytest.mark.parametrize(
    "path", ["/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt", "//etc/passwd", "/index.html/../secret.txt"]
)
def test_no_other_file_is_served(served, path):
    status, body = ask(served, path)
    assert status == 404
    assert b"secret" not in body


def test_other_hosts_names_are_refused(served):
    port = served.server_address[1]
    for host in (
        "evil.example",
        f"evil.example:{port}",
        f"127.0.0.1.evil.example:{port}",
        f"localhost:{port + 1}",
        "",
    ):
        assert ask(served, Host=host)[0] == 403, host
    assert ask(served, Host=f"localhost:{port}")[0] == 200


def test_what_is_not_asked_for_is_refused(served):
    assert ask(served, method="POST")[0] == 501
    assert served.server_address[0] == "127.0.0.1"


def test_a_browser_that_goes_away_is_no_news(served, capsys):
    for error, said in ((BrokenPipeError(), ""), (ValueError("a bug"), "ValueError: a bug")):
        try:
            raise error
        except type(error):
            served.handle_error(None, ("127.0.0.1", 1))
        err = capsys.readouterr().err
        assert said in err and bool(err) == bool(said)


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"index\.html is missing; python -m fmbench\.leaderboard writes it"):
        Server(tmp_path / "index.html", 0)
    (tmp_path / "index.html").touch()
    with pytest.raises(UserError, match=r"--port=65536: ports are 0 to 65535"):
        Server(tmp_path / "index.html", 65536)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["leaderboard", f"--results_dir={tmp_path}", "--serve", f"--port={port}"])
        with pytest.raises(SystemExit) as end:
            command.main()
    said = (
        f"fmbench.leaderboard: --port={port} cannot be had (another program has it); name another, or 0 for any.\n"
    )
    assert (end.value.code, capsys.readouterr().err) == (2, said)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another thing there")
def test_ctrl_c_ends_it_in_one_line(tmp_path):
    (tmp_path / "index.html").write_text("page")
    arguments = [sys.executable, "-m", "fmbench.leaderboard", f"--results_dir={tmp_path}", "--serve", "--port=0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ shows .*index\.html; Ctrl-C ends it\.\n", line)
        assert match, line
        connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=5)
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"page"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (
        130,
        "",
        "fmbench.leaderboard: interrupted.\n",
    )

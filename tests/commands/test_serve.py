"""The page to try a model on: what it answers, what it refuses, and that a browser can use it."""

import base64
import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from fake_models import arbitrary_state

from fmbench import serve
from fmbench.data import fashion_mnist, photos
from fmbench.data.fashion_mnist import CLASS_NAMES
from fmbench.models import activations, exported
from fmbench.training import inference, input_pipeline

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """With a CNN of arbitrary numbers."""
    workdir = tmp_path_factory.mktemp("workdir")
    _, params, model_state = arbitrary_state("cnn3")
    description = {"model": {"name": "cnn3"}, "dtype": "float32", "normalization": "unit", "entry": "cnn3"}
    exported.export_model(workdir / "model", params, model_state, description | {"class_names": CLASS_NAMES})
    return workdir


@pytest.fixture(scope="module")
def server(workdir):
    with serve.Server(0, *exported.load_model(workdir)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, method="GET", path="/", body=None, **headers) -> tuple[int, str]:
    connection = http.client.HTTPConnection(serve.HOST, server.server_port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def raw(server, request: bytes) -> bytes:
    """What is answered to these very bytes."""
    with socket.create_connection((serve.HOST, server.server_port), timeout=60) as connection:
        connection.sendall(request.replace(b"HOST", f"{serve.HOST}:{server.server_port}".encode()))
        return connection.makefile("rb").read()


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def test_a_picture_is_answered_with_what_the_net_makes_of_it(server):
    image = fashion_mnist.load("sample").test_images[3]
    status, text = ask(server, "POST", "/classify", png(image), Origin=f"http://localhost:{server.server_port}")
    told = json.loads(text)
    assert (status, told["calibrated"], told["unlike"]) == (200, False, "")
    assert base64.b64decode(told["image"]) == image.tobytes()
    (row,) = inference.classify(server.model, server.description, image[None])
    assert told["classes"] == [[CLASS_NAMES[k], pytest.approx(row[k], abs=1e-6)] for k in np.argsort(-row)]
    maps = activations.of_convolutions(server.model, input_pipeline.normalize(image[None], "unit"))
    assert [layer["name"] for layer in told["layers"]] == list(maps) == ["conv1", "conv2", "conv3"]
    second = told["layers"][1]
    assert (second["shape"], second["channels"]) == ([16, 11, 11], 64)
    shown = np.frombuffer(base64.b64decode(second["maps"]), np.int8).reshape(16, 11, 11) / 127
    expected = np.moveaxis(maps["conv2"][0, :, :, :16], -1, 0)
    np.testing.assert_allclose(shown, expected / np.abs(expected).max(), atol=0.005)


def test_a_photograph_is_prepared_and_noise_called_unlike_the_data(server):
    photograph = np.full((300, 400), 220, np.uint8)
    photograph[100:200, 150:250] = 60
    _, text = ask(server, "POST", "/classify", png(photograph))
    assert base64.b64decode(json.loads(text)["image"]) == photos.read_image(io.BytesIO(png(photograph))).tobytes()
    _, text = ask(server, "POST", "/classify", png(np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)))
    assert json.loads(text)["unlike"] == "noise"


def test_the_page_asks_nobody_else_and_runs_no_script_but_its_own(server):
    connection = http.client.HTTPConnection(serve.HOST, server.server_port)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    assert "<title>fmbench: cnn3</title>" in page
    assert "://" not in page
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    connection.close()


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {"Host": "evil.example"}, 403),
        ("GET", "/", {"Host": "localhost"}, 403),  # of port 80
        ("GET", "/", {"Origin": "null"}, 403),
        ("POST", "/classify", {"Origin": "http://evil.example"}, 403),
        ("POST", "/classify", {"Host": "evil.example"}, 403),
        ("GET", "/../fmbench/serve.py", {}, 404),
        ("GET", "/etc/passwd", {}, 404),
        ("GET", "/?model=/etc/passwd", {}, 404),
        ("GET", "/classify", {}, 405),
        ("POST", "/", {}, 404),
        ("PUT", "/classify", {}, 501),
        ("DELETE", "/", {}, 501),
    ],
)
def test_what_is_foreign_or_not_there_is_refused(server, method, path, headers, status):
    assert ask(server, method, path, b"x" if method != "GET" else None, **headers)[0] == status


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Host: HOST\r\nContent-Length: 20971521\r\n", b"413"),
        (b"Host: HOST\r\nContent-Length: 99999999999999999999\r\n", b"413"),
        (b"Host: HOST\r\nContent-Length: -1\r\n", b"411"),
        (b"Host: HOST\r\nContent-Length: 1e3\r\n", b"411"),
        (b"Host: HOST\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n", b"411"),
        (b"Host: HOST\r\n", b"411"),
        (b"Content-Length: 1\r\n", b"403"),
        (b"Host: HOST\r\nHost: HOST\r\nContent-Length: 1\r\n", b"403"),
    ],
)
def test_a_head_decides_before_a_byte_of_the_picture_is_read(server, head, status):
    assert raw(server, b"POST /classify HTTP/1.1\r\n" + head + b"\r\n").split()[1] == status


@pytest.mark.parametrize("body", [b"", b"garbage", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"%!PS-Adobe-3.0"])
def test_what_is_no_picture_is_said_to_be_none(server, body):
    status, text = ask(server, "POST", "/classify", body)
    assert status == 422
    assert json.loads(text)["error"].startswith("the picture: cannot read it as an image")


def test_bytes_that_are_no_request_end_only_their_connection(server):
    assert raw(server, b"\xff\x00\r\n\r\n").count(b"400")
    assert ask(server)[0] == 200


def test_a_picture_at_a_time_and_none_for_ever(server, monkeypatch):
    monkeypatch.setattr(serve, "MOST_SECONDS", 1)
    monkeypatch.setattr(serve._Handler, "timeout", 1)
    with socket.create_connection((serve.HOST, server.server_port), timeout=60) as slow:
        host = f"{serve.HOST}:{server.server_port}"
        slow.sendall(f"POST /classify HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\n12".encode())
        while not server.one_picture.locked():  # until the slow one has it
            time.sleep(0.01)
        assert ask(server, "POST", "/classify", b"garbage")[0] == 503
        slow.makefile("rb").read()
    with server.one_picture:  # it was given back
        pass
    assert ask(server, "POST", "/classify", b"garbage")[0] == 422


def test_whoever_has_an_answer_may_send_the_next_picture(server, monkeypatch):
    taken, send = [], serve._Handler._send

    def look_and_send(handler, *args):
        taken.append(server.one_picture.locked())
        send(handler, *args)

    monkeypatch.setattr(serve._Handler, "_send", look_and_send)
    statuses = [
        ask(server, "POST", "/classify", body)[0] for body in (png(np.eye(28, dtype=np.uint8)), b"garbage")
    ]
    assert (statuses, taken) == ([200, 422], [False, False])


def test_only_loopback_listens(server):
    assert server.server_address[0] == "127.0.0.1"


def run(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fmbench.serve", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_busy_port_is_one_line_and_ctrl_c_another(workdir):
    process = run(str(workdir), "--port=0")
    assert process.stdout is not None
    address = process.stdout.readline().split()[0]
    port = address.rstrip("/").rpartition(":")[2]
    other = run(str(workdir), f"--port={port}")
    _, said = other.communicate(timeout=120)
    assert other.returncode == 2
    assert (
        said == f"fmbench.serve: --port={port}: Address already in use; name another, or 0 for any that is free.\n"
    )
    process.send_signal(2)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "fmbench.serve: stopped.\n")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_drops_and_reads(server, scheme, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
    origin = f"http://127.0.0.1:{server.server_port}"
    shoe = fashion_mnist.load("sample").test_images[0]
    errors, asked = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 900})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(origin)

        def seen() -> np.ndarray:
            data = "[...document.getElementById('seen').getContext('2d').getImageData(0, 0, 28, 28).data]"
            return np.uint8(page.evaluate(data)).reshape(28, 28, 4)[..., 0]

        def until(condition) -> None:
            deadline = time.monotonic() + 30
            while not condition():
                assert time.monotonic() < deadline
                page.wait_for_timeout(50)

        # Drawn with the mouse.
        box = page.locator("#pad").bounding_box()
        page.mouse.move(box["x"] + 60, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 200, box["y"] + 200, steps=8)
        page.mouse.up()
        page.wait_for_selector("#classes li")
        assert page.locator("#classes li").count() == 10
        shares = [float(text.removesuffix(" %")) for text in page.locator(".share").all_inner_texts()]
        assert sum(shares) == pytest.approx(100, abs=0.6) and shares == sorted(shares, reverse=True)
        assert page.locator(".maps").count() == 3 and page.locator(".maps canvas").count() == 48
        assert seen().max() == 255

        # Dropped: the pixels of the data set's own image are seen.
        page.evaluate(
            """(text) => {
                const data = new DataTransfer();
                const content = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
                data.items.add(new File([content], "shoe.png", {type: "image/png"}));
                const how = {dataTransfer: data, bubbles: true, cancelable: true};
                document.dispatchEvent(new DragEvent("drop", how));
            }""",
            base64.b64encode(png(shoe)).decode(),
        )
        until(lambda: np.array_equal(seen(), shoe))

        # With the keyboard alone: draw, clear, and be told that there is nothing.
        page.locator("#pad").focus()
        for key in (" ", *["ArrowDown"] * 9, "Enter"):
            page.keyboard.press(key)
        until(lambda: not np.array_equal(seen(), shoe))
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.locator("#said").inner_text() == "There is nothing drawn yet."

        # A file that is no picture.
        (tmp_path / "a.png").write_bytes(b"garbage")
        page.locator("#file").set_input_files(tmp_path / "a.png")
        until(lambda: page.locator("#said").inner_text().startswith("the picture: cannot read"))
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(251, 251, 250)", "dark": "rgb(21, 23, 26)"}[scheme]
        for width in (360, 2560):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert all(url.startswith((f"{origin}/", "data:")) for url in asked)
    assert [error for error in errors if "422" not in error] == []  # the browser's own word of the garbage

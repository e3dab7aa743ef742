"""What tests and pictures of the page share: browser, gestures, a server with a script."""

import importlib.util
import json
import queue
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from lapilli.serve.page import page_headers
from tests.conftest import REPOSITORY

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WAIT = 60_000
"""Milliseconds: machines are busy."""
ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)


def find_axe() -> Path | None:
    """Return axe-core's file, from the package of Python or from web/node_modules."""
    spec = importlib.util.find_spec("axe_playwright_python")
    places = [Path(one) / "axe.min.js" for one in (spec and spec.submodule_search_locations) or ()]
    places.append(REPOSITORY / "web" / "node_modules" / "axe-core" / "axe.min.js")
    return next((place for place in places if place.is_file()), None)


def draw(page: Any, shape: str = "circle", colour: str = "red") -> None:
    """Draw one shape in the middle, as with a mouse."""
    page.get_by_role("button", name="Draw").click()
    page.get_by_role("radio", name=shape).check()
    page.get_by_role("radio", name=colour).check()
    page.get_by_label("Drawing area").click()
    page.get_by_role("button", name="Use the drawing").click()


def ask(page: Any, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Send").click()


def answers(page: Any) -> Any:
    return page.get_by_role("article", name="Answer").locator(".markdown")


class Script:
    """A server that says what a test tells it to, and when; None in `said` cuts the connection."""

    def __init__(self) -> None:
        self.url = ""
        self.said: queue.Queue[str | dict[str, Any] | None] = queue.Queue()
        self.gone = threading.Event()

    def say(self, *pieces: str | dict[str, Any] | None) -> None:
        for piece in pieces:
            self.said.put(piece)

    def end(self) -> None:
        self.say({"choices": [{"delta": {}, "finish_reason": "stop"}]}, "[DONE]")


@contextmanager
def scripted() -> Iterator[Script]:
    """Serve the page, a model and answers that come piece by piece from the test."""
    script = Script()
    html = files("lapilli.serve").joinpath("page.html").read_bytes()
    architecture = {"language_model": "llama", "layers": 2, "hidden_size": 8, "parameters": 64}
    model = {"id": "scripted", "max_model_len": 512, "modalities": ["text", "image"]}
    pages = {
        "/": html,
        "/v1/models": json.dumps({"data": [{**model, "architecture": architecture}]}).encode(),
        "/openapi.json": b'{"paths": {}}',
    }

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            body, headers = pages[self.path], page_headers(html) if self.path == "/" else {}
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "text/html" if self.path == "/" else "text/json")
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            while (piece := script.said.get()) is not None:
                if isinstance(piece, str) and piece != "[DONE]":
                    piece = {"choices": [{"delta": {"content": piece}, "finish_reason": None}]}
                data = piece if isinstance(piece, str) else json.dumps(piece)
                try:
                    self.wfile.write(f"data: {data}\n\n".encode())
                except OSError:  # the page has closed the connection
                    script.gone.set()
                    return
                if piece == "[DONE]":
                    return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_port}/"
    try:
        yield script
    finally:
        script.say(None)
        server.shutdown()
        server.server_close()
        thread.join()

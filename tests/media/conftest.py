"""A web server that misbehaves in every way that the tests ask for."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BODY = bytes(range(256)) * 8


class Misbehaving(BaseHTTPRequestHandler):
    """Answers by the name of the path."""

    protocol_version = "HTTP/1.1"
    over: threading.Event
    seen: list[str]

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.close_connection = True
        self.seen.append(self.path)
        name = self.path.split("?")[0].strip("/").split("/")[0].replace("-", "_")
        with suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, name, self.missing)()

    def start(self, code: int = 200, **headers: object) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def ok(self):
        self.start(Content_Length=len(BODY), Content_Type="image/png")
        self.wfile.write(BODY)

    def chunked(self):
        self.start(Transfer_Encoding="chunked")
        for part in (BODY[:1000], BODY[1000:], b""):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")

    def missing(self):
        self.start(404, Content_Length=0)

    def empty(self):
        self.start(Content_Length=0)

    def short(self):
        self.start(Content_Length=100)
        self.wfile.write(b"x" * 10)

    def huge(self):
        self.start(Content_Length=5 << 30)
        self.endless_body()

    def endless(self):
        self.start(Connection="close")
        self.endless_body()

    def endless_body(self):
        while not self.over.is_set():
            self.wfile.write(BODY)

    def hang(self):
        self.over.wait()

    def drip_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.drip()

    def drip_body(self):
        self.start(Connection="close")
        self.drip()

    def drip(self):
        while not self.over.is_set():
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.02)

    def nonsense(self):
        self.wfile.write(b"I do not speak HTTP\r\n\r\n")

    def to_file(self):
        self.start(302, Location="file:///etc/passwd", Content_Length=0)

    def to_ftp(self):
        self.start(301, Location="ftp://127.0.0.1/x", Content_Length=0)

    def to_data(self):
        self.start(307, Location="data:image/png;base64,AAAA", Content_Length=0)

    def to_ok(self):
        self.start(308, Location="/ok", Content_Length=0)

    def loop(self):
        self.start(302, Location="/loop", Content_Length=0)


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    """The address of a running server."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = type("Handler", (Misbehaving,), {"over": threading.Event(), "seen": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        handler.over.set()
        running.shutdown()
        thread.join()
        running.server_close()

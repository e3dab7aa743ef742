"""Downloads from a real server on this machine, which hangs, drips, never ends and redirects."""

import socket
import subprocess
import sys
import threading
import time

import pytest

from lapilli.errors import ConfigError, MediaError
from lapilli.media.download import FetchLimits, download, url_name
from tests.media.conftest import BODY

QUICK = FetchLimits(timeout_s=0.4, max_bytes=1 << 20, max_redirects=3)
LIMITS = FetchLimits(timeout_s=20.0, max_bytes=1 << 20, max_redirects=3)


@pytest.mark.parametrize("path", ["ok", "chunked", "to-ok", "ok/with space/ü.png?q=1 2&r=ß#part"])
def test_the_body_arrives(server, path):
    assert download(f"{server}/{path}", LIMITS) == BODY


@pytest.mark.slow
@pytest.mark.parametrize("path", ["hang", "drip-headers", "drip-body"])
def test_the_deadline_holds_for_the_whole(server, path):
    start = time.monotonic()
    with pytest.raises(MediaError, match=rf"/{path} did not answer completely within 0.4 s"):
        download(f"{server}/{path}", QUICK)
    assert time.monotonic() - start < 5
    # Nobody goes on reading after that.
    deadline = time.monotonic() + 10
    while any(thread.name == "lapilli-download" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the download still runs"
        time.sleep(0.02)


@pytest.mark.slow
def test_the_deadline_holds_for_looking_up_a_name(monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: asked.wait(3) and [])
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"within 0\.4 s"):
        download("http://slow.invalid/x", QUICK)
    assert time.monotonic() - start < 2
    asked.set()


@pytest.mark.slow
def test_a_name_that_is_never_looked_up_does_not_keep_the_process_alive():
    program = """
import socket, sys, threading
socket.getaddrinfo = lambda *_, **__: threading.Event().wait()
from lapilli.errors import MediaError
from lapilli.media.download import FetchLimits, download
try:
    download("http://never.invalid/x", FetchLimits(timeout_s=0.3))
except MediaError as error:
    sys.exit(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    expected = "http://never.invalid/x did not answer completely within 0.3 s (0 bytes came)\n"
    assert (done.returncode, done.stderr) == (1, expected)


@pytest.mark.slow
def test_a_listener_that_never_accepts():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        with pytest.raises(MediaError, match=r"within 0\.4 s"):
            download(url, QUICK)


def test_five_gigabytes_are_refused_by_their_header(server):
    with pytest.raises(MediaError, match="/huge has 5368709120 bytes, more than the limit of 1048"):
        download(f"{server}/huge", LIMITS)


def test_an_endless_body_is_cut_at_the_limit(server):
    with pytest.raises(MediaError, match="/endless has more bytes than the limit of 1048576"):
        download(f"{server}/endless", LIMITS)


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_redirects_to_another_scheme(server, scheme):
    with pytest.raises(MediaError, match=rf"/to-{scheme} redirects to {scheme}:, only http"):
        download(f"{server}/to-{scheme}", LIMITS)


def test_redirects_without_end(server):
    with pytest.raises(MediaError, match="/loop redirects more than 3 times"):
        download(f"{server}/loop", LIMITS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "/nowhere answered 404 Not Found"),
        ("short", "/short: the connection ended after 10 of 100 bytes"),
        ("nonsense", "/nonsense cannot be fetched: I do not speak HTTP"),
    ],
)
def test_broken_answers(server, path, message):
    with pytest.raises(MediaError, match=message):
        download(f"{server}/{path}", LIMITS)


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(
        MediaError, match=rf"http://127.0.0.1:{port}/x cannot be fetched: .*refused"
    ):
        download(f"http://127.0.0.1:{port}/x", LIMITS)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://example.org/x.png", "ftp://example.org/x.png: only http and https"),
        ("file:///etc/passwd", "only http and https"),
        ("http:///x.png", "no host given"),
        ("http://user:word@127.0.0.1/x", "http://127.0.0.1/x: a URL with a user name"),
        ("http://127.0.0.1:port/x", "cannot be fetched: .*port"),
    ],
)
def test_urls_that_are_refused(url, message):
    with pytest.raises(MediaError, match=message):
        download(url, LIMITS)


def test_names_keep_no_secrets():
    assert url_name("https://me:secret@host:81/a/b.png?token=1#f") == "https://host:81/a/b.png"


def test_limits_have_to_be_positive():
    with pytest.raises(ConfigError, match=r"timeout_s 0\.0"):
        FetchLimits(timeout_s=0.0)

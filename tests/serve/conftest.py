"""Servers for the tests: real sockets, uvicorn in a thread, one pebble for all of them."""

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from PIL import Image, ImageDraw

import lapilli
from lapilli.pipeline import Chat
from lapilli.serve.options import ServeOptions
from lapilli.serve.run import ServerThread

KEY = "secret-1"


def picture(colour: str = "red", size: int = 96) -> bytes:
    """Return a PNG of one circle on white."""
    image = Image.new("RGB", (size, size), "white")
    box = (size // 3, size // 3, 2 * size // 3, 2 * size // 3)
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asked(question: str, *urls: object, **options: object) -> dict[str, object]:
    """Return the body of a chat request about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], **options}


@contextmanager
def serving(chat: Chat, options: ServeOptions | None = None) -> Iterator[httpx.Client]:
    """Run a server of its own on a free port; yield a client of it."""
    with (
        ServerThread(chat, options) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        client.app = server.app  # type: ignore[attr-defined]
        yield client


@pytest.fixture(scope="session")
def pebble() -> Chat:
    return lapilli.load("pebble")


@pytest.fixture(scope="session")
def client(pebble: Chat) -> Iterator[httpx.Client]:
    """A server without a key, as `lapilli serve` starts it."""
    with serving(pebble) as client:
        yield client


@pytest.fixture
def serve(pebble: Chat) -> Iterator[Callable[..., httpx.Client]]:
    """Start servers with options of the test's own."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            serving(pebble, ServeOptions(port=0, **options))
        )

"""Every kind of source, and what is said when nothing can be had from it."""

import base64
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lapilli.errors import MediaError
from lapilli.media.fetch import FetchLimits, fetch, is_path
from tests.media.conftest import BODY

SMALL = FetchLimits(max_bytes=100)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "a picture.png"
    path.write_bytes(b"abc")
    return path


def test_paths(file):
    assert fetch(file).data == b"abc"
    assert fetch(str(file)).data == b"abc"
    assert fetch(str(file)).name == str(file)


def test_file_urls(tmp_path):
    path = tmp_path / "a b%.png"
    path.write_bytes(b"abc")
    for url in (path.as_uri(), path.as_uri().replace("file://", "FILE://localhost")):
        assert fetch(url).data == b"abc"
    assert fetch(path.as_uri().replace("file://", "file:")).name == str(path)


PNG = io.BytesIO()
Image.new("RGB", (9, 9)).save(PNG, "PNG")


def test_base64_without_a_head():
    packed = base64.b64encode(PNG.getvalue()).decode()
    for text in (packed, packed.rstrip("="), f"{packed[:60]}\n{packed[60:]}"):
        assert fetch(text).data == PNG.getvalue()
        assert not is_path(text)
    with pytest.raises(MediaError, match="does not exist"):
        fetch("b" * 64)  # a name, such as the digest of a file


def test_a_file_wins_over_base64(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = base64.b64encode(PNG.getvalue()).decode().replace("/", "A")
    (tmp_path / name).write_bytes(b"abc")
    assert fetch(name).data == b"abc"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.png", True),
        ("/9j/a.png", True),
        ("HTTP://x/y", False),
        ("File:///x", False),
        ("-", False),
    ],
)
def test_what_is_a_path(source, expected):
    assert is_path(source) is expected


def test_a_stream_that_was_written_is_rewound():
    stream = io.BytesIO()
    stream.write(b"abc")
    assert fetch(stream).data == b"abc"
    stream.seek(1)  # somebody has read the first byte and means the rest
    assert fetch(stream).data == b"bc"


class Trickle(io.RawIOBase):
    """Gives two bytes at a time, as a socket may."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.rest = data

    def readable(self):
        return True

    def readinto(self, into):
        piece, self.rest = self.rest[:2], self.rest[2:]
        into[: len(piece)] = piece
        return len(piece)


def test_streams_that_cannot_be_read_at_once():
    assert fetch(Trickle(b"abcdefg")).data == b"abcdefg"
    with pytest.raises(MediaError, match="has at least 102 bytes"):
        fetch(Trickle(bytes(500)), limits=SMALL)
    closed = io.BytesIO(b"abc")
    closed.close()
    with pytest.raises(MediaError, match=r"the stream cannot be read: .*closed"):
        fetch(closed)


@pytest.mark.slow
def test_pipes_with_and_without_a_writer(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(MediaError, match=r"pipe is a pipe that gave nothing for 0\.2 s"):
        fetch(path, limits=FetchLimits(timeout_s=0.2))
    writer = os.open(path, os.O_RDWR)
    os.write(writer, b"abc")
    with pytest.raises(MediaError, match="gave nothing"):  # three bytes, and the writer stays
        fetch(path, limits=FetchLimits(timeout_s=0.2))
    os.close(writer)


def test_devices_without_end():
    with pytest.raises(MediaError, match="/dev/zero has at least 101 bytes"):
        fetch("/dev/zero", limits=SMALL)
    with pytest.raises(MediaError, match="/dev/null is empty"):
        fetch("/dev/null")


def test_home_is_expanded(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    assert fetch(f"~/{file.name}").data == b"abc"
    assert fetch(f"~/{file.name}").name == str(file)
    with pytest.raises(MediaError, match=f"^{re.escape(str(file.parent))}/no.png does not exist$"):
        fetch("~/no.png")


def test_bytes_and_streams(file):
    assert fetch(b"abc").data == b"abc"
    assert fetch(bytearray(b"abc")).data == b"abc"
    assert fetch(memoryview(b"abc")).data == b"abc"
    assert fetch(io.BytesIO(b"abc")).data == b"abc"
    with file.open("rb") as stream:
        fetched = fetch(stream)
    assert fetched.data == b"abc"
    assert fetched.name == str(file)


def test_standard_input():
    assert fetch("-", stdin=io.BytesIO(b"abc")).data == b"abc"
    assert fetch("-", stdin=io.BytesIO(b"abc")).name == "standard input"


def test_images_and_arrays_pass_as_they_are():
    image, array = Image.new("RGB", (2, 3)), np.zeros((2, 3), np.uint8)
    assert fetch(image).data is image
    assert fetch(array).data is array


def test_urls(server):
    fetched = fetch(f"{server}/ok?secret=1")
    assert fetched.data == BODY
    assert fetched.name == f"{server}/ok"


@given(st.binary(min_size=1, max_size=50))
def test_data_uris(data):
    packed = base64.b64encode(data).decode()
    percent = "".join(f"%{byte:02X}" for byte in data)
    for uri in (
        f"data:image/png;base64,{packed}",
        f"DATA:image/png;charset=x;BASE64,{packed.rstrip('=')}",
        f"data:;base64,{packed[:5]}\n{packed[5:]}",
        f"data:image/png,{percent}",
    ):
        assert fetch(uri).data == data


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png;base64", "image/png.* has no ',' before its data"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,A", "not valid base64"),
        ("data:image/png;base64,", r"the data URI \(image/png\) is empty"),
        (
            "data:," + "x" * 101,
            r"\(text/plain\) has at least 101 bytes, more than the limit of 100",
        ),
        ("data:," + "x" * 500, "has 500 letters, too many for 100 bytes"),
    ],
)
def test_bad_data_uris(uri, message):
    with pytest.raises(MediaError, match=message):
        fetch(uri, limits=SMALL)


def test_missing_file(tmp_path):
    with pytest.raises(MediaError, match=r"nothing\.png does not exist"):
        fetch(tmp_path / "nothing.png")


def test_directory(tmp_path):
    with pytest.raises(MediaError, match=f"{tmp_path.name} is a directory"):
        fetch(tmp_path)


def test_empty_sources(tmp_path, server):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(MediaError, match=r"empty\.png is empty \(0 bytes\)"):
        fetch(path)
    with pytest.raises(MediaError, match="/empty is empty"):
        fetch(f"{server}/empty")
    with pytest.raises(MediaError, match="the byte string is empty"):
        fetch(b"")
    with pytest.raises(MediaError, match="standard input is empty"):
        fetch("-", stdin=io.BytesIO())
    with pytest.raises(MediaError, match="path of the picture is empty"):
        fetch("")


def test_sources_over_the_limit(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(bytes(200))
    message = "has at least {} bytes, more than the limit of 100"
    with pytest.raises(MediaError, match=message.format(200)):
        fetch(path, limits=SMALL)
    with pytest.raises(MediaError, match=message.format(101)):
        fetch("-", limits=SMALL, stdin=io.BytesIO(bytes(200)))
    with pytest.raises(MediaError, match=message.format(200)):
        fetch(bytes(200), limits=SMALL)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("-", "standard input, which is not available"),
        ("ftp://host/x.png", "only http and https URLs"),
        ("file://elsewhere/x.png", "names no file on this machine: write file:///path"),
        ("file:x.png", "names no file on this machine"),
        ("file://[", "is no URL: Invalid IPv6 URL"),
        ("http://[", r"'http://\[' is no URL: Invalid IPv6 URL"),
        ("http://\ud800/x.png", "cannot be fetched"),
        ("~no-such-user-here/x.png", "cannot be read: .*home|does not exist"),
        ("null\0byte.png", "is no path"),
        ("x" * 5000, r"x\.\.\. \(5000 letters\) cannot be read: .*; if it is a picture in base64"),
        (io.StringIO("text"), "opened as text"),
        (7, "a int is no source of a picture"),
        (None, "a NoneType is no source"),
    ],
)
def test_sources_that_cannot_be_read(source, message):
    with pytest.raises(MediaError, match=message):
        fetch(source)

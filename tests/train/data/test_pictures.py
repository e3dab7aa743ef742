"""What records call pictures: files, bytes, URLs; and what is none."""

import base64
from pathlib import Path

import pytest

from lapilli.errors import DataError
from lapilli.train.data.pictures import PictureFolder, picture_of

FOLDER = PictureFolder(Path("/pictures"))
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(60))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a/b.png", Path("/pictures/a/b.png")),
        ("../b.png", Path("/pictures/../b.png")),
        ("/else/b.png", Path("/else/b.png")),
        ("HTTPS://host/b.png", "HTTPS://host/b.png"),
        ("data:image/png;base64,AA==", "data:image/png;base64,AA=="),
        ({"path": "b.png", "bytes": None}, Path("/pictures/b.png")),
        ({"path": "b.png", "bytes": b"x"}, b"x"),
        ({"path": None, "url": "http://host/b.png"}, "http://host/b.png"),
        (bytearray(b"x"), b"x"),
        (base64.b64encode(PNG).decode(), PNG),
    ],
)
def test_names_become_what_can_be_fetched(name, found):
    assert FOLDER.find(name) == found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, r"a picture is None: expected a file name, a URL, a data URI or bytes"),
        (" ", r"a picture is ' ': expected a file name"),
        (3.5, r"a picture is a float: expected a file name"),
        ({}, r"an object without bytes, path and url: its keys are none"),
        ({"data": "x", "path": None}, r"without bytes, path and url: its keys are 'data', 'path'"),
        ("iVBORw0KGgo" + "A" * 62 + "=", r"a picture in base64 \(iVBORw0KGgoA...\) is damaged"),
    ],
)
def test_what_is_no_picture_is_said(name, expected):
    with pytest.raises(DataError, match=expected):
        picture_of(name)

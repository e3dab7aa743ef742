"""Files are told apart by what is in them, and by nothing of the machine."""

import hashlib
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.train.data.fingerprint import SAMPLED_BYTES, data_file, together

LARGE = 3 * SAMPLED_BYTES + 12345


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A sparse file that is read in pieces."""
    path = tmp_path_factory.mktemp("large") / "shard.tar"
    with path.open("wb") as file:
        file.truncate(LARGE)
    return path


def put(path, at, data):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@given(st.binary(min_size=1, max_size=200), st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_small_file_is_its_content(tmp_path, content, data):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    path.write_bytes(content)
    found = data_file(path)
    assert found.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert (found.name, found.num_bytes) == ("a.json", len(content))
    at = data.draw(st.integers(0, len(content) - 1))
    other.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert data_file(other).digest != found.digest


def test_neither_folder_nor_time_counts(tmp_path):
    (tmp_path / "moved").mkdir()
    path, moved = tmp_path / "a.json", tmp_path / "moved" / "a.json"
    path.write_bytes(b"[]")
    moved.write_bytes(b"[]")
    os.utime(moved, (1, 1))
    assert data_file(path) == data_file(moved)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, LARGE - 1, SAMPLED_BYTES * 3 // 63])
def test_a_large_file_is_read_in_pieces_from_the_first_byte_to_the_last(large, at):
    before = data_file(large)
    assert before.digest.startswith("in pieces, sha256:")
    put(large, at, b"\1")
    changed = data_file(large).digest
    put(large, at, b"\0")
    assert changed != before.digest == data_file(large).digest


def test_what_lies_between_the_pieces_is_seen_when_all_is_read(large):
    in_pieces, whole = data_file(large), data_file(large, whole_bytes=LARGE)
    put(large, LARGE // 126, b"\1")
    assert data_file(large) == in_pieces
    changed = data_file(large, whole_bytes=LARGE)
    put(large, LARGE // 126, b"\0")
    assert changed.digest != whole.digest
    assert not whole.digest.startswith("in pieces")


def test_another_size_is_another_file(large, tmp_path):
    longer = tmp_path / "shard.tar"
    with longer.open("wb") as file:
        file.truncate(LARGE + 1)
    assert data_file(longer).digest != data_file(large).digest


def test_the_order_of_files_counts(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    files = [data_file(tmp_path / name) for name in "ab"]
    assert together(files) != together(files[::-1])
    assert together(files).startswith("sha256:")

"""A data file that is damaged is one short error; nothing of it is taken for the whole."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from lapilli.errors import DataError
from lapilli.prompt.message import Message
from lapilli.train.data import Dataset, open_dataset, to_sample
from lapilli.train.data.check import check
from lapilli.train.data.formats import MOST_LETTERS, signed_words
from lapilli.train.data.source import MOST_BYTES, decode
from lapilli.train.recipe import SourceRecipe
from lapilli.train.trainer.metrics import RunLog
from tests.train.data.conftest import RECORDS
from tests.train.data.test_source import png, write, write_tar


def opened(path) -> Dataset:
    return open_dataset([SourceRecipe(path=str(path))])


def learned(path) -> list[str]:
    """What every sample says, or why it cannot be learned."""
    dataset = opened(path)
    return [finding.text for finding in check(dataset).errors]


SHARD = {"a.json": json.dumps({"caption": "x"}).encode(), "a.png": png("red"), "b.txt": b"two"}


def test_a_shard_with_pictures_can_be_checked(tmp_path):
    report = check(opened(write_tar(tmp_path / "data.tar", SHARD | {"b.png": png("red")})))
    assert (report.num_media, report.num_different_media, report.errors) == (2, 2, ())


def with_header(data: bytes, at: int, field: int, value: bytes) -> bytes:
    """A tar archive with another field in one header, the checksum right."""
    block = bytearray(data[at : at + 512])
    block[field : field + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


def with_pax(data: bytes, body: bytes) -> bytes:
    header = tarfile.TarInfo("pax")
    header.type, header.size = b"x", len(body)
    return header.tobuf(tarfile.USTAR_FORMAT) + body + b"\0" * (-len(body) % 512) + data


def record_of(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


HEADERS = {
    "a header in the middle is damaged": lambda d: d[:1024] + b"\xff" + d[1025:],
    "a member is larger than all": lambda d: with_header(d, 0, 124, b"77777777777\0"),
    "a size is negative": lambda d: with_header(d, 0, 124, b"\xff" * 11 + b"\xf0"),
    "a size has 96 bits": lambda d: with_header(d, 0, 124, b"\x80" + b"\x7f" * 11),
    "a member is sparse": lambda d: with_header(with_header(d, 0, 156, b"S"), 0, 482, b"\1"),
    "sparse in a pax header": lambda d: with_pax(d, record_of(b"GNU.sparse.map", b"0,x")),
    "a size of 5,000 digits": lambda d: with_pax(d, record_of(b"GNU.sparse.size", b"9" * 5000)),
    "a million digits": lambda d: with_pax(d, record_of(b"comment", b"9" * 1_000_000)),
    "sixty thousand digits": lambda d: with_pax(d, record_of(b"comment", b"9" * 60_000)),
    "a thousand headers of headers": lambda d: b"".join([with_pax(b"", b"")] * 5000) + d,
    "a name of 5,000 letters": lambda d: with_pax(d, record_of(b"path", b"x" * 5000)),
}


@pytest.mark.parametrize("damage", HEADERS.values(), ids=HEADERS)
def test_a_damaged_shard_is_refused_at_once(tmp_path, damage):
    path = write_tar(tmp_path / "data.tar", SHARD)
    path.write_bytes(damage(path.read_bytes()))
    started = time.process_time()
    with pytest.raises(DataError, match=r"data\.tar") as told:
        learned(path)
    assert len(str(told.value)) < 1000
    assert time.process_time() - started < 2


@given(st.integers(0, 2047), st.integers(1, 255))
def test_no_byte_of_a_shard_costs_a_sample_silently(tmp_path_factory, at, change):
    folder = tmp_path_factory.getbasetemp()
    path = write_tar(folder / "flip.tar", {"a.txt": b"one", "b.txt": b"two", "c.txt": b"three"})
    data = bytearray(path.read_bytes())
    data[at] ^= change
    path.write_bytes(data)
    with suppress(DataError):
        assert len(opened(path)) == 3


NESTED = "[" * 900 + "]" * 900


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (f'{{"caption": "x", "id": {NESTED}}}', "nested more than 100"),
        (f'{{"conversations": "{"[" * 100_000}"}}', "no JSON"),
        (f'{{"conversations": "{"9" * 5000}"}}', "no JSON"),
        (f'{{"id": "{"x" * 9000}", "conversations": 1}}', "expected a list"),
        (f'{{"id": 1, "{"k" * 9000}": 1}}', "found the keys"),
        (f'{{"messages": [{{"role": "{"x" * 9000}", "content": ""}}]}}', "is from"),
        (f'{{"caption": "{"x" * (MOST_LETTERS + 1)}"}}', "letters"),
    ],
)
def test_a_record_that_nobody_can_learn_is_one_short_error(tmp_path, kind, record, expected):
    path = tmp_path / f"data.{kind}"
    path.write_text(f"[{record}]" if kind == "json" else f"{record}\n")
    dataset = opened(path)
    dataset.words()
    with pytest.raises(DataError, match=expected) as told:
        dataset.sample(0)
    assert len(str(told.value)) < 1000
    assert all(len(str(finding)) < 1000 for finding in check(dataset).findings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_a_value_without_an_end_is_not_read_for_ever(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    path.write_bytes({"json": b'[{"caption": "', "jsonl": b'{"caption": "', "csv": b'id,"'}[kind])
    with path.open("r+b") as file:
        file.truncate(10**12)
    with pytest.raises(DataError, match="data"):
        opened(path)


@pytest.mark.slow
def test_a_record_has_as_many_values_as_the_memory_takes(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"id": [' + "[]," * (5 << 20) + "1]}]")
    with pytest.raises(DataError, match="values"):
        opened(path)
    assert path.stat().st_size < MOST_BYTES


def test_a_picture_for_every_place_takes_a_time_that_grows_with_their_number():
    started = time.process_time()
    number = 20_000
    message = Message.from_placeholders("user", "<image>" * number, ["x"] * number)
    assert len(message.media) == number
    sample = to_sample({"image": ["x"] * number, "caption": "y"}, where="here")
    assert (len(sample.media), signed_words({"caption": "a b"})) == (number, -2)
    assert time.process_time() - started < 3


def table(path, columns, **options):
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def broken_text():
    offsets = pyarrow.py_buffer(struct.pack("<3i", 0, 2, 5))
    return pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"\xff\xfeabc")]
    )


VALUES = {
    "a day beyond the calendar": pyarrow.array([2**30, 1], pyarrow.date32()),
    "a second beyond it": pyarrow.array([2**40, 1], pyarrow.timestamp("s")),
    "a span beyond it": pyarrow.array([2**62, 1], pyarrow.duration("us")),
    "a zone that is none": pyarrow.array([1, 1], pyarrow.timestamp("us", tz="No/Where")),
    "a text that is no UTF-8": broken_text(),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_a_value_that_python_cannot_hold_is_an_error_of_its_row(tmp_path, values):
    path = table(tmp_path / "data.parquet", {"caption": values, "id": ["a", "b"]})
    assert learned(path)


def test_rows_of_a_damaged_group_are_not_read_again_each(tmp_path):
    path = table(tmp_path / "data.parquet", {"caption": [f"text {i}" for i in range(3000)]})
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<I", data[-8:-4])
    data[4 : len(data) - 8 - length] = b"\xff" * (len(data) - 12 - length)
    path.write_bytes(data)
    started = time.process_time()
    assert len(learned(path)) == 3000
    assert time.process_time() - started < 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "columns",
    [
        {"caption": pyarrow.nulls(10**7)},
        {"caption": ["a" * 100_000_000]},
    ],
    ids=["rows", "letters"],
)
def test_a_few_bytes_that_become_many_are_refused(tmp_path, columns):
    path = table(tmp_path / "data.parquet", columns, compression="zstd", row_group_size=10**8)
    with pytest.raises(DataError, match="bytes"):
        opened(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "tar"])
@given(data=st.data())
def test_flipped_bytes_end_as_samples_or_an_error(tmp_path_factory, kind, data):
    path = write(tmp_path_factory.getbasetemp() / f"data.{kind}", RECORDS[:2])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(DataError):
        check(opened(path))


def test_names_of_columns_are_told_shortly(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(",".join("x" * 200 for _ in range(500)))
    with pytest.raises(DataError, match="and 488 more") as told:
        opened(path)
    assert len(str(told.value)) < 2000


def test_what_cannot_be_printed_is_said_with_escapes(capfd):
    RunLog.say("a.\udcff.json is damaged")
    assert capfd.readouterr().err == "a.\\udcff.json is damaged\n"


def test_a_tar_member_is_read_from_its_start_by_everybody(tmp_path):
    path = write_tar(tmp_path / "data.tar", SHARD)
    part = opened(path).sample(0).media[0].source
    again = opened(path).sample(0).media[0].source
    part.read(2)
    assert part == again
    assert hash(part) == hash(again)
    assert io.BytesIO(again.read()).read() == png("red")


@pytest.mark.slow
def test_a_text_that_stands_in_many_rows_has_a_limit(tmp_path):
    texts = pyarrow.array(["a" * 900_000])
    again = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), texts)
    path = table(tmp_path / "data.parquet", {"caption": again.cast(pyarrow.string())})
    with pytest.raises(DataError, match="write smaller groups"):
        opened(path).sample(0)


@pytest.mark.parametrize(("inside", "bad"), [(5_000_000, [True] * 2), (100_000, [])])
def test_rows_have_as_many_values_as_the_memory_takes(tmp_path, inside, bad):
    values = pyarrow.array([[[None] * inside], [[None]]])
    path = table(tmp_path / "data.parquet", {"other": values, "caption": ["a", "b"]})
    assert ["values" in text for text in learned(path)] == bad


@pytest.mark.slow
def test_a_damaged_column_does_not_end_the_process(tmp_path):
    """pyarrow throws where it makes an object of a column, and nobody can catch it."""
    path = table(tmp_path / "data.parquet", {"caption": ["a", None], "id": ["x", "y"]})
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[-8:-4])
    code = """
import sys
from lapilli.errors import DataError
from lapilli.train.data import open_dataset
from lapilli.train.recipe import SourceRecipe
for path in sys.argv[1:]:
    try:
        dataset = open_dataset([SourceRecipe(path=path)])
        dataset.sample(0)
    except DataError:
        pass
"""
    paths = []
    for at in range(len(data) - 8 - length, len(data) - 8):
        for bit in (1, 4, 16):
            changed = bytearray(data)
            changed[at] ^= bit
            paths.append(tmp_path / f"{at}-{bit}.parquet")
            paths[-1].write_bytes(changed)
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_picture_that_never_ends_is_not_waited_for(tmp_path, make):
    make(tmp_path / "red.png")
    (tmp_path / "data.jsonl").write_text('{"image": "red.png", "caption": "x"}')
    started = time.monotonic()
    (text,) = learned(tmp_path / "data.jsonl")
    assert "red.png is a pipe or a device" in text.replace("'", "")
    assert time.monotonic() - started < 5


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def linked(path: Path, *links: tarfile.TarInfo) -> Path:
    """A tar archive of a.png, b.txt and links, in this order."""
    with tarfile.open(path, "w") as shard:
        for name, data in {"x/a.png": png("red"), "x/b.txt": b"A red square."}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
        for info in links:
            shard.addfile(info)
    return path


@pytest.mark.parametrize(
    "links",
    [
        [link("x/b.png", "x/a.png")],
        [link("x/b.png", "./x/a.png")],
        [link("x/b.png", "a.png", tarfile.SYMTYPE)],
        [link("x/b.png", "../x/a.png", tarfile.SYMTYPE)],
        [link("x/b.png", "c.png", tarfile.SYMTYPE), link("x/c.png", "x/a.png")],
        [link("x/b.png", "x/a.png"), link("x/b.png", "x/b.png")],  # tar was given it twice
        [link("x/b.png", "x/a.png"), link("y", "x", tarfile.SYMTYPE)],
    ],
)
def test_links_of_a_shard_are_the_members_that_they_lead_to(tmp_path, links):
    dataset = opened(linked(tmp_path / "data.tar", *links))
    sample = next(s for s in (try_sample(dataset, i) for i in range(len(dataset))) if s)
    assert sample.label.endswith("(id 'x/b')")
    assert [part.source.content() for part in sample.media] == [png("red")]


def try_sample(dataset, index):
    try:
        return dataset.sample(index)
    except DataError:  # a picture alone
        return None


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        (link("x/b.png", "gone.png"), "is a link to 'gone.png', which is no file"),
        (link("x/b.png", "/tmp/a.png", tarfile.SYMTYPE), "is a link to '/tmp/a.png', which"),
        (link("x/b.png", "b.png", tarfile.SYMTYPE), "is a link to 'b.png', which is no file"),
        (link("x/b.png", "..", tarfile.SYMTYPE), "is a link to '..', which is no file"),
        (link("x/b.png", "", tarfile.FIFOTYPE), "is a pipe or a device"),
        (link("x/b.png", "", b"M"), "is of a kind that is not read"),
    ],
)
def test_a_member_that_cannot_be_read_is_an_error_of_its_sample(tmp_path, lost, what):
    report = check(opened(linked(tmp_path / "data.tar", lost)))
    assert any(f.where.endswith("data.tar:x/b") and what in f.text for f in report.errors)


@pytest.mark.parametrize("name", ["a.npy", "a.pdf", "a.bin", "a.mp4", "a.svg", "a.image", "a"])
def test_a_caption_is_not_learned_without_the_member_beside_it(tmp_path, name):
    data = b"<svg></svg>" if name == "a.svg" else b"\x93NUMPY\0\1" + bytes(600)
    path = write_tar(tmp_path / "data.tar", {"a.txt": b"A red square.", name: data})
    (error,) = check(opened(path)).errors
    assert f"learned without a picture, and its member {name!r} is not read" in error.text
    path = write_tar(tmp_path / "more.tar", {"a.txt": b"Red.", "a.png": png("red"), name: data})
    assert [f.text for f in check(opened(path)).findings] == [f"its member {name!r} is not read"]


def test_a_text_beside_a_text_is_noted(tmp_path):
    members = {"a.txt": "Wei\xdf".encode(), "a.url": b"x" * 511 + "\xdf".encode()}
    report = check(opened(write_tar(tmp_path / "data.tar", members)))
    assert not report.errors
    noted = [f.text for f in report.notes]
    assert noted[0] == "its member 'a.url' is not read"
    assert noted[1] == "no picture stands beside its .txt: it is learned without one"


@pytest.mark.parametrize("ending", ["avif", "jp2", "pgm", "ico", "tga", "heic"])
def test_every_ending_of_a_picture_is_one(tmp_path, ending):
    members = {"a.txt": b"A red square.", f"a.{ending}": png("red")}
    sample = opened(write_tar(tmp_path / "data.tar", members)).sample(0)
    assert [part.source.name for part in sample.media] == [f"a.{ending}"]


@pytest.mark.parametrize("names", [["image", "image", "answer"], ["image", "answer", "answer"]])
def test_two_columns_of_one_name_are_refused(tmp_path, names):
    arrays = [pyarrow.array([text]) for text in ("a.png", "b.png", "Red.")]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has two columns '(image|answer)': rename"):
        opened(tmp_path / "a.parquet")


def test_two_fields_of_one_name_are_an_error_of_the_row(tmp_path):
    parts = [pyarrow.array(["a.png"]), pyarrow.array(["b.png"])]
    image = pyarrow.StructArray.from_arrays(parts, names=["path", "path"])
    table = pyarrow.Table.from_arrays([image, pyarrow.array(["Red."])], names=["image", "answer"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        opened(tmp_path / "a.parquet").sample(0)


def test_a_key_that_comes_twice_among_many_is_found_at_once():
    text = ",".join(f'"{i}": 0' for i in range(100_000))
    started = time.process_time()
    with pytest.raises(DataError, match="the key '99999' comes twice"):
        decode(f'{{{text}, "99999": 1}}'.encode(), "a.jsonl:1")
    assert time.process_time() - started < 2

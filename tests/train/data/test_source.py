"""The same records, whatever file they lie in; and files that are damaged."""

import base64
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lapilli.errors import ConfigError, DataError
from lapilli.media.fetch import fetch
from lapilli.modality.image.decode import to_rgb
from lapilli.train.data import open_dataset, open_source
from lapilli.train.data import source as json_source
from lapilli.train.data.formats import signed_words
from lapilli.train.data.source import RecordFile, decode, expand, picture_of
from lapilli.train.recipe import SourceRecipe
from tests.train.data.conftest import RECORDS, turns
from tests.train.data.test_sample import SAME, same_messages

KINDS = ("json", "jsonl", "parquet", "tar")


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5), color).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """A file of the kind that its name says."""
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
        case ".jsonl":
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
            path.write_text("\n\n".join(lines), encoding="utf-8")
        case ".parquet":
            import pyarrow
            from pyarrow import parquet

            table = pyarrow.Table.from_pylist([json.loads(json.dumps(r)) for r in records])
            parquet.write_table(table, path, row_group_size=2)
        case ".tar":
            members = {f"{i:04d}.json": json.dumps(r).encode() for i, r in enumerate(records)}
            write_tar(path, members)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return path


def read(path: Path | str) -> list[Any]:
    source = open_source(SourceRecipe(path=str(path)))
    return [source.record(i) for i in range(len(source))]


TEXTS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)


@pytest.mark.slow
@given(
    records=st.lists(
        st.fixed_dictionaries({"id": TEXTS, "conversations": st.lists(TEXTS, min_size=1)}),
        min_size=1,
        max_size=9,
    ),
    order=st.randoms(use_true_random=False),
)
def test_all_files_hold_the_same_records(tmp_path_factory, records, order):
    folder = tmp_path_factory.mktemp("records")
    for kind in KINDS:
        source = open_source(SourceRecipe(path=str(write(folder / f"data.{kind}", records))))
        again = pickle.loads(pickle.dumps(source))
        assert len(source) == len(again) == len(records)
        numbers = list(range(len(records)))
        order.shuffle(numbers)
        for i in numbers:
            assert source.record(i) == again.record(i) == records[i], kind


@given(st.integers(1, 40), st.booleans())
def test_an_array_is_found_whatever_the_blocks(tmp_path_factory, block, bom):
    records = [{"a": 'x"]},{é\n', "n": [1.5, -20, None, True]}, {"b": "ü" * 30}, {}, {"c": 1e-9}]
    text = json.dumps(records, ensure_ascii=False, indent=2).replace("\n  },", "\n  }\n ,\n")
    path = tmp_path_factory.mktemp("blocks") / "data.json"
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_source, "_BLOCK", block)
        source = open_source(SourceRecipe(path=str(path)))
    assert [source.record(i) for i in range(len(source))] == records
    lines = [int(source.where(i).rpartition(":")[2]) for i in range(len(source))]
    shown = path.read_text(encoding="utf-8-sig").splitlines()
    assert all(shown[line - 1].strip().startswith("{") for line in lines)
    assert lines == sorted(set(lines))


@pytest.mark.parametrize("text", ["[]", " [ ]\n"])
def test_an_empty_array_has_no_records(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text)
    assert read(path) == []
    with pytest.raises(DataError, match=r"no sample in .*data.json"):
        open_dataset([SourceRecipe(path=str(path))])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n{"a": 1},\n{"b": ', r"json:3: no valid JSON.*begins in line 3.*cut off"),
        ('[\n{"a": 1},\n{"b": "xy', r"json:3: no valid JSON: Unterminated"),
        ('[\n{"a": 1}', r"json:2: expected ',' or '\]' after a sample, found the end.*cut off"),
        ('[\n{"a": 1},\n', r"json:3: no valid JSON"),
        ('[\n{"a": 1}\n{"b": 2}]', r"json:3: expected ',' or '\]' after a sample, found '\{'"),
        ('[{"a": 1}] x', r"json:1: more text after the list"),
        ('{"a": 1}\n{"b": 2}', r"json:1: expected a list of samples.*\.jsonl"),
        ("", r"json is empty: expected a list"),
        ('[{"a": 1, "b": nope}' + " " * 99, r"json:1: no valid JSON: Expecting value"),
        ('[{"a": 1},\n{"b": nope}]\n\n\n', r"json:2: no valid JSON: [^;]*in line 2\)$"),
        ('[{"a": 1},\n{"b": 2},\n]', r"json:3: a comma before the closing '\]'"),
        ('[{"a": ' + "9" * 5000 + "}]", r"json:1: no valid JSON: .*digits"),
        ("[" * 99_999, r"json:1: no valid JSON: .*recursion"),
    ],
)
def test_a_damaged_array_is_named_with_its_line(tmp_path, text, expected):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=expected):
        read(path)


def test_text_that_is_no_utf8_is_named(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes('[{"a": "é"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"data.json:1: no UTF-8: .*save the file as UTF-8"):
        read(path)
    path.write_bytes('[{"a": "é"}]'.encode()[:9])
    with pytest.raises(DataError, match=r"data.json:1: no UTF-8: .*seems to be cut off$"):
        read(path)
    path.write_bytes(b'[\n{"a": 1},\n\n{"a": "\xe9"}]')
    with pytest.raises(DataError, match=r"data.json:4: no UTF-8"):
        read(path)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{}\n{"a": "\xe9"}\n')
    with pytest.raises(DataError, match=r"data.jsonl:2: no valid JSON: .*utf-8"):
        read(path)


@pytest.mark.parametrize("begin", ["", "\ufeff", "\n "])
def test_an_array_is_no_file_of_lines(tmp_path, begin):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{begin}[\n{{"a": 1}}\n]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"jsonl begins with '\[': an array belongs into a \.json"):
        read(path)


def test_a_broken_line_is_one_bad_record(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n\n{"b": \n{"c": 3}\n')
    source = open_source(SourceRecipe(path=str(path)))
    assert [source.record(0), source.record(2)] == [{"a": 1}, {"c": 3}]
    assert source.where(2) == f"{path}:4"
    with pytest.raises(DataError, match=r"data.jsonl:3: no valid JSON"):
        source.record(1)


def test_pictures_come_from_the_folder_that_is_named(folder, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("elsewhere") / "data.json", RECORDS)
    assert not picture_opens(path, None)
    assert picture_opens(path, str(folder))


def picture_opens(path: Path, images: str | None) -> bool:
    dataset = open_dataset([SourceRecipe(path=str(path), images=images)])
    return Path(dataset.sample(0).media[0].source).is_file()


def test_pictures_may_be_inside_the_record(tmp_path):
    red = png("red")
    packed = base64.b64encode(red).decode()
    ways = [packed, f"data:image/png;base64,{packed}"]
    records = [
        {"id": i, "image": way, "conversations": turns("<image>", "A")}
        for i, way in enumerate(ways)
    ]
    assert colors(write(tmp_path / "data.jsonl", records)) == [(255, 0, 0)] * 2
    broken = [{"id": "x", "image": packed[:-3], "conversations": turns("<image>", "A")}]
    with pytest.raises(DataError, match=r"jsonl:1 \(id 'x'\): a picture in base64 .* is damaged"):
        colors(write(tmp_path / "broken.jsonl", broken))


def test_pictures_of_a_table_may_be_bytes(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"images": [{"bytes": png("red"), "path": None}], "conversations": turns("<image>", "A")},
        {"images": [{"bytes": None, "path": "blue.png"}], "conversations": turns("<image>", "A")},
        {"images": [], "conversations": turns("Q", "A")},
    ]
    (tmp_path / "blue.png").write_bytes(png("blue"))
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert colors(path) == [(255, 0, 0), (0, 0, 255)]
    assert open_source(SourceRecipe(path=str(path))).where(2) == f"{path}:3"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_any_file_may_hold_rows_of_a_table(tmp_path, suffix):
    rows = [
        {"image": "red.png", "question": "Which colour?", "answer": "Red."},
        {"image": "blue.png", "question": None, "answer": "Blue."},
    ]
    for color in ("red", "blue"):
        (tmp_path / f"{color}.png").write_bytes(png(color))
    path = write(tmp_path / f"data.{suffix}", rows)
    dataset = open_dataset([SourceRecipe(path=str(path))])
    said = [[message.text for message in dataset.sample(i).messages] for i in range(2)]
    assert said == [["Which colour?", "Red."], ["", "Blue."]]
    assert colors(path) == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "names",
    [["llava"], ["sharegpt"], ["openai_listed", "openai", "openai_named"], ["text"], ["columns"]],
)
def test_any_file_may_hold_conversations_of_any_format(tmp_path, suffix, names):
    """Tables too, which give every record and every part the keys of all others, with nulls."""
    (tmp_path / "a.png").write_bytes(png("red"))
    path = write(tmp_path / f"data.{suffix}", [SAME[name] for name in names])
    dataset = open_dataset([SourceRecipe(path=str(path))])
    for sample in map(dataset.sample, range(len(names))):
        assert (sample.id, sample.messages) == ("7", same_messages(tmp_path / "a.png"))
    assert dataset.words().tolist() == [signed_words(SAME[name]) for name in names]
    assert colors(path) == [(255, 0, 0)] * len(names)


def colors(path: Path | str) -> list[Any]:
    dataset = open_dataset([SourceRecipe(path=str(path))])
    out = []
    for i in range(len(dataset)):
        for part in dataset.sample(i).media:
            fetched = fetch(part.source)
            out.append(to_rgb(fetched.data, name=fetched.name).getpixel((0, 0)))
    return out


@pytest.mark.slow
def test_a_shard_holds_its_pictures(tmp_path):
    one = {"image": "coco/train2017/1.png", "conversations": turns("<image>", "A")}
    two = {"conversations": turns("<image> and <image>", "A")}
    named = {"image": "b/2.1.png", "conversations": turns("<image>", "A")}
    short = {"image": "1.PNG", "conversations": turns("<image>", "A")}
    alone = {"conversations": turns("Q", "A")}
    path = write_tar(
        tmp_path / "0.tar",
        {
            "a/1.json": json.dumps(one).encode(),
            "a/1.png": png("red"),
            "b/2.0.png": png("lime"),
            "b/2.1.png": png("blue"),
            "b/2.json": json.dumps(two).encode(),
            "b/3.json": json.dumps(named).encode(),
            "b/4.json": json.dumps(alone).encode(),
            "b/._4.json": b"macOS",
            "b/5.json": json.dumps(short).encode(),
            "b/5.0.png": png("blue"),
            "b/5.1.png": png("lime"),
            "c.png": png("red"),
            "c.txt": b"A caption.\n",
        },
    )
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert colors(path) == [red, green, blue, blue, green, red]
    dataset = open_dataset([SourceRecipe(path=str(path))])
    assert [dataset.sample(i).id for i in range(6)] == ["a/1", "b/2", "b/3", "b/4", "b/5", "c"]
    assert dataset.sample(5).messages[1].text == "A caption."
    assert dataset.sample(1).where == f"{path}:b/2"


@pytest.mark.slow
def test_pictures_of_a_shard_are_shown_once_whoever_names_them(tmp_path):
    content = [{"type": "image_url", "image_url": {"url": "1.png"}}, {"type": "text", "text": "Q"}]
    answer = {"role": "assistant", "content": "A"}
    inline = {"messages": [{"role": "user", "content": content}, answer]}
    content = [{"type": "image", "image_url": {"url": None}}, {"type": "text", "text": "Q"}]
    empty = {"messages": [{"role": "user", "content": content}, answer]}
    listed = {"images": ["of/another/name.png"], "conversations": turns("<image>", "A")}
    members = {}
    for number, record in enumerate((inline, empty, listed), 1):
        members |= {f"{number}.json": json.dumps(record).encode(), f"{number}.png": png("red")}
    assert colors(write_tar(tmp_path / "0.tar", members)) == [(255, 0, 0)] * 3


@pytest.mark.parametrize("names", [("1.json", "1.json"), ("1.jpg", "1.JPG")])
def test_two_members_of_one_name_are_refused(tmp_path, names):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as shard:
        for name in names:
            shard.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match=rf"two members of one name, '{names[0]}' and '{names[1]}'"):
        read(path)


def test_messages_do_not_list_a_whole_shard(tmp_path):
    members = {f"COCO.{i:03d}.jpg": b"" for i in range(50)}
    with pytest.raises(DataError, match=r"only 000.jpg, .*, 007.jpg and 42 more$"):
        read(write_tar(tmp_path / "0.tar", members))


def test_a_caption_that_is_no_text_is_named(tmp_path):
    path = write_tar(
        tmp_path / "0.tar", {"1.txt": "caf\xe9".encode("latin-1"), "1.png": png("red")}
    )
    with pytest.raises(DataError, match=r"0.tar:1: 1.txt is no UTF-8"):
        read(path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x1f\x8b\x08", "is gzip-compressed: unpack it first"),
        (b"PK\x03\x04...", "is a ZIP archive or a spreadsheet"),
        ("[]".encode("utf-16"), "is text in UTF-16: save it in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer: run `git lfs pull`"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.tar", "a.jsonl.gz"])
def test_files_that_are_something_else_are_named(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=expected):
        read(tmp_path / name)


def test_a_folder_of_images_that_is_not_there(tmp_path):
    path = write(tmp_path / "data.json", RECORDS)
    with pytest.raises(DataError, match=r"lost is no folder: expected that of the images"):
        open_source(SourceRecipe(path=str(path), images=str(tmp_path / "lost")))


def test_a_missing_member_of_a_shard_is_named(tmp_path):
    lost = {"id": "x", "image": "gone.png", "conversations": turns("<image>", "A")}
    members = {"1.json": json.dumps(lost).encode(), "2.png": png("red"), "3.json": b"{"}
    dataset = open_dataset([SourceRecipe(path=str(write_tar(tmp_path / "0.tar", members)))])
    with pytest.raises(
        DataError, match=r"0.tar:1 \(id 'x'\): the shard has no member 'gone.png'; .* json"
    ):
        dataset.sample(0)
    with pytest.raises(DataError, match=r"0.tar:2 has no member .json or .txt, only png"):
        dataset.sample(1)
    with pytest.raises(DataError, match=r"0.tar:3: no valid JSON"):
        dataset.sample(2)


def test_a_shard_that_is_cut_off_or_compressed_is_refused(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"1.json": b"{}", "1.png": png("red") * 20})
    whole = path.read_bytes()
    path.write_bytes(whole[:1700])
    with pytest.raises(DataError, match=r"0.tar was cut off in the middle of 1.png|no whole tar"):
        read(path)
    import gzip

    path.write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"0.tar is gzip-compressed: unpack it first"):
        read(path)
    path.write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match=r"0.tar is no whole tar archive: "):
        read(path)


def test_a_damaged_table_is_named(tmp_path):
    path = write(tmp_path / "data.parquet", RECORDS[1:2])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"data.parquet is no whole Parquet file"):
        read(path)


def test_a_table_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "data.parquet", RECORDS[1:2])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow: install lapilli\[data\]"):
        read(path)


def test_several_files_are_one_source(tmp_path):
    for i in range(11):
        write(tmp_path / f"part-{i:03d}.jsonl", [{"n": i}, {"n": i + 100}])
    expected = [{"n": n} for i in range(11) for n in (i, i + 100)]
    assert read(tmp_path / "part-*.jsonl") == expected
    assert read(tmp_path / "part-{000..010}.jsonl") == expected
    assert read(tmp_path / "part-00{2,1}.jsonl") == [{"n": n} for n in (2, 102, 1, 101)]
    source = open_source(SourceRecipe(path=str(tmp_path / "part-*.jsonl")))
    assert source.where(21) == f"{tmp_path / 'part-010.jsonl'}:3"
    assert source.media(21, "a.png") == tmp_path / "a.png"


def test_files_that_are_not_there_or_not_known(tmp_path):
    with pytest.raises(DataError, match=r"a.json is no file"):
        expand(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match=rf"{tmp_path} is a folder: name a \.json, .* file in it"):
        expand(str(tmp_path))
    with pytest.raises(DataError, match=r"x\*.tar is no file"):
        expand(str(tmp_path / "x*.tar"))
    (tmp_path / "a.xml").write_text("a,b")
    with pytest.raises(DataError, match=r"a.xml is no data file that is known"):
        open_source(SourceRecipe(path=str(tmp_path / "a.xml")))


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_keeps_no_records(tmp_path, kind):
    path = write(
        tmp_path / f"data.{kind}", [{"id": str(i), "text": "x" * 5000} for i in range(200)]
    )
    source = open_source(SourceRecipe(path=str(path)))
    assert len(source) == 200
    assert len(pickle.dumps(source)) < 60_000  # of a million bytes
    assert source.record(199)["id"] == "199"


@pytest.mark.parametrize("key", ["conversations", "messages", "conversation"])
def test_turns_of_a_shard_win_over_a_text_beside_them(tmp_path, key):
    record = {key: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    members = {"1.json": json.dumps(record).encode(), "1.txt": b"A caption."}
    dataset = open_dataset([SourceRecipe(path=str(write_tar(tmp_path / "0.tar", members)))])
    sample = dataset.sample(0)
    assert [message.text for message in sample.messages] == ["Q", "A"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(VALUES, st.booleans())
def test_json_is_read_as_pythons_own_reader_does(value, is_ascii):
    assert decode(json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "replace"), "x") == (
        json.loads(json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "replace"))
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a": 1},', r"Extra data at character 9, found ','"),
        (b'{"a": 1} {"b": 2}', "Extra data at character 10, found '{\"b\": 2}'"),
        (b'{"a": ', r"Expecting value at character 7, found the end"),
        (b"{'a': 1}", r"Expecting property name .* at character 2"),
        (b'{"a": "x\ny"}', r"Invalid control character at at character 9"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', r"the key 'b' comes twice in one object"),
        (b'{"a": NaN}', r"NaN is no JSON: write null"),
        (b'{"a": [-Infinity]}', r"-Infinity is no JSON"),
        (b'{"a": "\xe9"}', r"utf-8.*position 7"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"digits"),
        (b"[" * 99_999, r"recursion"),
        (b"", r"Expecting value at character 1, found the end"),
    ],
)
def test_invalid_json_is_refused_with_its_place(data, expected):
    with pytest.raises(DataError, match=rf"^d.jsonl:7: no valid JSON: .*{expected}"):
        decode(data, "d.jsonl:7")


def test_a_byte_order_mark_is_skipped():
    assert decode('{"a": "é"}'.encode("utf-8-sig"), "x") == {"a": "é"}


FOLDER = RecordFile(Path("data.json"), Path("/pictures"))
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
    assert FOLDER.media(0, name) == found


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

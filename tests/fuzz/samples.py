"""Rows of the table for training data: one small honest file of every format, damaged.

Every case is read as `lapilli data check --model`, `lapilli data show` and a run read it. A file
that cannot be opened, and a sample that cannot be learned from, is a DataError of one short line.
"""

import csv
import io
import json
import struct
import tarfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import PIL.Image

from lapilli.errors import DataError
from lapilli.train.data import Dataset, EncodedDataset, open_dataset, order_of
from lapilli.train.data.check import ImageChecker, check, rendered, tokenized
from lapilli.train.data.encoder import PlannedEncoder, plan_encoder
from lapilli.train.recipe import DataRecipe, RunRecipe, SourceRecipe
from tests.fuzz import honest
from tests.fuzz.damage import BOMBS, TEXTS, Damage, damaged_bytes, damaged_json, damaged_text
from tests.fuzz.kind import Kind

RECORDS: list[dict[str, Any]] = [
    {
        "id": "one",
        "image": "red.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A red square."},
        ],
    },
    {
        "id": 2,
        "system": "Be short.",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Which?"},
                    {"type": "image_url", "image_url": {"url": "red.png"}},
                ],
            },
            {"role": "assistant", "content": "The first."},
        ],
    },
    {"id": "three", "image": ["red.png", "blue.png"], "question": "Which?", "answer": 7},
    {"id": "four", "image": "blue.png", "caption": "Ein blaues Rechteck, größer als hoch."},
]
VALUES: tuple[object, ...] = (
    *("/dev/zero", "/etc/passwd", "../../../../etc/passwd", "data:image/png;base64,AAAA", "data:,"),
    *("file:///dev/zero", "file://[", "http://[", "http://127.0.0.1:1/a.png", "http://a:b/", "-"),
    *(
        "x" * 300,
        "a/" * 3000,
        "red.png\0",
        "\ud800.png",
        "<image>" * 5000,
        "<image>",
        "iVBORw0KGgo",
    ),
    *("iVBORw0KGgo" + "A" * 100_000, "/9j/" + "A" * 63, ["red.png"] * 2000, {"bytes": "x"}),
    *({"path": None}, {"path": ["x"]}, {"url": {"url": {}}}, [["red.png"]], [None, "red.png"]),
    *({"from": ["human"], "value": ["x"]}, {"from": [], "value": []}, "[[[[", "[" * 90_000, "[]"),
    *('[{"from": "human"', '{"a": 1}', "9" * 5000, [{"type": "image"}] * 3, [{"type": ["text"]}]),
    *(
        [{"type": "text", "text": [[1] * 9] * 999}],
        {"k" * 9000: 1},
        "human" * 1000,
        10**4000,
        1e400,
    ),
)


def sets(folder: Path) -> None:
    """Data sets of every format beside their pictures, and the checkpoint that learns them."""
    honest.original("llava-v1.5-tiny-pad")(folder)
    for name in ("red", "blue"):
        PIL.Image.new("RGB", (30, 20), name).save(folder / f"{name}.png")
    text = json.dumps(RECORDS, indent=1, ensure_ascii=False)
    (folder / "data.json").write_text(text, encoding="utf-8")
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "data.csv").write_bytes(_table(_ROWS, ","))
    (folder / "data.tsv").write_bytes(_table(_ROWS, "\t"))
    (folder / "data.tar").write_bytes(_shard((folder / "red.png").read_bytes()))
    (folder / "data.parquet").write_bytes(_parquet(_columns((folder / "red.png").read_bytes())))


_ROWS = [
    ["id", "image", "question", "answer"],
    ["a", "red.png", "What, really, is this?", "A red square."],
    ["b", "blue.png", 'Is it "blue"?', "Yes:\nit is."],
    ["c", "", "Größe?", "7"],
]


def _table(rows: list[list[str]], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def _shard(picture: bytes) -> bytes:
    out = io.BytesIO()
    members = {
        "a/1.json": json.dumps(RECORDS[0] | {"image": None}).encode(),
        "a/1.png": picture,
        "a/2.txt": b"a caption",
        "a/2.png": picture,
        "a/" + "n" * 150 + ".json": json.dumps(RECORDS[0] | {"image": "png"}).encode(),
        "a/" + "n" * 150 + ".png": picture,
        "größe.json": json.dumps({"id": 1, "conversations": _TURNS}).encode(),
    }
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return out.getvalue()


_TURNS = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]


def _columns(picture: bytes) -> dict[str, Any]:
    asked = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "Red."}]
    return {
        "id": ["a", "b", "c", "d"],
        "image": [{"bytes": picture, "path": None}, {"bytes": None, "path": "red.png"}, None, None],
        "conversations": [asked, asked, _TURNS, _TURNS],
        "split": ["train"] * 4,
    }


def _parquet(columns: Any, **options: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    parquet.write_table(table, out, **{"row_group_size": 3, **options})
    return out.getvalue()


@cache
def _planned(model: Path) -> PlannedEncoder:
    return plan_encoder(model)


def check_and_learn(name: str, folder: Path) -> None:
    """Check, show, and make rows; whatever is said is short, and can be printed."""
    planned = _planned(folder / "model")
    if name == "data.parquet":  # made with the honest folder, before memory is limited
        for make in _strange_tables():
            make()
    dataset = open_dataset([SourceRecipe(path=str(folder / name))])
    for encoder in (None, planned.encoder):
        report = check(dataset, encoder=encoder, template=planned.template, max_length=256)
        report.to_text().encode()
        json.dumps(report.to_dict())
        for finding in report.findings:
            _say(str(finding))
    data, run = DataRecipe(group="modality"), RunRecipe(batch_size=2)
    order_of(dataset, data, run)
    for index in range(min(len(dataset), 20)):
        _learn(dataset, index, planned)
    for on_bad in ("error", "skip"):
        EncodedDataset(
            dataset, planned.encoder, on_bad_sample=on_bad, words=dataset.words()
        ).sample(0)


def _learn(dataset: Dataset, index: int, planned: PlannedEncoder) -> None:
    try:
        planned.encoder.encode(dataset.sample(index))
        sample = dataset.sample(index)
        rendered(sample, planned.template)
        tokenized(sample, planned.encoder, ImageChecker())
    except DataError as error:
        _say(str(error))


def _say(text: str) -> None:
    assert len(text) <= 2000, f"{len(text)} characters: {text[:100]}"


def _changed_record(record: object, random: Random) -> object:
    """Another value under a key of the record, of a turn or of a part."""
    places = [record] if isinstance(record, dict) else []
    for holder in places:
        inner = [value for value in holder.values() if isinstance(value, list)]
        places += [value for values in inner for value in values if isinstance(value, dict)]
    if not places:
        return record
    holder = random.choice(places)
    key = random.choice((*holder, "image", "images", "id", "question", "conversations"))
    holder[key] = random.choice(VALUES)
    return record


def damaged_records(data: bytes, random: Random) -> bytes:
    """An array in which one record has another value."""
    records = json.loads(data)
    at = random.randrange(len(records))
    records[at] = _changed_record(records[at], random)
    return json.dumps(records, indent=random.choice((None, 1))).encode()


def _on_a_line(damage: Damage, data: bytes, random: Random) -> bytes:
    lines = data.splitlines()
    at = random.randrange(len(lines))
    lines[at] = damage(lines[at], random)
    return b"\n".join(lines) + b"\n"


def _record_of_a_line(data: bytes, random: Random) -> bytes:
    return json.dumps(_changed_record(json.loads(data), random)).encode()


def nested(data: bytes, random: Random) -> bytes:
    """Lists or objects in each other, not so deep that the parser gives up."""
    depth = random.choice((99, 101, 300, 700, 900, 990))
    deep: Any = random.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    key = random.choice(("id", "image", "conversations", "caption", "system", "other", "question"))
    many = "[" + "[]," * random.choice((10**5, 4 * 10**6)) + "1]"
    value = random.choice((deep, deep, many))
    chosen = f'{{"caption": "x", "{key}": {value}}}'.encode()
    return b"[" + chosen + b"]" if data.startswith(b"[") else chosen + b"\n"


def damaged_table(data: bytes, random: Random) -> bytes:
    """Rows with other cells, more of them, fewer; quotes that nobody closes; other ends of line."""
    delimiter = "\t" if b"\t" in data else ","
    rows = [list(row) for row in _ROWS]
    row = random.choice(rows)
    texts = [text for text in (*TEXTS, *VALUES) if isinstance(text, str)]
    for _ in range(random.choice((1, 1, 3))):
        row[random.randrange(len(row))] = random.choice(texts)
    kind = random.randrange(8)
    if kind == 0:
        row += ["x"] * random.choice((1, 100_000))
    elif kind == 1:
        rows = [[], *rows, []]
    elif kind == 2:
        rows[0] = [random.choice(texts)[:5000] for _ in range(random.choice((1, 4, 500)))]
    changed = _table(rows, delimiter)
    if kind == 3:
        changed = changed.replace(b"\r\n", random.choice((b"\r", b"\n\r", b"\0", b"\n\n\n")))
    elif kind == 4:
        at = random.randrange(len(changed))
        changed = changed[:at] + b'"' + changed[at:]
    return changed


def damaged_header(data: bytes, random: Random) -> bytes:
    """One header of a tar archive with other fields, its checksum right."""
    with tarfile.open(fileobj=io.BytesIO(data)) as shard:
        places = [info.offset for info in shard]
    places += [place - 512 for place in places if place >= 512]
    at = random.choice(places)
    block = bytearray(data[at : at + 512])
    for _ in range(random.choice((1, 1, 2))):
        field, values = random.choice(_FIELDS)
        value = random.choice(values)
        block[field : field + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


_SIZES = (
    *(b"77777777777\0", b"00000000000\0", b"00000000001\0", b"-0000000001\0", b"99999999999\0"),
    *(b"\x80" + (2**60).to_bytes(11), b"\x80" + b"\xff" * 11, b"\xff" * 12),
    *(b"\xff" * 10 + b"\xfe\0", b"\xff" * 11 + b"\xf0", b" " * 12, b"x" * 12),
)
_FIELDS: tuple[tuple[int, tuple[bytes, ...]], ...] = (
    (0, (b"/etc/passwd\0", b"../../x.json\0", b"\xff\xfe.json\0", b"\0" * 100, b"x" * 100)),
    (
        0,
        (
            b".json\0",
            b"a/1.png\0",
            b"a/1.a.b.c.png\0",
            b"a\nb.json\0",
            b"///.\0",
            b"\xed\xa0\x80.txt\0",
        ),
    ),
    (124, _SIZES),
    (156, tuple(bytes([code]) for code in b"01234567SLKDVNXxgAZ\0\xff")),
    (157, (b"/etc/passwd\0", b"a/1.json\0", b"\xff" * 100)),
    (257, (b"ustar\00000", b"ustar  \0", b"\0" * 8, b"\xff" * 8)),
    (345, (b"/" * 155, b"..\0", b"\xff" * 155)),
    (386, tuple(a + b for a in _SIZES for b in _SIZES)),
    (482, (b"\1" + _SIZES[0], b"\1" + _SIZES[5])),
)
_PAX = (
    *((b"size", value) for value in (b"-1", b"9" * 30, b"9" * 5000, b"x", b"1e9", b"")),
    *((b"path", value) for value in (b"", b"\xff", b"../x.json", b"x" * 10**6, b"a\0b.json")),
    *((b"GNU.sparse.major", value) for value in (b"1", b"9" * 5000, b"x")),
    *((b"GNU.sparse.size", value) for value in (b"9" * 20, b"-1", b"9" * 5000, b"x")),
    *((b"GNU.sparse.map", value) for value in (b"0,1,2,3", b"x", b"0," + b"9" * 5000, b"-1,-1")),
    *((b"hdrcharset", b"BINARY"), (b"mtime", b"nan"), (b"uid", b"9" * 5000), (b"a" * 9000, b"b")),
)


def damaged_pax(data: bytes, random: Random) -> bytes:
    """An extended header in front of the archive, or of the rest of it."""
    body = b""
    for _ in range(random.choice((1, 1, 2, 3))):
        key, value = random.choice(_PAX)
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        shown = random.choice((length, length, length, 0, -1, 10**9, 10**30))
        body += b"%d %s=%s\n" % (shown, key, value)
    header = tarfile.TarInfo("pax")
    header.type, header.size = random.choice((b"x", b"x", b"g", b"X")), len(body)
    with tarfile.open(fileobj=io.BytesIO(data)) as shard:
        at = random.choice([info.offset for info in shard])
    padded = body + b"\0" * (-len(body) % 512)
    return data[:at] + header.tobuf(tarfile.USTAR_FORMAT) + padded + data[at:]


def damaged_footer(data: bytes, random: Random) -> bytes:
    """Another directory of a Parquet file, or another length of it."""
    (length,) = struct.unpack("<I", data[-8:-4])
    body, footer = data[: -8 - length], data[-8 - length : -8]
    if random.random() < 0.2:
        length = random.choice((0, 1, length - 1, length + 1, 2**31 - 1, 2**32 - 1, len(data)))
        return body + footer + struct.pack("<I", length) + data[-4:]
    changed = bytearray(footer)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(changed))
        kind = random.randrange(3)
        if kind == 0:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            changed[at] = random.choice((0, 1, 2, 0x7F, 0x80, 0xFF))
        else:  # a long number in the place of a short one
            changed[at : at + 1] = b"\xfe" * random.choice((4, 8, 9)) + b"\1"
    return body + bytes(changed) + struct.pack("<I", len(changed)) + data[-4:]


def damaged_pages(data: bytes, random: Random) -> bytes:
    """Flips and numbers in what stands before the directory."""
    (length,) = struct.unpack("<I", data[-8:-4])
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(4, len(data) - 8 - length)
        changed[at] = random.choice((0, 0x7F, 0x80, 0xFF, random.randrange(256)))
    return bytes(changed)


def strange_parquet(_: bytes, random: Random) -> bytes:
    """A whole Parquet file that holds what no sample is."""
    return random.choice(_strange_tables())()


@cache
def _strange_tables() -> list[Callable[[], bytes]]:
    import decimal

    import pyarrow as pa

    def column(values: pa.Array, name: str = "caption") -> Callable[[], bytes]:
        return cache(lambda: _parquet({name: values}))

    far = pa.array([2**62, -(2**62), 0], pa.int64())
    raw = pa.py_buffer(b"\xff\xfe\xed\xa0\x80abc")
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(struct.pack("<3i", 0, 5, 8)), raw]
    )
    turns = pa.array([[("from", "human")], [("value", "x")]], pa.map_(pa.string(), pa.string()))
    typed = [
        *(far, far.cast(pa.timestamp("us")), pa.array([2**62], pa.timestamp("ns")), broken, turns),
        *(pa.array([2**40] * 3, pa.timestamp("s")), pa.array([2**62], pa.duration("us"))),
        *(pa.array([2**30], pa.date32()), pa.array([2**62 // 86400000 * 86400000], pa.date64())),
        *(pa.array([1], pa.timestamp("us", tz="No/Where")), pa.array([1], pa.time64("ns"))),
        *(pa.array([decimal.Decimal("1.5")]), pa.array([b"\xff"]), pa.array([True, None])),
        *(pa.array([float("nan"), 1e300]), pa.nulls(5), pa.array(["x"]).dictionary_encode()),
        *(pa.array([[1, 2]], pa.list_(pa.int8(), 2))),
        *(pa.array([[]], pa.list_(pa.null())), pa.array(["<image>" * 10**5]), pa.array([[None]])),
        pa.array(["x", "y"], pa.large_string()),
    ]
    names = ("caption", "conversations", "image", "id", "system", "question")
    found = [column(values, name) for values in typed for name in names]
    # What a few bytes become: values that come again and again, long ones that shrink well.
    long = pa.array(["a" * 30_000_000])
    again = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), long)
    bombs: list[Callable[[], bytes]] = [
        cache(lambda: _parquet({"caption": long}, compression="zstd")),
        cache(lambda: _parquet({"caption": again}, compression="zstd", row_group_size=10**6)),
        cache(lambda: _parquet({"caption": pa.nulls(10**8)}, row_group_size=10**9)),
        cache(lambda: _parquet({"caption": pa.array([[None] * 10**6] * 50)}, row_group_size=99)),
        cache(lambda: _parquet({f"c{i}": ["x"] for i in range(3000)})),
        cache(
            lambda: _parquet(
                pa.table({"caption": ["x"]}).replace_schema_metadata({"a": "b" * 9**7})
            )
        ),
        cache(lambda: _parquet(pa.table([["x"], ["y"]], names=["caption", "caption"]))),
        cache(lambda: _parquet(pa.table([["x"], ["y"]], names=["", "caption"]))),
        cache(lambda: _parquet(pa.table({"caption": pa.array([], pa.string())}))),
        cache(lambda: _parquet(pa.table({"caption": ["x"]}).select([]))),
    ]
    return [*found, *bombs * 3]


TEXT: tuple[Damage, ...] = (damaged_text, damaged_bytes, nested)
ARRAY = (damaged_records,) * 4 + (damaged_json,) * 3 + TEXT
LINES = (
    *(partial(_on_a_line, damage) for damage in (_record_of_a_line,) * 4 + (damaged_json,) * 3),
    *(partial(_on_a_line, damage) for damage in (damaged_text, damaged_bytes)),
    *TEXT,
)
TABLE = (damaged_table,) * 5 + (damaged_bytes, damaged_text)
TAR: tuple[Damage, ...] = (damaged_header,) * 4 + (damaged_pax,) * 3 + (damaged_bytes,)
PARQUET: tuple[Damage, ...] = (
    *(strange_parquet, damaged_footer, damaged_footer, damaged_pages, damaged_pages, damaged_bytes),
    lambda _, random: random.choice(BOMBS),
)
ERRORS = (DataError,)
KINDS: tuple[Kind, ...] = tuple(
    Kind(
        make=sets,
        file=name,
        damages=damages,
        read=partial(check_and_learn, "data.json" if name == "red.png" else name),
        errors=ERRORS,
        share=share,
    )
    for name, damages, share in (
        ("data.json", ARRAY, 6),
        ("data.jsonl", LINES, 6),
        ("data.csv", TABLE, 3),
        ("data.tsv", TABLE, 2),
        ("data.tar", TAR, 6),
        ("data.parquet", PARQUET, 8),
        ("red.png", (damaged_bytes,), 1),
    )
)

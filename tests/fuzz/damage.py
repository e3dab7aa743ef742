"""Ways to damage the content of a file: bytes and a random source in, other bytes out.

A damage of the content is `(bytes, Random) -> bytes`; a damage of the place is `(Path, Random)`: it
puts something else where the file was.
"""

import io
import json
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from random import Random

Damage = Callable[[bytes, Random], bytes]

DEEP = 100_000
DIGITS = "9" * 5000
BOMBS = (
    b"[" * DEEP,
    b'{"a":' * DEEP,
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b'{"a": ' + DIGITS.encode() + b"}",
    b'{"a": 1e' + DIGITS.encode() + b"}",
    b"null",
    b"[]",
    b"{}",
    b'"text"',
    b"1",
    b"",
    b" \n",
    b"\0" * 100,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"GGUF\x03\0\0\0" + b"\0" * 64,
    b"<!DOCTYPE html><html></html>",
)
NUMBERS = (
    *(0, -1, 1, 2, 3, 5, 7, 15, 16, 64, 100, 1000, 65_536, 10**6, 10**9, -(10**9)),
    *(2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**18, 10**30, 10**4000),
    *(0.5, -0.5, 1.5, 1e-300, 1e300, -1e300, 1e30, float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", " ", "x", "default", "none", "null", "0", "1e9", "linear", "llama", "llava", "gelu"),
    *("x" * 100_000, "/", ".", "..", "~", "~nobody-here/x", "../../etc/passwd", "/dev/zero"),
    *("\0", "a\0b", "\ud800", "\u2028", "\x1b[31m", "a\nb", "é" * 300, "/" * 5000, "a/b/c", "a//b"),
    *(
        "(",
        "[",
        "(a+)+$",
        "(?P<a",
        "\\",
        "{{",
        "{{ 1/0 }}",
        "{% for",
        "%s%n",
        "mlp9999999999x_gelu",
    ),
    *(
        "resampler999999999",
        "pool99x99_mlp2x_gelu",
        "mlp" + DIGITS + "x_gelu",
        "[[1, 2]",
        "[" * 5000,
    ),
    *("[[336, 672]]", "[[1000000000, 1000000000]]", "[[-1, 0]]", "9" * 10_000, "<s>", "<unk>"),
    *("F32", "F64", "I64", "BOOL", "F8_E4M3", "U64", "C64", "float16", "int8", "bfloat16", "awq"),
)
OTHERS: tuple[object, ...] = (
    *(None, True, False, [], {}, [[]], [None], [1, 2, 3], ["x"], {"a": 1}, [{}], [[1, 2], [3, 4]]),
    *(
        [0] * 1000,
        [-1, -1],
        [1e9, 1e9],
        [float("nan")] * 3,
        [0, 0, 0],
        {"content": 1},
        {"type": []},
    ),
)


def damaged_json(data: bytes, random: Random) -> bytes:
    """A JSON text with one to three of its values replaced, removed, renamed or moved."""
    value = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _change(value, random)
    return json.dumps(value).encode()


def _change(value: object, random: Random) -> object:
    places = list(_places(value))
    if not places or random.random() < 0.01:
        return _nasty(random)
    # Few places are at the top and many in a vocabulary: both kinds are as likely.
    shallow = [place for place in places if place[2] < 2]
    holder, key, _ = random.choice(shallow if shallow and random.random() < 0.6 else places)
    kind = random.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = holder.pop(key)
    elif kind == 2:
        other, name, _ = random.choice(places)
        holder[key] = deepcopy(other[name])
    elif kind == 3:
        holder[key] = [holder[key]]
    elif kind == 4 and isinstance(holder[key], int | float | str):
        holder[key] = _near(holder[key], random)
    else:
        holder[key] = _nasty(random)
    return value


def _near(value: object, random: Random) -> object:
    """A value of the same type that is not much different."""
    if isinstance(value, str):
        at = random.randrange(len(value) + 1)
        return value[:at] + random.choice(("", "0", "x", "-", "\n", "é")) + value[at + 1 :]
    if isinstance(value, bool):
        return not value
    return random.choice((value + 1, value - 1, -value, value * 2, value // 2 if value else 1))


def _nasty(random: Random) -> object:
    return deepcopy(random.choice(random.choice((NUMBERS, NUMBERS, TEXTS, OTHERS))))


def _places(value: object, depth: int = 0) -> list[tuple[object, object, int]]:
    """(holder, key, depth) of every value inside."""
    found: list[tuple[object, object, int]] = []
    pairs = list(value.items()) if isinstance(value, dict) else []
    pairs = list(enumerate(value)) if isinstance(value, list) else pairs
    for key, inner in pairs:
        found.append((value, key, depth))
        found += _places(inner, depth + 1)
    return found


def damaged_text(data: bytes, random: Random) -> bytes:
    """Another encoding, a cut, doubled keys, deep nests: what an editor or a download does."""
    kind = random.randrange(9)
    if kind == 0:
        return b"\xef\xbb\xbf" + data
    if kind == 1:
        return data.decode("utf-8", "replace").encode(random.choice(("utf-16", "utf-32", "utf-7")))
    if kind == 2:
        return data[: random.randrange(len(data) + 1)]
    if kind == 3:
        return data + random.choice((b"}", b"\0", b"x", data, b"\xff"))
    if kind == 4:
        return random.choice(BOMBS)
    if kind == 5:  # the first key twice, the second time with another value
        bomb = random.choice((b"1", b"null", b"[]", b"[" * DEEP + b"]" * DEEP, DIGITS.encode()))
        key = data.partition(b'"')[2].partition(b'"')[0]
        return data.rstrip().removesuffix(b"}") + b', "' + key + b'": ' + bomb + b"}"
    if kind == 6:
        return data.replace(b"\n", random.choice((b"\r", b"\xe2\x80\xa8", b"\0", b"\x0b")))
    if kind == 7:
        return data.replace(b'"', b"'", random.randrange(1, 9))
    return damaged_bytes(data, random)


def damaged_bytes(data: bytes, random: Random) -> bytes:
    """Some bytes flipped, cut out, put in, or the end cut off."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        at = random.randrange(len(changed) + 1)
        kind = random.randrange(5)
        if kind == 0:
            del changed[at : at + random.choice((1, 2, 8, 100))]
        elif kind == 1:
            changed[at:at] = random.randbytes(random.choice((1, 2, 8, 100)))
        elif kind == 2 and random.random() < 0.3:
            del changed[at:]
        else:
            changed[at : at + 1] = bytes(
                [random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))]
            )
    return bytes(changed)


def damaged_safetensors(data: bytes, random: Random) -> bytes:
    """Another length, another header, or a file cut short."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = random.randrange(8)
    if kind == 0:
        wrong = random.choice((0, 1, 7, length - 1, length + 1, 10**8, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + header + body
    if kind == 1:
        return data[
            : random.choice((0, 4, 8, 9, 8 + length, len(data) - 1, random.randrange(len(data))))
        ]
    if kind == 2:
        header = damaged_text(header, random)
    elif kind == 3:
        return data + b"\0" * random.choice((1, 1000))
    elif kind == 4:
        header = json.dumps(_moved(json.loads(header), random)).encode()
    else:
        header = damaged_json(header, random)
    return struct.pack("<Q", len(header)) + header + body


def _moved(header: dict[str, dict[str, list[int]]], random: Random) -> object:
    """Shapes, types and places of one tensor as another's, or stretched."""
    names = [name for name in header if name != "__metadata__"]
    one, other = header[random.choice(names)], header[random.choice(names)]
    kind = random.randrange(6)
    if kind == 0:
        one["data_offsets"] = other["data_offsets"]
    elif kind == 1:
        one["shape"], one["data_offsets"] = other["shape"], other["data_offsets"]
    elif kind == 2:
        one["shape"] = one["shape"][::-1]
    elif kind == 3:
        one["shape"] = random.choice(
            ([*one["shape"], 1], [1] * 100, [0, 2**62, 2**62], [-1, -1], [0])
        )
    elif kind == 4:
        one["dtype"], one["shape"] = "U8", [one["data_offsets"][1] - one["data_offsets"][0]]
    else:
        begin, end = one["data_offsets"]
        one["data_offsets"] = random.choice(
            (
                [end, begin],
                [begin - 1, end - 1],
                [begin + 2**63, end + 2**63],
                [float(begin), float(end)],
                [True, end],
                ["0", "4"],
                [begin, end, end],
                [begin],
            )
        )
    return header


def damaged_pickle(data: bytes, random: Random) -> bytes:
    """The archive of torch.save with another pickle, other sizes, compressed, or cut."""
    kind = random.randrange(6)
    if kind == 0:
        return damaged_bytes(data, random)
    if kind == 1:
        return _rezipped(data, random, compression=zipfile.ZIP_DEFLATED)
    if kind == 2:
        return _rezipped(data, random, change=damaged_bytes)
    if kind == 3:
        return _rezipped(data, random, change=_other_numbers)
    return random.choice(_strange_files())


def _rezipped(
    data: bytes,
    random: Random,
    *,
    compression: int = zipfile.ZIP_STORED,
    change: Damage | None = None,
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl") and change is not None:
                content = change(content, random)
            elif change is None and random.random() < 0.02:
                content += b"\0" * random.choice((1, 10**6, 64 * 10**6))
            new.writestr(name, content)
    return out.getvalue()


def _other_numbers(content: bytes, random: Random) -> bytes:
    """A pickle in which some of the small numbers (shapes, strides, sizes) are others."""
    changed = bytearray(content)
    places = [at for op, _, at in pickletools.genops(content) if op.name in ("BININT1", "BININT2")]
    for at in random.sample(places, k=min(len(places), random.choice((1, 2, 5)))):
        changed[at + 1] = random.choice((0, 1, 255, random.randrange(256)))
    return bytes(changed)


@cache
def _strange_files() -> tuple[bytes, ...]:
    """Files of what torch.save also writes and no weight is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(_written(_strange_objects()))


def _strange_objects() -> list[object]:
    import torch
    from torch import nn

    weight = torch.ones(4, 4)
    cases: list[object] = [
        *(weight, [weight], {"a": {"b": weight}}, {1: weight}, {"a": None}, {}, None, {"": weight}),
        {"a": weight.to_sparse()},
        {"a": weight.to_sparse_csr()},
        {"a": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)},
        {"a": torch.empty(2**40, device="meta")},
        {"a": torch.nested.nested_tensor([weight, weight])},
        {"a": weight.to(torch.complex64)},
        {"a": weight[:1, :1].expand(2**20, 2**20)},
        {"a": torch.ones(1).as_strided((2**20, 2**20), (0, 0))},
        {"a": weight.to(torch.float8_e4m3fn)},
        {"a": nn.Parameter(weight)},
        {"a": weight.conj()},
        {"a": torch._neg_view(weight)},
        {"a": torch.ones(2, dtype=torch.bool)},
        {"a": weight.half().t()},
        {"state_dict": {"a": weight}, "epoch": 1},
    ]
    named = [case["a"] for case in cases if isinstance(case, dict) and "a" in case]
    return cases + [{"model.norm.weight": a, "transformer.norm_f.weight": a} for a in named]


def _written(cases: list[object]) -> list[bytes]:
    import torch

    found = []
    for case in cases:
        for zipped in (True, False):
            out = io.BytesIO()
            try:
                torch.save(case, out, _use_new_zipfile_serialization=zipped)
            except (RuntimeError, NotImplementedError, AttributeError, pickle.PicklingError):
                continue  # not every kind can be written in the old format
            found.append(out.getvalue())
    out = io.BytesIO()
    pickle.dump({"a": os.system}, out)
    return [*found, out.getvalue(), pickle.dumps({"a": 1}), pickle.dumps([[]] * 3)]


def damaged_fields(data: bytes, random: Random) -> bytes:
    """A protocol buffer with some of its top fields left out, doubled, retagged or replaced."""
    fields = list(_fields(data))
    for _ in range(random.choice((1, 1, 3))):
        at = random.randrange(len(fields))
        number, value = fields[at]
        kind = random.randrange(5)
        if kind == 0:
            del fields[at : at + random.choice((1, 1, 10, len(fields)))]
        elif kind == 1:
            fields.insert(at, (number, damaged_bytes(value, random)))
        elif kind == 2:
            fields[at] = (random.choice((1, 2, 3, 5, 1000)), value)
        elif kind == 3:
            fields[at] = (number, damaged_bytes(value, random))
        else:  # a setting of the trainer or of the normalizer
            inner = _varint(random.randrange(1, 50) << 3) + _varint(
                random.choice((0, 1, 2**31, 2**63))
            )
            fields.append((random.choice((2, 3)), inner))
        if not fields:
            break
    return b"".join(_varint(number << 3 | 2) + _varint(len(v)) + v for number, v in fields)


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    """The top fields of a SentencePiece model, all of which are messages."""
    found, at = [], 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        size, at = _read_varint(data, at)
        found.append((tag >> 3, data[at : at + size]))
        at += size
    return found


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


JSON: tuple[Damage, ...] = (damaged_json,) * 5 + (damaged_text,)
SAFETENSORS: tuple[Damage, ...] = (damaged_safetensors,) * 5 + (damaged_bytes,)
PICKLE: tuple[Damage, ...] = (damaged_pickle,)
PROTOBUF: tuple[Damage, ...] = (damaged_fields, damaged_fields, damaged_bytes)


def _sparse(path: Path, random: Random) -> None:
    with path.open("wb") as file:
        file.truncate(random.choice((10**10, 10**12)))


def _linked(target: str, path: Path, _: Random) -> None:
    path.symlink_to(target if target else path.name)


PLACES: tuple[Callable[[Path, Random], None], ...] = (
    lambda path, _: None,  # nothing there
    lambda path, _: path.mkdir(),
    lambda path, _: os.mkfifo(path),
    lambda path, _: path.touch(mode=0),
    _sparse,
    partial(_linked, ""),
    *(partial(_linked, device) for device in ("/dev/zero", "/dev/null", "/dev/tty", "/nowhere")),
    partial(_linked, "/proc/self/mem"),
)
"""What stands where the file was, which is gone already."""

"""Sizes of the tensors of a GGUF file, whatever their types: those of ik_llama.cpp are known to
no package.

    magic, version, tensors, keys | keys and values | name, shape, type, place of each tensor | data

A tensor ends where the next one begins, up to 31 bytes of padding. Knows the header alone; imports
nothing that only some environments have.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a file: how many weights, in how many bytes, in how many dimensions."""

    weights: int
    nbytes: int
    dimensions: int


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Return the tensors of a GGUF file by name.

    Raises:
        SystemExit: the file is no GGUF of version 2 or 3.
    """
    with path.open("rb") as file:
        magic, version, count, keys = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF" or version not in (2, 3):
            raise SystemExit(f"{path} is no GGUF file of version 2 or 3: {magic!r}, {version}")
        facts = {}
        for _ in range(keys):
            key = _string(file)
            facts[key] = _value(file, _number(file, "I"))
        places = []
        for _ in range(count):
            name = _string(file)
            shape = [_number(file, "Q") for _ in range(_number(file, "I"))]
            _number(file, "I")  # the type
            places.append((_number(file, "Q"), name, shape))
        alignment = int(facts.get("general.alignment") or 32)
        start = -(-file.tell() // alignment) * alignment
    places.sort()
    ends = [place for place, _, _ in places[1:]] + [path.stat().st_size - start]
    return {
        name: Stored(math.prod(shape), end - place, len(shape))
        for (place, name, shape), end in zip(places, ends, strict=True)
    }


def weight_bytes(path: Path) -> int:
    """Return the bytes that one decoded token reads: all matrices but the embeddings."""
    return sum(
        tensor.nbytes
        for name, tensor in stored_tensors(path).items()
        if tensor.dimensions > 1 and name != "token_embd.weight"
    )


def _number(file: BinaryIO, code: str) -> int:
    """Return the next number; floats and booleans are of no use here but come along."""
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "Q")).decode()


def _value(file: BinaryIO, kind: int) -> int | str | None:
    """Read a value and return it, None for a list."""
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _number(file, _NUMBERS[kind])
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner in _NUMBERS:
        file.seek(count * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
    else:
        for _ in range(count):
            _value(file, inner)
    return None

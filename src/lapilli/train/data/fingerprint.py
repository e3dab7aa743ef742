"""What tells one file of samples from another, wherever it lies; knows bytes, no records.

up to whole_bytes     sha256 of the content, as sha256sum prints it
larger                sha256 of its size and of pieces spread evenly over it, 16 MiB in all
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final

_PIECE: Final = 1 << 18
_PIECES: Final = 64
SAMPLED_BYTES: Final = _PIECE * _PIECES
"""What is read of a large file; those that are not larger are read whole."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of samples.

    Attributes:
        name: without its folder, which says something about one machine alone.
        num_bytes: its size.
        digest: "sha256:..." of its content, or "in pieces, sha256:...".
    """

    name: str
    num_bytes: int
    digest: str


def data_file(path: Path, *, whole_bytes: int = SAMPLED_BYTES) -> DataFile:
    """Name, size and digest of a file; neither its folder nor its time counts.

    Args:
        path: of the file.
        whole_bytes: files up to this size are read whole. In larger ones a change that keeps the
            size and lies between the pieces is not seen.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= max(whole_bytes, SAMPLED_BYTES):
            return DataFile(path.name, size, _sha256(iter(lambda: file.read(_PIECE), b"")))
        return DataFile(path.name, size, f"in pieces, {_sha256(_sample(file, size))}")


def together(files: Sequence[DataFile]) -> str:
    """One digest of several files, in their order."""
    return _sha256(["\n".join(file.digest for file in files).encode()])


def _sample(file: BufferedReader, size: int) -> Iterator[bytes]:
    """The size, and pieces from the first byte to the last."""
    yield str(size).encode()
    for number in range(_PIECES):
        file.seek(number * (size - _PIECE) // (_PIECES - 1))
        yield file.read(_PIECE)


def _sha256(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"

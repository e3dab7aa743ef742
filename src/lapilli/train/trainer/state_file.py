"""One file of a run's state: written whole or not at all, used only if it is what was written.

    content -> views cut out of their files -> digest -> NAME.part -> flushed -> renamed to NAME
    NAME -> stored, not compressed, checksums right -> tensors and plain values -> digest right

Knows files and nested containers; knows no run.
"""

import hashlib
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import torch

from lapilli.shapes import Tensor
from lapilli.train.trainer.contract import TrainingError

_DIGEST = "digest"


def write_whole(content: Any, path: Path) -> None:  # noqa: ANN401  whatever torch.save takes
    """torch.save that replaces `path` at once, when every byte is on the disk.

    A tensor takes its own bytes: of a view of a mapped checkpoint torch.save would write the whole
    checkpoint.

    Raises:
        TrainingError: the disk does not take it; `path` is as it was.
    """
    staged = path.with_suffix(".part")
    try:
        with staged.open("wb") as file:
            torch.save(_cut_out(content), file)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        if _disk_error(error) is None:
            raise
        staged.unlink(missing_ok=True)
        leaves = (leaf for _, leaf in _leaves(content))
        needed = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        raise TrainingError(_no_room(path, needed, _disk_error(error))) from error


def write_state_file(content: Mapping[str, Any], path: Path) -> None:
    """The same with a digest of the content, which `read_state_file` compares.

    Raises:
        TrainingError: the disk does not take it; `path` is as it was.
    """
    write_whole({**content, _DIGEST: content_digest(content)}, path)


def read_state_file(path: Path) -> dict[str, Any]:
    """Read what `write_state_file` has written; files without a digest are of earlier versions.

    Raises:
        TrainingError: the file is damaged, is no state, or was changed since.
    """
    if not path.is_file():
        raise damaged(path, "it is no file")
    size = path.stat().st_size
    try:
        content = _loaded(path, size)
        digest = content.pop(_DIGEST, None)
        found = content_digest(content, most=size)
    except Exception as error:  # every parser behind torch.load has errors of its own
        raise damaged(path, first_line(error)) from error
    if digest is not None and digest != found:
        raise damaged(path, "its content is not what was saved")
    return content


def _loaded(path: Path, size: int) -> dict[str, Any]:
    with path.open("rb") as file:
        check_archive(file, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about files that are no state
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}")
    return content


def damaged(path: Path, what: str) -> TrainingError:
    """The error that says what is wrong with a saved state, and what to do."""
    return TrainingError(
        f"{path} is damaged or no state of a run ({what}): put back a copy of it, or train into "
        "another folder"
    )


def first_line(error: BaseException) -> str:
    """What a parser said, short enough for one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def check_archive(file: BufferedReader | BytesIO, size: int) -> None:
    """Check what torch.save has written, without reading any tensor.

    torch.load neither compares checksums nor asks how much a compressed entry will become.

    Args:
        file: that can be sought.
        size: its bytes.

    Raises:
        zipfile.BadZipFile: no archive, a wrong checksum, or entries larger than the file.
        OSError, ValueError, RuntimeError, NotImplementedError: of a damaged directory.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("compressed entries")
        if sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("entries larger than the file")
        wrong = archive.testzip()
    if wrong is not None:
        raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")


def content_digest(content: object, *, most: int | None = None) -> str:
    """SHA-256 of nested containers of tensors and plain values.

    Args:
        content: dictionaries, lists, tuples; their order counts.
        most: bytes and values that it may have; a damaged file can name one tensor many times.

    Raises:
        ValueError: it has more.
    """
    digest = hashlib.sha256()
    left = most
    for place, leaf in _leaves(content):
        digest.update(f"{place} ".encode(errors="surrogatepass"))
        if left is not None:
            left -= leaf.nbytes if isinstance(leaf, Tensor) else 1
            if left < 0:
                raise ValueError("more values than the file can have")
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {list(leaf.shape)} ".encode())
            digest.update(
                leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )
        else:
            digest.update(f"{type(leaf).__name__} {leaf!r} ".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _leaves(content: object, place: str = "") -> Iterator[tuple[str, Any]]:
    """What is no container, with where it is; an empty container is a leaf."""
    inside: list[tuple[object, object]] = []
    if isinstance(content, Mapping):
        inside = list(content.items())
    elif isinstance(content, (list, tuple)):
        inside = list(enumerate(content))
    if not inside:
        yield place, content
    for key, value in inside:
        yield from _leaves(value, f"{place}/{key!r}")


def _cut_out(content: Any) -> Any:  # noqa: ANN401  nested containers
    """The same content; tensors on the CPU have a storage of their own bytes and no more."""
    if isinstance(content, Tensor):
        return _alone(content)
    if isinstance(content, Mapping):
        return {key: _cut_out(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)([_cut_out(value) for value in content])
    return content


def _alone(tensor: Tensor) -> Tensor:
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    plain = tensor.detach()
    if plain.device.type != "cpu" or not plain.is_contiguous() or not plain.numel():
        return plain.clone(memory_format=torch.contiguous_format)
    # The same memory under a storage that ends where the tensor does: nothing is copied.
    bits = torch.from_numpy(plain.reshape(-1).view(torch.uint8).numpy())
    return bits.view(plain.dtype).view(plain.shape)


def _no_room(path: Path, needed: int, error: OSError | None) -> str:
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    kept = f"the earlier {path.name} is whole" if path.exists() else f"there is no {path.name} yet"
    return (
        f"{path} cannot be written ({error}): about {needed:,} bytes are needed, {free:,} are "
        f"free; {kept}. Make room (or raise the quota) and start the same command again"
    )


def _disk_error(error: BaseException) -> OSError | None:
    """What the disk said: torch's writer answers a failed write with an error of its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__context__
    return None


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

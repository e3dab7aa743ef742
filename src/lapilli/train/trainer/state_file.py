"""One file of a trainer checkpoint: written whole or not at all, checked before it is used.

    content -> views cut out of their files -> digest -> NAME.part -> flushed -> renamed to NAME
    NAME -> stored, not compressed, checksums right -> tensors and plain values -> digest right
         -> types, names, shapes, dtypes, finite numbers

A moment of another shape makes torch's fused optimizers write beyond their memory, and half of a
state would silently be another run. Knows files and nested containers; knows no run.
"""

import hashlib
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lapilli.disk import advice_on, flush_path
from lapilli.shapes import Tensor
from lapilli.train.trainer.task import Best, Plain, TrainingError

_DIGEST = "digest"


def write_whole(content: Any, path: Path) -> None:  # noqa: ANN401  whatever torch.save takes
    """Write what torch.save takes, and replace `path` at once when every byte is on the disk.

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
        flush_path(path.parent)
    except (OSError, RuntimeError) as error:
        if disk_error(error) is None:
            raise
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            staged.unlink()
        leaves = (leaf for _, leaf in _leaves(content))
        needed = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        raise TrainingError(_no_room(path, needed, disk_error(error))) from error


def write_state_file(content: Mapping[str, Any], path: Path) -> None:
    """Write a file with a digest of its content, which `read_state_file` compares.

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
    with path.open("rb") as file, warnings.catch_warnings():
        check_archive(file, size)
        file.seek(0)
        warnings.simplefilter("ignore")  # torch's, about files that are no state
        content: object = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}")
    return content


def damaged(path: Path, what: str) -> TrainingError:
    """Return the error that says what is wrong with a saved state, and what to do."""
    return TrainingError(
        f"{path} is damaged or no state of a run ({what}): put back a copy of it, or train into "
        "another folder"
    )


def first_line(error: BaseException) -> str:
    """Return what a parser said, short enough for one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def check_archive(file: BufferedReader | BytesIO, size: int) -> None:
    """Check what torch.save has written, without reading any tensor.

    torch.load neither compares checksums nor asks how much a compressed entry will become.

    Raises:
        zipfile.BadZipFile: no archive, a wrong checksum, or entries larger than `size` bytes.
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
    """Return the SHA-256 of nested containers of tensors and plain values; their order counts.

    A damaged file can name one tensor many times: `most` bytes and values are taken.

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
    """Yield what is no container, with where it is; an empty container is a leaf."""
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
    """Return the content with tensors whose storage has their own bytes and no more."""
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
        f"free; {kept}. {advice_on(error)} and start the same command again"
    )


def disk_error(error: BaseException) -> OSError | None:
    """Return what the disk said: torch's writer answers a failed write with its own error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__context__
    return None


_ADVICE = "go on with the recipe that began the run, or train into another folder"
_RENAMED = {"run.accumulate": "run.gradient_accumulation_steps"}  # recipe keys of earlier versions
# Counts and averages of squares.
_NOT_NEGATIVE = frozenset({"step", "exp_avg_sq", "max_exp_avg_sq"})


def checked_values(values: Mapping[str, Any], path: Path) -> tuple[int, int, Best | None]:
    """Return steps done, samples skipped, and the best evaluation, or None.

    Raises:
        TrainingError: one of them cannot be that.
    """
    step, skipped = values.get("step"), values.get("skipped", 0)
    for name, number in (("step", step), ("skipped", skipped)):
        if not is_count(number):
            raise damaged(path, f"{name} is {number!r:.80}, expected a count")
    best = values.get("best")
    if best is None:
        return int(step), skipped, None  # type: ignore[arg-type]  # is_count has looked
    is_pair = isinstance(best, (list, tuple)) and len(best) == 2
    if not (is_pair and is_count(best[0]) and is_number(best[1]) and best[0] <= step):
        raise damaged(path, f"best is {best!r:.80}, expected a step that is done and its loss")
    return int(step), skipped, Best(best[0], float(best[1]))  # type: ignore[arg-type]


def check_fingerprint(ours: Mapping[str, Plain] | None, theirs: object, path: Path) -> None:
    """Refuse a state of another run; one that does not say is believed.

    Raises:
        TrainingError: every difference is named.
    """
    if theirs is not None and not _is_fingerprint(theirs):
        raise damaged(path, "its fingerprint is no record of plain values")
    if ours is None or not isinstance(theirs, Mapping):
        return
    saved = {_RENAMED.get(str(name), str(name)): said for name, said in theirs.items()}
    names = [*saved, *(name for name in ours if name not in saved)]
    differ = [name for name in names if ours.get(name) != saved.get(name)]
    if differ:
        told = "; ".join(
            f"{name}: the state says {_said(saved, name)}, the recipe {_said(ours, name)}"
            for name in differ
        )
        raise TrainingError(f"{path} is of another run ({told}): {_ADVICE}")


def check_shapes(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Sequence[int]], path: Path
) -> None:
    """Refuse a state of other weights, by name and shape.

    Raises:
        TrainingError: the first difference is named.
    """
    for name in sorted(set(ours) | set(theirs)):
        found = tuple(theirs[name]) if name in theirs else "nothing"
        expected = tuple(ours[name].shape) if name in ours else "nothing (it is frozen or absent)"
        if found != expected:
            raise TrainingError(
                f"{path} has {found} for {name}, and this recipe trains {expected}: {_ADVICE}"
            )


def checked_weights(
    ours: Mapping[str, Tensor], theirs: object, path: Path, what: str
) -> Mapping[str, Tensor]:
    """Return saved weights that fit ours, name by name.

    Ours may be in pieces, theirs are whole; `what` is how the file calls them.

    Raises:
        TrainingError: they do not fit, or are no finite numbers.
    """
    if not isinstance(theirs, Mapping) or not all(isinstance(name, str) for name in theirs):
        raise damaged(path, f"{what} holds no named tensors")
    for name, value in theirs.items():
        if not isinstance(value, Tensor):
            raise damaged(path, f"{what} has a {type(value).__name__} for {name}")
    check_shapes(ours, {name: value.shape for name, value in theirs.items()}, path)
    for name, value in theirs.items():
        check_numbers(value, path, f"{what} of {name}")
    return theirs


def checked_moments(
    optimizer: torch.optim.Optimizer, saved: object, path: Path
) -> dict[int, dict[str, Any]]:
    """Return what the optimizer of the saved run kept of each parameter, by its number.

    Raises:
        TrainingError: other groups, or moments that no parameter of ours can have.
    """
    own, first = [], 0  # torch numbers parameters through all groups
    for group in optimizer.param_groups:
        own.append(list(range(first, first + len(group["params"]))))
        first += len(group["params"])
    groups, state = (
        saved.get(key) if isinstance(saved, Mapping) else None for key in ("param_groups", "state")
    )
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        raise damaged(path, "optimizer holds no groups and moments")
    found = [group.get("params") if isinstance(group, Mapping) else None for group in groups]
    if found != own:
        sizes = [len(params) if isinstance(params, list) else "no" for params in found]
        raise TrainingError(
            f"{path} has other parameter groups (of {sizes} parameters, this recipe has "
            f"{[len(params) for params in own]}): {_ADVICE}"
        )
    owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, kept in state.items():
        if not is_count(number) or number >= len(owners) or not isinstance(kept, Mapping):
            raise damaged(path, f"optimizer has moments for parameter {number!r:.40}")
        for key, value in kept.items():
            _check_moment(value, owners[number], path, f"{key!s:.40} of parameter {number}", key)
    return {number: dict(kept) for number, kept in state.items()}


def _check_moment(value: object, parameter: Tensor, path: Path, what: str, key: object) -> None:
    if value is None and key == "momentum_buffer":  # SGD without momentum
        return
    if not isinstance(key, str) or not isinstance(value, Tensor):
        raise damaged(path, f"{what} is a {type(value).__name__}")
    check_moment_shape(value.shape, parameter, key, path, what)
    check_numbers(value, path, what, not_negative=key in _NOT_NEGATIVE)


def check_moment_shape(
    shape: Sequence[int], parameter: Tensor, key: str, path: Path, what: str
) -> None:
    """Refuse a moment that is not of the shape of its parameter; "step" is one number."""
    expected = () if key == "step" else tuple(parameter.shape)
    if tuple(shape) != expected:
        raise damaged(path, f"{what} has the shape {tuple(shape)}, expected {expected}")


def check_numbers(value: Tensor, path: Path, what: str, *, not_negative: bool = False) -> None:
    """Refuse what is no plain tensor of finite floats; of pieces a process looks at its own.

    What holds counts or averages of squares is `not_negative`.
    """
    own = value.to_local() if isinstance(value, DTensor) else value
    is_plain = own.layout == torch.strided and not (own.is_meta or own.is_nested)
    if not is_plain or not own.dtype.is_floating_point:
        raise damaged(path, f"{what} is of {own.dtype} {own.layout}, expected plain floats")
    if not bool(torch.isfinite(own).all()):
        raise damaged(path, f"{what} has numbers that are not finite")
    if not_negative and own.numel() and bool((own < 0).any()):
        raise damaged(path, f"{what} has negative numbers")


def is_count(value: object) -> bool:
    """Return whether this is a whole number from zero to 2^53, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


def is_number(value: object) -> bool:
    """Return whether this is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_fingerprint(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(said, (str, int, float, bool))
        for name, said in value.items()
    )


def _said(fingerprint: Mapping[str, Plain], name: str) -> str:
    return repr(fingerprint[name]) if name in fingerprint else "nothing"

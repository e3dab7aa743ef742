"""Prefix files: keys and values on disk, for the next start of the program.

    safetensors    LAYER.keys, LAYER.values [K, S, A]   (int8: LAYER.key_scales, .value_scales too)
    header         format, model, kind, keys: of every position (hexadecimal), digest: of all this

`model` is a digest of the weights; a file of another model, adapter or dtype is refused. So is a
changed file: an answer from damaged keys and values would not show that it is wrong.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lapilli.config.reader import parse_json, utf8_name
from lapilli.errors import CheckpointError, MissingFileError
from lapilli.generate.engine.block_pool import BlockPool, Prefix
from lapilli.nn.paged import BlockStore
from lapilli.shapes import Tensor

FORMAT = "lapilli prefix 2"
_EARLIER = "lapilli prefix 1"  # without a digest
_SAMPLES = 4096
_SHOWN = 300  # letters of what the library says, which may quote the file
_NAMES = {  # of safetensors, for what a store may hold
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}


@dataclass(frozen=True, slots=True)
class SavedPrefix:
    """Content of a prefix file.

    Attributes:
        keys: position keys.
        tensors: for every tensor of the store its part [K, S, ...].
    """

    keys: list[int]
    tensors: list[Tensor]


def model_digest(model: nn.Module) -> str:
    """Return a digest of all weights and settings of a model, the same on every device.

    It covers name, shape, dtype, the sum of the bits and a sample of the elements of every tensor,
    and the plain attributes of every module. It is meant to notice mistakes, not forgery.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        if tensor.numel():
            digest.update(_content(tensor.detach()))
    for path, module in model.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and name != "training"
        }
        digest.update(f"{path} {type(module).__qualname__} {sorted(plain.items())} ".encode())
    return digest.hexdigest()


def _content(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    bits = flat.view(torch.uint8)
    words = bits.view(torch.int32) if len(bits) % 4 == 0 else bits
    total = int(words.sum(dtype=torch.int64))
    sample = words[:: max(1, len(words) // _SAMPLES)].cpu().numpy().tobytes()
    return f"{total} ".encode() + sample


def write_prefix(
    path: Path, pool: BlockPool, known: Prefix, keys: Sequence[int], model: str
) -> int:
    """Write the cached positions of `keys` to a file; return their number.

    Raises:
        CheckpointError: none of them is cached any more, something that is no file is at `path`,
            or the file cannot be written.
    """
    store = pool.store
    blocks = [*known.blocks, *([] if known.tail is None else [known.tail[0]])]
    length = known.length(pool.block_size)
    if not length:
        raise CheckpointError(
            f"nothing to save to {path}: what was read has left the memory for keys and values; "
            "ask again, or give the engine more (EngineOptions(kv_bytes=..., prefix_bytes=...))"
        )
    index = torch.tensor(blocks, device=store.device)
    tensors = {
        name: tensor[index].transpose(0, 1).flatten(1, 2)[:, :length].contiguous().cpu()
        for name, tensor in _named(store)
    }
    header = {
        "format": FORMAT,
        "model": model,
        "kind": _kind(store),
        "keys": json.dumps([f"{key:x}" for key in keys[:length]]),
    }
    try:
        place = path.resolve()  # a link stays one
        if place.exists() and not place.is_file():
            raise CheckpointError(f"{path} is no file that a prefix could replace: name another")
        place.touch()
        mode = place.stat().st_mode  # the library gives its file to the owner alone
        save_file(tensors, place, metadata={**header, "digest": _digest(header, tensors)})
        place.chmod(mode)
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise CheckpointError(f"the prefix cannot be saved to {path} ({error})") from error
    return length


def read_prefix(path: Path, pool: BlockPool, model: str) -> SavedPrefix:
    """Read a file for the store of this pool.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: it is no prefix, one of another model, or damaged.
    """
    if not path.exists():
        raise MissingFileError(f"{path}: no such file; Chat.save_prefix writes one")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a saved prefix (it is no file)")
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            _check(path, header, pool.store, model)
            keys = _keys(path, header)
            _check_tensors(path, file, pool.store, len(keys))
            tensors = {name: file.get_tensor(name) for name, _ in _named(pool.store)}
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        # MemoryError: a sparse file larger than the address space
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a saved prefix ({str(error)[:_SHOWN]})") from error
    if header["digest"] != _digest(header, tensors):
        raise _damaged(path, "its content is not what was saved")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _damaged(path, f"{name} has numbers that are not finite")
    return SavedPrefix(keys, list(tensors.values()))


def place_prefix(saved: SavedPrefix, pool: BlockPool, root: bytes) -> int:
    """Copy keys and values of a file into the prefix cache; return the number of positions.

    Raises:
        CheckpointError: the pool has no room for them.
    """
    length = len(saved.keys)
    table = pool.reserve(Prefix((root,)), length)
    if table is None:
        raise CheckpointError(
            f"the saved prefix has {length} positions, there is room for "
            f"{pool.available * pool.block_size}: raise EngineOptions(kv_bytes=...)"
        )
    pool.make_ready([(table, length)])
    size = pool.block_size
    for (_, memory), tensor in zip(_named(pool.store), saved.tensors, strict=True):
        for at, block in enumerate(table.blocks):
            part = tensor[:, at * size : (at + 1) * size]
            memory[block, :, : part.shape[1]] = part.to(memory.device)
    pool.release(table, saved.keys, length)
    return length


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: a damaged prefix ({what}): save it again")


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of header and tensors, without the digest in the header."""
    digest = hashlib.sha256()
    for name in ("format", "model", "kind", "keys"):
        digest.update(f"{name} {len(header[name])} {header[name]} ".encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _keys(path: Path, header: Mapping[str, str]) -> list[int]:
    """Return the position keys."""
    try:
        texts = parse_json(header["keys"].encode(), f"the keys of {path}")
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            return [int(text, 16) for text in texts]
    except ValueError as error:  # a CheckpointError is one
        raise _damaged(path, "its keys are no list of numbers") from error
    raise _damaged(path, "its keys are no list of numbers")


def _check_tensors(path: Path, file: Any, store: BlockStore, length: int) -> None:  # noqa: ANN401  a file of safetensors
    """Compare names, shapes and dtypes with the memory, before anything is read."""
    memory = dict(_named(store))
    strange = sorted(set(file.keys()) ^ set(memory))
    if strange:
        raise _damaged(path, f"{strange[0]!s:.80} is missing or unknown")
    for name, tensor in memory.items():
        stored = file.get_slice(name)
        found = (stored.get_dtype(), list(stored.get_shape()))
        expected = (_NAMES.get(tensor.dtype), [tensor.shape[1], length, *tensor.shape[3:]])
        if found != expected:
            raise _damaged(path, f"{name} is {found[0]} {found[1]}, expected {expected}")


def _check(path: Path, header: Mapping[str, str], store: BlockStore, model: str) -> None:
    if header.get("format") == _EARLIER:
        raise CheckpointError(
            f"{path}: saved by an earlier version, whose files do not tell when they are damaged: "
            "save the prefix again"
        )
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a saved prefix of this version: expected format {FORMAT!r}, found "
            f"{header.get('format')!r:.80}"
        )
    for name in ("model", "kind", "keys", "digest"):
        if name not in header:
            raise _damaged(path, f"its header has no {name}")
    if header["model"] != model:
        raise CheckpointError(
            f"{path}: was read by another model (digest {header['model'][:12]!r}, this one has "
            f"{model[:12]!r}): other weights, another adapter, quantization or dtype. Load that "
            "model, or save the prefix again with this one"
        )
    if header["kind"] != _kind(store):
        raise CheckpointError(
            f"{path}: holds keys and values as {header['kind'][:40]}, the engine keeps them as "
            f"{_kind(store)}: set EngineOptions(kv_dtype=...) alike"
        )


def _kind(store: BlockStore) -> str:
    return str(store.dtype).removeprefix("torch.")


def _named(store: BlockStore) -> list[tuple[str, Tensor]]:
    """Return the names of the store's tensors, in its order."""
    layers = len(store.keys)
    kinds = ("keys", "values", "key_scales", "value_scales")
    return [
        (f"{at % layers}.{kinds[at // layers]}", tensor)
        for at, tensor in enumerate(store.tensors())
    ]

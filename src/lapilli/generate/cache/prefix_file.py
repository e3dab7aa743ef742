"""Keys and values on disk: what a model has read, for the next start of the program.

    safetensors    LAYER.keys, LAYER.values [K, S, A]   (int8: LAYER.key_scales, .value_scales too)
    header         format, model, kind, keys: what stands at every position (hexadecimal)

`model` is a digest of the weights; another model, another adapter or another dtype is refused.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lapilli.errors import CheckpointError, MissingFileError
from lapilli.generate.cache.blocks import BlockPool, Prefix
from lapilli.nn.block_store import BlockStore
from lapilli.shapes import Tensor

FORMAT = "lapilli prefix 1"
_SAMPLES = 4096


@dataclass(frozen=True, slots=True)
class SavedPrefix:
    """What a file holds.

    Attributes:
        keys: position keys.
        tensors: per tensor of the store its part [K, S, ...].
    """

    keys: list[int]
    tensors: list[Tensor]


def model_digest(model: nn.Module) -> str:
    """What stands for all weights and settings of a model, whatever device it is on.

    Of every tensor: name, shape, dtype, the sum of its bits, and some of its elements; of every
    module its plain attributes. Meant to notice a mistake, not a forger.
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
    """The positions that the pool knows of `keys`, in a file; returns how many.

    Raises:
        CheckpointError: the pool knows none of them any more.
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
    save_file(tensors, path, metadata=header)
    return length


def read_prefix(path: Path, pool: BlockPool, model: str) -> SavedPrefix:
    """What a file holds, for a store like this.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: it is no prefix, or one of another model.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; Chat.save_prefix writes one")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check(path, header, pool.store, model)
            tensors = [file.get_tensor(name) for name, _ in _named(pool.store)]
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a saved prefix ({error})") from error
    return SavedPrefix([int(key, 16) for key in json.loads(header["keys"])], tensors)


def place_prefix(saved: SavedPrefix, pool: BlockPool, root: bytes) -> int:
    """Keys and values from a file into blocks that can be found; returns positions.

    Raises:
        CheckpointError: more positions than the pool has room for now.
    """
    length = len(saved.keys)
    table = pool.reserve(Prefix((root,)), length)
    if table is None:
        raise CheckpointError(
            f"the saved prefix has {length} positions, there is room for "
            f"{pool.available * pool.block_size}: raise EngineOptions(kv_bytes=...)"
        )
    size = pool.block_size
    for (_, memory), tensor in zip(_named(pool.store), saved.tensors, strict=True):
        for at, block in enumerate(table.blocks):
            part = tensor[:, at * size : (at + 1) * size]
            memory[block, :, : part.shape[1]] = part.to(memory.device)
    pool.release(table, saved.keys, length)
    return length


def _check(path: Path, header: dict[str, str], store: BlockStore, model: str) -> None:
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a saved prefix of this version: expected format {FORMAT!r}, found "
            f"{header.get('format')!r}"
        )
    if header["model"] != model:
        raise CheckpointError(
            f"{path}: was read by another model (digest {header['model'][:12]}, this one has "
            f"{model[:12]}): other weights, another adapter, quantization or dtype. Load that "
            "model, or save the prefix again with this one"
        )
    if header["kind"] != _kind(store):
        raise CheckpointError(
            f"{path}: holds keys and values as {header['kind']}, the engine keeps them as "
            f"{_kind(store)}: set EngineOptions(kv_dtype=...) alike"
        )


def _kind(store: BlockStore) -> str:
    return str(store.dtype).removeprefix("torch.")


def _named(store: BlockStore) -> list[tuple[str, Tensor]]:
    """Names of the store's tensors, in its order."""
    layers = len(store.keys)
    kinds = ("keys", "values", "key_scales", "value_scales")
    return [
        (f"{at % layers}.{kinds[at // layers]}", tensor)
        for at, tensor in enumerate(store.tensors())
    ]

"""Weight files: names, shapes and dtypes without reading, tensors one by one, memory-mapped.

Knows file formats, no models. Pickles are read with torch's restricted unpickler only.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lapilli.checkpoint.formats.files import GGUF, first_bytes, has_file, read_optional_json
from lapilli.checkpoint.formats.pickled import PickledShard
from lapilli.checkpoint.formats.safetensors import SafetensorsShard
from lapilli.config.reader import is_object, shown
from lapilli.errors import CheckpointError, MissingFileError

# Elements looked at together in the search for NaN and infinities.
FINITE_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def num_bytes(self) -> int:
        """Return the size in the file."""
        return self.num_parameters * self.dtype.itemsize

    @property
    def num_parameters(self) -> int:
        """Return the number of elements."""
        return torch.Size(self.shape).numel()


LONGEST_NAME = 255  # of a file, on every file system that there is
LFS = b"version https://git-lfs"
Shard = SafetensorsShard | PickledShard


@dataclass(slots=True)
class WeightStore:
    """The tensors of some weight files by name."""

    shards: dict[str, Shard] = field(default_factory=dict)
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> "WeightStore":
        """Open the tensors of these files; a name may stand in one file only.

        Raises:
            MissingFileError: a file is not there.
            CheckpointError: a file is damaged, or two hold the same tensor.
        """
        store = cls()
        for path in paths:
            shard = open_shard(path)
            store.shards[path.name] = shard
            for name, (shape, dtype) in shard.infos().items():
                if name in store.infos:
                    raise CheckpointError(
                        f"{name} stands in {store.infos[name].file} and in {path.name}"
                    )
                store.infos[name] = TensorInfo(shape, dtype, path.name)
        return store

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, mapped: bool = True) -> Tensor:
        """Return a tensor on the CPU.

        Args:
            name: of the tensor.
            dtype: to convert it to; None: as it is stored.
            mapped: a view of the file where nothing is converted; False: a copy.
        """
        shard = self.shards[self.infos[name].file]
        return shard.tensor(self.aliases.get(name, name), dtype, mapped=mapped)

    def rename(self, other: "WeightStore", foreign: str, name: str) -> None:
        """Take a tensor of another store under another name."""
        info = other.infos[foreign]
        self.shards[info.file] = other.shards[info.file]
        self.infos[name] = info
        self.aliases[name] = other.aliases.get(foreign, foreign)


def open_shard(path: Path) -> Shard:
    """Open a weight file by its ending.

    Raises:
        MissingFileError: it is not there.
        CheckpointError: it is damaged, or a file of another kind under this name.
    """
    if not has_file(path):
        raise MissingFileError(f"{path.name} is missing in {path.parent}")
    beginning = first_bytes(path, len(LFS))
    if beginning.startswith(b"GGUF"):
        raise CheckpointError(f"{path} is {GGUF}")
    if beginning == LFS:
        raise CheckpointError(
            f"{path} is a Git LFS pointer without the weights: run `git lfs pull`"
        )
    return SafetensorsShard(path) if path.suffix == ".safetensors" else PickledShard(path)


# Index, single file and numbered shards, in the order in which they are looked for.
FULL_WEIGHTS = (
    ("model.safetensors.index.json", "model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)


def find_weight_files(directory: Path) -> tuple[Path, ...]:
    """Find the files that hold a model's weights; return none where there are none.

    Raises:
        MissingFileError: an index names a file that is not there.
        CheckpointError: an index without weight_map.
    """
    for index, single, pattern in FULL_WEIGHTS:
        found = read_optional_json(directory / index)
        if found is not None:
            return _indexed(directory, index, found.get("weight_map"))
        if has_file(directory / single):
            return (directory / single,)
        shards = tuple(sorted(directory.glob(pattern)))
        if shards:
            _check_numbered(directory, shards)
            return shards
    return ()


def complete_weights(directory: Path) -> tuple[Path, ...]:
    """Find the weight files of a directory; none where an index names more than there are."""
    try:
        return find_weight_files(directory)
    except MissingFileError:
        return ()


def _indexed(directory: Path, index: str, weight_map: object) -> tuple[Path, ...]:
    if not is_object(weight_map):
        raise CheckpointError(f"{directory / index} has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{directory / index}: weight_map must map tensors to file names")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(
            f"{directory / index} names {shown(outside[0])}, outside its directory"
        )
    missing = [n for n in names if len(n) > LONGEST_NAME or not has_file(directory / n)]
    if missing:
        some = ", ".join(shown(name)[1:-1] for name in missing[:3])
        raise MissingFileError(
            f"{index} names {some}, missing in {directory} "
            f"({len(missing)} of {len(names)} weight files): download it again"
        )
    return tuple(directory / name for name in names)


def _check_numbered(directory: Path, shards: tuple[Path, ...]) -> None:
    count = shards[0].stem.rpartition("-of-")[2]
    if count.isdigit() and int(count) != len(shards):
        raise MissingFileError(
            f"{len(shards)} of {int(count)} weight files are in {directory}: download it again"
        )


def check_values(name: str, tensor: Tensor) -> None:
    """Check in one pass that no value is NaN or infinite: no sum gets rid of them.

    The sum of finite values may leave the number format too; only then they are looked at one by
    one, in blocks, so that no mask of the whole tensor is made.

    Raises:
        CheckpointError: there is one.
    """
    if not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
        return
    blocks = torch.split(tensor.flatten(), FINITE_BLOCK)
    bad = sum(int((~torch.isfinite(block)).sum()) for block in blocks)
    if bad:
        raise CheckpointError(
            f"{name} has {bad} values of {tensor.numel()} that are NaN or infinite: "
            "the checkpoint is damaged or its training diverged"
        )

"""Datasets: files opened as samples under one numbering, encoded, and the fingerprint of a run.

    *.json             one array       an index of byte ranges; a record is read when asked for
    *.jsonl            one per line    the same
    *.csv, *.tsv       one per row     image, question, answer
    *.parquet          row groups      read by pyarrow (the extra "data")
    *.tar              WebDataset      KEY.json, KEY.jpg, ...
    {00..12}.tar, *    several files, one after the other

    recipe, template, files --> {"run.seed": 0, "data.sources[0].content": "sha256:...", ...}

A checkpoint of the trainer keeps this fingerprint, and is refused where a recipe says something
else. What may change while a run goes on (steps, rates, precision, workers, processes,
on_bad_sample, evaluation) is not in it, nor are the folders that data and models lie in. Pictures
outside of the files of samples are not read. Digests of files:

    up to whole_bytes     sha256 of the content, as sha256sum prints it
    larger                sha256 of its size and of pieces spread evenly over it, 16 MiB in all
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lapilli.config.reader import given_path
from lapilli.errors import DataError
from lapilli.store.manifest import MANIFEST
from lapilli.train.data.encoder import EncodedSample, EncodesSamples
from lapilli.train.data.formats import id_of, signed_words
from lapilli.train.data.sample import Sample, to_sample
from lapilli.train.data.sampler import Order
from lapilli.train.data.source import JsonSource, LinesSource, Source, expand, part_at
from lapilli.train.data.tables import CsvSource, ParquetSource
from lapilli.train.data.tar_source import TarSource
from lapilli.train.recipe import DataRecipe, OnBadSample, Placement, Recipe, RunRecipe, SourceRecipe
from lapilli.train.trainer.task import Plain

# First bytes of files that are not what their names say, and what to do.
_FOREIGN: Final = (
    (b"\x1f\x8b", "gzip-compressed: unpack it first, samples are read by seeking"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed: unpack it first, samples are read by seeking"),
    (b"BZh91AY&SY", "bzip2-compressed: unpack it first, samples are read by seeking"),
    (b"\xfd7zXZ", "xz-compressed: unpack it first, samples are read by seeking"),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet: unpack it, or save it as CSV in UTF-8"),
    (codecs.BOM_UTF16_LE, "text in UTF-16: save it in UTF-8"),
    (codecs.BOM_UTF16_BE, "text in UTF-16: save it in UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
)


class Dataset:
    """Samples 0 to len - 1, source after source.

    `weights` and `placement` are those of SourceRecipe and DataRecipe; `chosen` says which records
    of every source there are, None: all.

    Raises:
        DataError: no sample at all.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        weights: Sequence[float] | None = None,
        placement: Placement = "front",
        chosen: Sequence[NDArray[np.int64]] | None = None,
        modalities: Sequence[str] = (),
    ) -> None:
        self.sources = tuple(sources)
        self.weights = tuple(weights or [1.0] * len(self.sources))
        self._placement: Placement = placement
        self._modalities = tuple(modalities)
        self._chosen = chosen
        self.counts = tuple(
            len(source) if chosen is None else len(chosen[number])
            for number, source in enumerate(self.sources)
        )
        self._ends = list(accumulate(self.counts))
        self._words: NDArray[np.int64] | None = None
        if not len(self):
            names = ", ".join(source.name for source in self.sources) or "no source"
            raise DataError(f"there is no sample in {names}")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _at(self, index: int) -> tuple[Source, int]:
        number, inside = part_at(self._ends, index)
        if self._chosen is not None:
            inside = int(self._chosen[number][inside])
        return self.sources[number], inside

    def where(self, index: int) -> str:
        """Return the place of sample `index`."""
        source, inside = self._at(index)
        return source.where(inside)

    def id(self, index: int) -> str:
        """Return how sample `index` names itself; its place where it does not."""
        source, inside = self._at(index)
        where = source.where(inside)
        try:
            return id_of(source.record(inside), where=where)
        except DataError:
            return where

    def label(self, index: int) -> str:
        """Return place and id of sample `index`, as messages about it begin."""
        return Sample(self.id(index), (), self.where(index)).label

    def sample(self, index: int) -> Sample:
        """Return sample `index`, its media unopened.

        Raises:
            DataError: its record cannot be read.
        """
        source, inside = self._at(index)
        sample = to_sample(
            source.record(inside),
            where=source.where(inside),
            placement=self._placement,
            resolve=lambda name: source.media(inside, name),
            modalities=self._modalities,
        )
        pictures = [part.source for part in sample.media if part.modality == "image"]
        with sample.named_in_errors():
            notes = source.notes(inside, pictures)
        return replace(sample, notes=(*sample.notes, *notes)) if notes else sample

    def words(self) -> NDArray[np.int64]:
        """Return the words of every sample, negative without media; every record is read once.

        A sample that cannot be read counts -1: what is wrong is said when it is drawn.
        """
        if self._words is None:
            counts = (self._signed_words(index) for index in range(len(self)))
            self._words = np.fromiter(counts, np.int64, len(self))
        return self._words

    def _signed_words(self, index: int) -> int:
        source, inside = self._at(index)
        try:
            return signed_words(source.record(inside), self._modalities)
        except DataError:
            return -1

    def split(self, share: float, *, seed: int) -> tuple["Dataset", "Dataset"]:
        """Return what is trained on, and what is held out of every source, chosen by seed and name.

        `share` is of every source; at least one sample of it is held out.

        Raises:
            DataError: a source of one sample only.
        """
        kept, held = [], []
        for source, count in zip(self.sources, self.counts, strict=True):
            number = max(1, round(share * count))
            if number >= count:
                raise DataError(
                    f"{source.name} has {count} samples: holding out {number} leaves none to learn "
                    "from"
                )
            key = crc32(source.name.replace("\\", "/").rpartition("/")[2].encode())
            order = np.random.default_rng([seed, key, 31]).permutation(count)
            held.append(np.sort(order[:number]))
            kept.append(np.sort(order[number:]))
        return self._part(kept), self._part(held)

    def _part(self, chosen: list[NDArray[np.int64]]) -> "Dataset":
        if self._chosen is not None:
            chosen = [old[new] for old, new in zip(self._chosen, chosen, strict=True)]
        return Dataset(
            self.sources,
            weights=self.weights,
            placement=self._placement,
            chosen=chosen,
            modalities=self._modalities,
        )

    def declaring(self, modalities: Sequence[str]) -> "Dataset":
        """Return the same samples with the media of modalities that a checkpoint declares."""
        return Dataset(
            self.sources,
            weights=self.weights,
            placement=self._placement,
            chosen=self._chosen,
            modalities=modalities,
        )


class EncodedDataset:
    """Encoded samples by number, with what to do about a bad one.

    Args:
        dataset: gives the samples.
        encoder: encodes them.
        on_bad_sample: "error", or "skip": the next sample that can be read stands in for it.
        words: of every sample, negative without media: then only a sample of the same kind does,
            so that a batch stays of one kind. None: any does.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: EncodesSamples,
        *,
        on_bad_sample: OnBadSample = "error",
        words: NDArray[np.int64] | None = None,
    ) -> None:
        self.dataset, self._encoder, self._words = dataset, encoder, words
        self._on_bad_sample: OnBadSample = on_bad_sample

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, index: int) -> EncodedSample:
        """Encode sample `index`; `skipped` says what could not be read on the way to it.

        Raises:
            DataError: it cannot be read, or with "skip" none can.
        """
        skipped: list[str] = []
        for candidate in self._candidates(index):
            encoded = self._try(candidate)
            if isinstance(encoded, EncodedSample):
                return replace(encoded, skipped=tuple(skipped))
            skipped.append(str(encoded))
        raise DataError(
            f"none of {len(skipped)} samples{'' if self._words is None else ' of a kind'} can be "
            f"learned from; the first: {skipped[0]}"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        """Yield the sample, and those that may stand in for it: the ones after it, round."""
        for at in chain(range(index, len(self)), range(index)):
            if self._words is None or (self._words[at] > 0) == (self._words[index] > 0):
                yield at

    def _try(self, index: int) -> EncodedSample | DataError:
        try:
            return self._encoder.encode(self.dataset.sample(index))
        except DataError as error:
            if self._on_bad_sample == "error":
                raise
            return error


class Joined:
    """Several sources, one after the other."""

    def __init__(self, name: str, parts: Sequence[Source]) -> None:
        self.name = name
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _at(self, index: int) -> tuple[Source, int]:
        number, inside = part_at(self._ends, index)
        return self._parts[number], inside

    def record(self, index: int) -> Any:  # noqa: ANN401 - see Source
        """See Source."""
        part, inside = self._at(index)
        return part.record(inside)

    def where(self, index: int) -> str:
        """See Source."""
        part, inside = self._at(index)
        return part.where(inside)

    def media(self, index: int, name: object) -> object:
        """See Source."""
        part, inside = self._at(index)
        return part.media(inside, name)

    def notes(self, index: int, pictures: Sequence[object]) -> tuple[str, ...]:
        """See Source."""
        part, inside = self._at(index)
        return part.notes(inside, pictures)


def open_source(recipe: SourceRecipe) -> Source:
    """Open the files of a recipe's source.

    Raises:
        DataError: no such file, a kind that is not known, or one that is damaged.
        ConfigError: a Parquet file without pyarrow.
    """
    parts = [_open_file(path, recipe.images) for path in expand(recipe.path)]
    return parts[0] if len(parts) == 1 else Joined(recipe.path, parts)


def _open_file(path: Path, images: str | None) -> Source:
    folder = path.parent if images is None else given_path(images)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: expected that of the images (from {Path.cwd()})")
    try:
        check_foreign(path)
        return _open_kind(path, folder)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _open_kind(path: Path, folder: Path) -> Source:
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise DataError(f"{path} is no data file that is known: give {', '.join(OPENERS)}")
    return opener(path, folder)


OPENERS: Final[Mapping[str, Callable[[Path, Path], Source]]] = {
    ".json": JsonSource,
    ".jsonl": LinesSource,
    ".ndjson": LinesSource,
    ".csv": CsvSource,
    ".tsv": CsvSource,
    ".parquet": ParquetSource,
    ".pq": ParquetSource,
    ".tar": lambda path, _folder: TarSource(path),
}
"""What opens a file, with the folder of its images, by how its name ends."""


def check_foreign(path: Path) -> None:
    """Refuse a file that is not what its name says, by its first bytes.

    Raises:
        DataError: it is compressed, a spreadsheet, or the like.
    """
    with path.open("rb") as file:
        begins = file.read(max(len(mark) for mark, _ in _FOREIGN))
    for mark, meaning in _FOREIGN:
        if begins.startswith(mark):
            raise DataError(f"{path} is {meaning}")


def open_dataset(sources: Sequence[SourceRecipe], *, placement: Placement = "front") -> Dataset:
    """Open the samples of a recipe's sources.

    Raises:
        DataError: no such file, a damaged one, or no sample.
        ConfigError: a Parquet file without pyarrow.
    """
    opened = [open_source(source) for source in sources]
    return Dataset(opened, weights=[source.weight for source in sources], placement=placement)


def encoded_dataset(dataset: Dataset, encoder: EncodesSamples, data: DataRecipe) -> EncodedDataset:
    """Return the encoded samples that a recipe learns from."""
    words = dataset.words() if data.group == "modality" else None
    return EncodedDataset(dataset, encoder, on_bad_sample=data.on_bad_sample, words=words)


def order_of(dataset: Dataset, data: DataRecipe, run: RunRecipe) -> Order:
    """Return the order in which a run reads samples."""
    return Order(
        dataset.counts,
        weights=dataset.weights,
        words=None if data.group == "none" else dataset.words(),
        group=data.group,
        batch_size=run.batch_size,
        micro_batches=run.gradient_accumulation_steps,
        seed=run.seed,
    )


_PIECE: Final = 1 << 18
_PIECES: Final = 64
SAMPLED_BYTES: Final = _PIECE * _PIECES
"""What is read of a large file; those that are not larger are read whole."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of samples.

    Attributes:
        name: without its folder, which says something about one machine alone.
        digest: "sha256:..." of its content, or "in pieces, sha256:...".
    """

    name: str
    num_bytes: int
    digest: str


def data_file(path: Path, *, whole_bytes: int = SAMPLED_BYTES) -> DataFile:
    """Return name, size and digest of a file; neither its folder nor its time counts.

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
    """Return one digest of several files, in their order."""
    return _sha256(["\n".join(file.digest for file in files).encode()])


def _sample(file: BufferedReader, size: int) -> Iterator[bytes]:
    """Yield the size, and pieces from the first byte to the last."""
    yield str(size).encode()
    for number in range(_PIECES):
        file.seek(number * (size - _PIECE) // (_PIECES - 1))
        yield file.read(_PIECE)


def _sha256(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def fingerprint_of(
    recipe: Recipe,
    template: str,
    counts: Sequence[int],
    weights: Mapping[str, Sequence[Path]],
) -> dict[str, Plain]:
    """Return the fingerprint of a run: names of recipe keys, and what they stand for.

    Args:
        recipe: of the run.
        template: name of the template of the samples.
        counts: records of every source, those that are held out too.
        weights: files of the models that the run begins with, by the keys that name them: what it
            does not train stands in no state.
    """
    run, data = recipe.run, recipe.data
    found: dict[str, Plain] = {
        "stage": recipe.stage,
        "optim.name": recipe.optim.name,
        "run.seed": run.seed,
        "run.batch_size": run.batch_size,
        "run.gradient_accumulation_steps": run.gradient_accumulation_steps,
        "data.held_out": 0.0 if data.evaluation else data.held_out,
        "data.template": template,
        "data.max_length": data.max_length,
        "data.group": data.group,
        "data.pack": data.pack,
        "data.placement": data.placement,
        **({"data.alpha": data.alpha} if data.alpha != "drop" else {}),  # as runs from before it
    }
    if recipe.model.freeze:
        found["model.freeze"] = ", ".join(recipe.model.freeze)
    if recipe.model.tune_encoder:
        found["model.tune_encoder"] = ", ".join(recipe.model.tune_encoder)
    if recipe.model.modalities:
        found["model.modalities"] = json.dumps(recipe.model.modalities, sort_keys=True)
    if recipe.lora is not None:
        names = ("rank", "alpha", "base", "double_quant")
        found |= {f"lora.{name}": getattr(recipe.lora, name) for name in names}
    for number, (source, count) in enumerate(zip(data.sources, counts, strict=True)):
        facts = {"samples": count, "weight": source.weight, **_files(source)}
        found |= {f"data.sources[{number}].{key}": value for key, value in facts.items()}
    for name, folder in data.stores.items():
        found[f"data.stores.{name}"] = data_file(given_path(folder) / MANIFEST).digest
    for key, files in weights.items():
        found[f"{key}.content"] = together([data_file(path) for path in files])
    return found


def _files(source: SourceRecipe) -> dict[str, Plain]:
    """Return name and digest of a source's files; what is held out depends on the name."""
    digests = [data_file(path) for path in expand(source.path)]
    name = source.path.replace("\\", "/").rpartition("/")[2]
    return {"path": name, "content": together(digests)}

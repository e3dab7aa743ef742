"""Datasets: samples of several sources under one numbering, as they are and encoded."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lapilli.errors import DataError
from lapilli.train.data.encoder import EncodedSample, EncodesSamples
from lapilli.train.data.formats import id_of, signed_words
from lapilli.train.data.order import Order
from lapilli.train.data.sample import Sample, to_sample
from lapilli.train.data.source import Source, open_source
from lapilli.train.recipe import DataRecipe, OnBadSample, Placement, RunRecipe, SourceRecipe


class Dataset:
    """Samples 0 to len - 1, source after source.

    Args:
        sources: where records come from.
        weights: of the sources, see SourceRecipe; None: all 1.
        placement: see DataRecipe.
        chosen: which records of every source; None: all.

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
    ) -> None:
        self.sources = tuple(sources)
        self.weights = tuple(weights or [1.0] * len(self.sources))
        self._placement: Placement = placement
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
        number = bisect_right(self._ends, index)
        inside = index - (self._ends[number - 1] if number else 0)
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
        return to_sample(
            source.record(inside),
            where=source.where(inside),
            placement=self._placement,
            resolve=lambda name: source.media(inside, name),
        )

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
            return signed_words(source.record(inside))
        except DataError:
            return -1

    def split(self, share: float, *, seed: int) -> tuple["Dataset", "Dataset"]:
        """Return what is trained on, and what is held out of every source, chosen by seed and name.

        Args:
            share: of every source that is held out; at least one sample.
            seed: another one holds out others.

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
        return Dataset(self.sources, weights=self.weights, placement=self._placement, chosen=chosen)


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

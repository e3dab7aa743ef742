"""Sample order: a function of seed, step and the data, so that resuming needs no state.

    epoch 0                     epoch 1
    | step 0 | step 1 | step 2 ...                 every epoch another order of all samples;
    |mb|mb|mb|mb|mb|mb|                            steps are whole, also across the border

    grouped: shuffle -> megabatches of world_size * batch_size -> each sorted -> even chunks

Source: LLaVA llava_trainer.py (LengthGroupedSampler), which follows fairseq and transformers.
Note: the last step of an epoch is filled from the next one, so every step is whole; the original
    ends with a smaller one.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from lapilli.errors import ConfigError
from lapilli.train.recipe import RunRecipe

Group = Literal["none", "length", "modality"]
_SORTED: Final = 50  # micro-batches whose histories are sorted by length together


def draw_indices(num_samples: int, batch_size: int, number: int, *, seed: int) -> NDArray[np.int64]:
    """Return the samples of batch `number` (counted from 0), int64 [batch_size].

    Every epoch is another permutation; a batch may reach over the end of an epoch into the next.
    """
    places = np.arange(number * batch_size, (number + 1) * batch_size)
    epochs, offsets = np.divmod(places, num_samples)
    out = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = _permutation(num_samples, int(epoch), seed)
        out[epochs == epoch] = order[offsets[epochs == epoch]]
    return out


def _permutation(num_samples: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, 29]).permutation(num_samples)


class Order:
    """The samples of every step and micro-batch.

    Args:
        counts: samples of every source; they are numbered source after source.
        batch_size: samples of a micro-batch.
        micro_batches: micro-batches of a step, in all processes together.
        seed: of the shuffles.
        weights: of the sources: how often an epoch has each of its samples; 0.5: every second
            epoch. None: all 1.
        words: of every sample, negative without media; needed for groups.
        group: "length": micro-batches of even length in sum, as the original's sampler deals them
            out; "modality": and of one kind each, but for the ends of epochs.

    Raises:
        ConfigError: nothing to draw from, or no words to group by.
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        batch_size: int,
        micro_batches: int = 1,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        words: Sequence[int] | NDArray[np.int64] | None = None,
        group: Group = "none",
    ) -> None:
        self._counts = tuple(counts)
        self._weights = tuple(weights or [1.0] * len(self._counts))
        self._per_source = [
            round(n * weight) for n, weight in zip(self._counts, self._weights, strict=True)
        ]
        self.epoch_size = sum(self._per_source)
        self.batch_size, self.micro_batches, self.seed = batch_size, micro_batches, seed
        self._words, self._group = words, group
        if min(self._weights, default=0.0) < 0 or not self.epoch_size:
            raise ConfigError(
                f"an epoch of sources with {self._counts} samples and the weights {self._weights} "
                "is empty: expected samples, and weights above 0"
            )
        if group != "none" and (words is None or len(words) != sum(self._counts)):
            raise ConfigError(f"grouping by {group} needs the words of every sample")
        self._epochs: dict[int, NDArray[np.int64]] = {}

    @property
    def step_size(self) -> int:
        """Return the samples of a step."""
        return self.batch_size * self.micro_batches

    def indices(self, step: int, micro: int) -> list[int]:
        """Return the numbers of the samples of a micro-batch."""
        first = step * self.step_size + micro * self.batch_size
        places = np.arange(first, first + self.batch_size)
        epochs, offsets = np.divmod(places, self.epoch_size)
        return [
            int(self._epoch(int(epoch))[offset])
            for epoch, offset in zip(epochs, offsets, strict=True)
        ]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch; the last two are kept, because a step may touch both."""
        found = self._epochs.get(epoch)
        if found is None:
            found = self._epochs[epoch] = self._draw_epoch(epoch)
            for old in list(self._epochs)[:-2]:
                self._epochs.pop(old, None)  # another thread may have been quicker
        return found

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        members = self._members(epoch)
        order = members[_permutation(len(members), epoch, self.seed)]
        if self._group == "none":
            return order
        head = -(epoch * self.epoch_size) % self.step_size  # what the last step still lacks
        return np.concatenate([order[:head], self._grouped(order[head:], epoch)])

    def _members(self, epoch: int) -> NDArray[np.int64]:
        """Return an epoch's samples, unshuffled: the next ones of every source's own passes."""
        parts, start = [], 0
        for number, (count, drawn) in enumerate(zip(self._counts, self._per_source, strict=True)):
            if drawn == count:
                parts.append(np.arange(start, start + count))
            elif drawn:
                inside = draw_indices(count, drawn, epoch, seed=self.seed + 7919 * (number + 1))
                parts.append(start + inside)
            start += count
        return np.concatenate(parts)

    def _grouped(self, order: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        if not len(order):
            return order
        words = np.asarray(self._words)[order].tolist()
        first, second = np.random.default_rng([self.seed, epoch, 37]).integers(2**62, size=2)
        outer = torch.Generator().manual_seed(int(first))
        if self._group == "length":
            sizes = [abs(size) for size in words]
            places = grouped_by_length(sizes, self.batch_size, self.micro_batches, outer)
        else:
            inner = torch.Generator().manual_seed(int(second))
            places = grouped_by_modality(
                words, self.batch_size, self.micro_batches, outer, within=inner
            )
        return order[places]


def even_chunks(indices: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Deal samples out to `chunks` parts of equal number and similar total length.

    A number that does not divide evenly is dealt out in turn instead.
    """
    if len(indices) % chunks:
        return [list(indices[start::chunks]) for start in range(chunks)]
    size = len(indices) // chunks
    parts: list[list[int]] = [[] for _ in range(chunks)]
    shortest_first: list[tuple[int, int]] = [(0, part) for part in range(chunks)]
    for index in indices:
        total, part = heappop(shortest_first)
        parts[part].append(index)
        if len(parts[part]) < size:
            heappush(shortest_first, (total + lengths[index], part))
    return parts


def grouped_by_length(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Return every sample once, in an order whose batches have similar lengths.

    Args:
        lengths: of every sample.
        batch_size: per process and step, accumulated micro-batches included.
        world_size: number of processes.
        generator: of the shuffle; None takes torch's global source.
    """
    mega = batch_size * world_size
    order = torch.randperm(len(lengths), generator=generator).tolist()
    out: list[int] = []
    for start in range(0, len(order), mega):
        longest_first = sorted(order[start : start + mega], key=lambda i: -lengths[i])
        for part in even_chunks(longest_first, lengths, world_size):
            out += part
    return out


def grouped_by_modality(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    *,
    within: torch.Generator | None = None,
) -> list[int]:
    """Return an order as `grouped_by_length` does, with no batch of both kinds but the last.

    Lengths are positive with an image, negative without. `generator` shuffles the batches, `within`
    the samples of a kind; None takes torch's global source, as the original always does.

    Raises:
        ConfigError: a length of 0, which says of neither kind that it is one.
    """
    if 0 in lengths:
        raise ConfigError(f"sample {list(lengths).index(0)} has length 0: it has no words at all")
    kinds = [
        [i for i, length in enumerate(lengths) if length > 0],
        [i for i, length in enumerate(lengths) if length < 0],
    ]
    sizes = [abs(length) for length in lengths]
    if not all(kinds):
        return grouped_by_length(sizes, batch_size, world_size, generator)
    mega = batch_size * world_size
    whole: list[list[int]] = []
    rest: list[int] = []
    for kind in kinds:
        inner = grouped_by_length([sizes[i] for i in kind], batch_size, world_size, within)
        order = [kind[i] for i in inner]
        batches = [order[start : start + mega] for start in range(0, len(order), mega)]
        whole += batches[:-1]
        rest += batches[-1]
    shuffled = torch.randperm(len(whole), generator=generator).tolist()
    return [i for at in shuffled for i in whole[at]] + sorted(rest)


class LengthGroupedSampler(Sampler[int]):
    """A sampler of these orders with the original's arguments; every pass draws a new one."""

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
    ) -> None:
        if lengths is None:
            raise ConfigError("a length-grouped sampler needs the lengths of the samples")
        self.batch_size = batch_size
        self.world_size = world_size
        self.lengths = lengths
        self.generator = generator
        self.group_by_modality = group_by_modality

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = grouped_by_modality if self.group_by_modality else grouped_by_length
        return iter(order(self.lengths, self.batch_size, self.world_size, self.generator))


class OrderByLength:
    """The samples of every step and micro-batch, those of one about as long as each other.

    Samples that fill no micro-batch of an epoch wait for another one.

    Args:
        lengths: of the samples.
        run: batch size, micro-batches and seed; a micro-batch has no more samples than there are.
        stream: a number of its own for each use, so that their shuffles differ.
    """

    def __init__(self, lengths: Sequence[int], run: RunRecipe, *, stream: int) -> None:
        self._micro_batches = run.gradient_accumulation_steps
        size = min(run.batch_size, len(lengths))
        self._per_epoch = len(lengths) // size

        def epoch(number: int) -> NDArray[np.int64]:
            rng = np.random.default_rng([run.seed, number, stream])
            return batches_of_similar_length(lengths, size, rng)

        self._epoch = lru_cache(maxsize=2)(epoch)

    def indices(self, step: int, micro: int) -> list[int]:
        """Return the samples of a micro-batch."""
        epoch, at = divmod(step * self._micro_batches + micro, self._per_epoch)
        found: list[int] = self._epoch(epoch)[at].tolist()
        return found


def batches_of_similar_length(
    lengths: Sequence[int], size: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return random batches [count, size] whose samples are about as long as each other.

    Each sample comes once; those that fill no batch are left out, others every time.
    """
    order = rng.permutation(len(lengths))[: len(lengths) // size * size]
    sizes = np.asarray(lengths)[order]
    chunks = range(0, len(order), _SORTED * size)
    by_length = [
        order[at : at + _SORTED * size][np.argsort(sizes[at : at + _SORTED * size], kind="stable")]
        for at in chunks
    ]
    batches: NDArray[np.int64] = np.concatenate(by_length).reshape(-1, size)
    return batches[rng.permutation(len(batches))]

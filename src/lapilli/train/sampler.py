"""Orders of samples that put similar lengths into one batch; knows lengths only.

    shuffle -> megabatches of world_size * batch_size -> each sorted -> one even chunk per process

Source: LLaVA llava_trainer.py (LengthGroupedSampler), which follows fairseq and transformers.
"""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

import torch
from torch.utils.data import Sampler

from lapilli.errors import ConfigError


def even_chunks(indices: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Samples dealt out to `chunks` parts of equal number and similar total length.

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
    """Every sample once, in an order whose batches have similar lengths.

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
    """As `grouped_by_length`, with no batch of both kinds but the last.

    Args:
        lengths: positive with an image, negative without.
        batch_size: see `grouped_by_length`.
        world_size: see `grouped_by_length`.
        generator: shuffles the batches.
        within: shuffles the samples of a kind; None takes torch's global source, as the original
            always does.

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
    """The orders above as a sampler; every pass draws a new one.

    Args:
        batch_size: per process and step, accumulated micro-batches included.
        world_size: number of processes.
        lengths: of every sample.
        generator: see `grouped_by_modality`.
        group_by_modality: lengths are signed.
    """

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

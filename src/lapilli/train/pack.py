"""Several samples in one row: which go together.

    lengths 900 700 600 400 300, room 1024     ->     [900] [700 300] [600 400]

Knows lengths only; how a row is read is known by nn/segments.py.
"""

from collections.abc import Sequence

from lapilli.errors import ConfigError


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of samples by row, every row at most `room` long, few rows.

    The longest sample that is left goes into the first row that has room for it, which takes at
    most 11 / 9 of the fewest rows possible, and one more.

    Args:
        lengths: positions of every sample.
        room: positions of a row.

    Raises:
        ConfigError: a sample is longer than a row.

    Source: Johnson 1973, first-fit decreasing.
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[sample]
        if length > room:
            raise ConfigError(
                f"a sample of {length} positions does not fit into a row of {room}: raise "
                "data.max_length, or let rows be cut to it"
            )
        at = next((i for i, free in enumerate(left) if free >= length), None)
        if at is None:
            bins.append([])
            left.append(room)
            at = len(bins) - 1
        bins[at].append(sample)
        left[at] -= length
    return bins

"""Who may begin: by priority and order, when there is memory for prompt and longest answer."""

import hashlib

from lapilli.generate.engine.block_pool import BlockPool
from lapilli.generate.engine.sequence import Sequence


class Admission:
    """Reserves blocks.

    Args:
        pool: the blocks.
        max_rows: most sequences that have blocks.
    """

    def __init__(self, pool: BlockPool, max_rows: int) -> None:
        self._pool = pool
        self._max_rows = max_rows

    def admit(self, waiting: list[Sequence], rows: list[Sequence], *, epoch: int) -> None:
        """Move those who can begin from `waiting` to `rows`.

        The first one that does not fit ends it, so that small requests do not starve a large one.
        One whose next block is being read for another waits for that, and takes nobody's turn.

        Args:
            waiting: in their order.
            rows: sequences that have blocks.
            epoch: of the weights; what was kept in another one is not found.
        """
        root = root_digest(epoch)
        for sequence in list(waiting):
            if len(rows) >= self._max_rows:
                break
            if not sequence.chain or sequence.chain[0] != root:
                sequence.chain = self._pool.chain(root, sequence.keys)
            prefix = self._pool.find(sequence.chain, sequence.keys)
            if is_being_read(sequence, len(prefix.blocks), rows):
                continue
            table = self._pool.reserve(prefix, sequence.positions_needed)
            if table is None:
                break
            sequence.begin(table)
            rows.append(sequence)
            waiting.remove(sequence)
            self._pool.stats.positions += sequence.prompt_length
            self._pool.stats.reused += table.length


def is_being_read(sequence: Sequence, known: int, rows: list[Sequence]) -> bool:
    """Whether a row is about to read the very block that `sequence` needs after `known` ones."""
    if known + 1 >= len(sequence.chain):
        return False
    wanted = sequence.chain[known + 1]
    return any(
        known + 1 < len(row.chain) and row.chain[known + 1] == wanted
        for row in rows
        if not row.is_growing
    )


def root_digest(epoch: int) -> bytes:
    """What the chains of sequences begin with that were read in this epoch of the weights."""
    return hashlib.sha256(f"{epoch}".encode()).digest()

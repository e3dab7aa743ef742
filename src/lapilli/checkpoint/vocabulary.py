"""Rows of the embedding and of the output layer, fitted to the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapilli.errors import ShapeMismatchError


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """How many rows the tables have in the files and in the model.

    Args:
        rows: of the model.
        accepted: numbers of rows that a table of the files may have.
        new_rows: rows that only the added tokens have, which an adapter may store alone.

    Source: LLaVA builder.py resizes both tables to the length of the tokenizer, also downwards.
    Note: the original fills rows that no file has with random numbers; here they are the mean of
        the others, so that loading twice gives the same model.
    """

    rows: int
    accepted: frozenset[int]
    new_rows: int = 0

    def fit(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """One table out of the files' tables, the last one winning.

        Raises:
            ShapeMismatchError: a table with an unexpected number of rows.
        """
        table = tensors[-1]
        if len(tensors) > 1 and 0 < len(table) == self.new_rows:
            # An adapter that stores the rows of the added tokens alone: they are the last ones.
            return torch.cat((resized(tensors[-2], self.rows)[: -self.new_rows], table))
        # A table that was trained beside an adapter has the rows of the added tokens already.
        more = {self.rows} if len(tensors) > 1 else set()
        if table.shape[0] not in self.accepted | more:
            wanted = " or ".join(str(n) for n in sorted(self.accepted))
            raise ShapeMismatchError(
                f"{name} has {table.shape[0]} rows in the files, but the vocabulary has {wanted} "
                "entries: config.json and weights do not belong together"
            )
        return resized(table, self.rows)


def resized(table: Tensor, rows: int) -> Tensor:
    """The table with fewer rows, or with more that are the mean of all it has."""
    missing = rows - table.shape[0]
    if missing <= 0:
        return table[:rows]
    mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
    return torch.cat((table, mean.expand(missing, -1)))

"""Vocabulary tables of a checkpoint: embedding and output layer, their rows, one table or two.

Source: LLaVA builder.py resizes both tables to the length of the tokenizer, also downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapilli.checkpoint.formats.weights import WeightStore
from lapilli.checkpoint.keymaps import EMBEDDINGS, LANGUAGE_MODEL, OUTPUT
from lapilli.checkpoint.read.directory import ADAPTER, WeightPart
from lapilli.errors import ShapeMismatchError

VOCABULARY = (*EMBEDDINGS, OUTPUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Rows of the vocabulary tables in the files and in the model.

    Args:
        rows: of the model.
        accepted: numbers of rows that a table of the files may have.
        new_rows: rows that only the added tokens have, which an adapter may store alone.

    Note: the original fills rows that no file has with random numbers; here they are the mean of
        the others, so that loading twice gives the same model.
    """

    rows: int
    accepted: frozenset[int]
    new_rows: int = 0

    def fit(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """Return one table out of the files' tables, the last one winning.

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
    """Return the table with fewer rows, or with more that are the mean of all it has."""
    missing = rows - table.shape[0]
    if missing <= 0:
        return table[:rows]
    mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
    return torch.cat((table, mean.expand(missing, -1)))


def saved_tables(parts: Sequence[WeightPart]) -> dict[str, int]:
    """Return the vocabulary tables that an adapter holds whole, and their rows."""
    return {
        name: (*part.store.infos[foreign].shape, 0)[0]
        for part in parts
        if part.label == ADAPTER
        for name, foreign in part.parameters.items()
        if name in VOCABULARY
    }


def has_other_head(parts: Sequence[WeightPart]) -> bool:
    """Return whether the last part with an output layer holds another one than its embedding.

    Only of a model whose configuration says that both are one: some programs that fold an adapter
    in leave that as it was.
    """
    for part in reversed(parts):
        named, infos = part.parameters, part.store.infos
        head = named.get(OUTPUT)
        if head is None or part.is_dropped(head):
            continue
        table = next((named[name] for name in EMBEDDINGS if name in named), None)
        if table is None or infos[table].shape != infos[head].shape:
            return True
        dtype = None if infos[table].dtype == infos[head].dtype else torch.float32
        return not torch.equal(part.store.tensor(head, dtype), part.store.tensor(table, dtype))
    return False


def tied_heads(parts: Sequence[WeightPart]) -> list[WeightPart]:
    """Return an output layer for every part with an embedding that is both, an adapter's apart."""
    heads = []
    for part in parts:
        head = WeightStore()
        for name, foreign in part.parameters.items() if part.label != ADAPTER else ():
            if name in EMBEDDINGS:
                head.rename(part.store, foreign, "lm_head.weight")
        heads += [WeightPart(ADAPTER, head, LANGUAGE_MODEL)] if head.infos else []
    return heads

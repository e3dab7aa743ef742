"""One pass of the model over what all sequences of a step read: no padding between them."""

import warnings
from collections.abc import Sequence as Items

import torch

from lapilli.generate.engine.choosing import Share
from lapilli.generate.engine.cuda_graph import StaticSteps, static_steps, ways
from lapilli.generate.engine.media import lay_over
from lapilli.generate.engine.memory import give_back
from lapilli.generate.engine.options import EngineOptions
from lapilli.model.vlm import VisionLanguageModel
from lapilli.nn.block_store import BlockStore
from lapilli.nn.paged import PagedBatch, PagedRow
from lapilli.shapes import Float, Tensor

LONG = 128
"""New positions of one row after which memory is given back."""


class Reader:
    """Passes of the model, each in the way that suits it.

    Args:
        model: the model.
        store: where keys and values go.
        options: `compile` says how passes run in which every row grows.
        context_length: most positions of a sequence.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        store: BlockStore,
        options: EngineOptions,
        *,
        context_length: int,
    ) -> None:
        self._model = model
        self._store = store
        self._options = options
        self._context_length = context_length
        self._ways = list(ways(options.compile, store.device))
        self._steps = self._next_steps()
        self.is_steady = True
        """Whether the last pass took as long as others like it will."""

    def read(
        self, shares: Items[Share], *, unchanged: object | None = None
    ) -> Float[Tensor, "R V"] | None:
        """See the function `read`; the logits are valid until the next pass."""
        steps = self._steps
        if steps is None or not steps.takes(shares):
            self.is_steady = True
            logits = read(self._model, self._store, shares, unchanged=unchanged)
            if shares[-1].length >= LONG:
                give_back()
            return logits
        try:
            logits = steps.read(shares)
        except RuntimeError as error:
            if not (steps.is_fresh and self._ways):
                raise
            # A compiler may be missing or fail. What was written is written again.
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"EngineOptions(compile={self._options.compile!r}) does not work here, the engine "
                f"goes on with {self._ways[0]!r}: {reason}",
                stacklevel=2,
            )
            self._steps = self._next_steps()
            return self.read(shares, unchanged=unchanged)
        self.is_steady = not steps.is_fresh
        return logits

    def forget(self) -> None:
        """The model is another one."""
        if self._steps is not None:
            self._steps.forget()

    def _next_steps(self) -> StaticSteps | None:
        return static_steps(
            self._ways.pop(0),
            self._model.language_model,
            self._store,
            most_rows=self._options.max_rows,
            context_length=self._context_length,
        )


@torch.inference_mode()
def read(
    model: VisionLanguageModel,
    store: BlockStore,
    shares: Items[Share],
    *,
    unchanged: object | None = None,
) -> Float[Tensor, "R V"] | None:
    """Logits after the last token, and every guess, of the rows that have been read.

    Args:
        model: the model.
        store: where keys and values go.
        shares: those with fewest positions first.
        unchanged: the same object as before says that the model is, too; see PagedBatch.

    Returns:
        None when no row has been read to its end.
    """
    language_model = model.language_model
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    rows = []
    for share in shares:
        start, row = len(ids), share.sequence
        ids += share.tokens
        positions += range(row.length, row.length + share.length)
        rows.append(PagedRow(row.blocks, row.length, share.length))
        if share.ends:
            ends += range(start + share.count - 1, len(ids))
    x = language_model.embed(torch.tensor(ids, device=store.device))
    at = 0
    for share in shares:
        if not share.sequence.is_growing:
            lay_over(x, share.sequence, at=at, count=share.count)
        at += share.length
    hidden = language_model.forward(
        x[None],
        position_ids=torch.tensor([positions], device=store.device),
        cache=PagedBatch(store, rows, unchanged=unchanged),
    )
    if not ends:
        return None
    return language_model.logits(hidden[0, torch.tensor(ends, device=store.device)])

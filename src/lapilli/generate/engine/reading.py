"""One pass of the model over what all sequences of a step read: no padding between them."""

from collections.abc import Sequence as Items

import torch

from lapilli.generate.engine.choosing import Share
from lapilli.generate.engine.media import lay_over
from lapilli.model.vlm import VisionLanguageModel
from lapilli.nn.block_store import BlockStore
from lapilli.nn.paged import PagedBatch, PagedRow
from lapilli.shapes import Float, Tensor


@torch.inference_mode()
def read(
    model: VisionLanguageModel, store: BlockStore, shares: Items[Share]
) -> Float[Tensor, "R V"] | None:
    """Logits after the last token, and every guess, of the rows that have been read.

    Args:
        model: the model.
        store: where keys and values go.
        shares: those with fewest positions first.

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
        cache=PagedBatch(store, rows),
    )
    if not ends:
        return None
    return language_model.logits(hidden[0, torch.tensor(ends, device=store.device)])

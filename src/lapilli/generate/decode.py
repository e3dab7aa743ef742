"""One step of the language model: prompt in, or one token per row in, logits out.

Knows the cache and the mask; must not know what a token means or when to stop.
"""

from collections.abc import Sequence

import torch

from lapilli.generate.model_lock import lock_of
from lapilli.lm.base import LanguageModel
from lapilli.model.outputs import FusedBatch
from lapilli.nn.kv_cache import KVCache
from lapilli.shapes import Bool, Float, Int, Tensor


def prefill(
    language_model: LanguageModel, batch: FusedBatch, cache: KVCache
) -> Float[Tensor, "B V"]:
    """Logits after the last position of every row; the cache then holds the whole prompt.

    Args:
        language_model: any.
        batch: rows padded on the left.
        cache: empty, or holding the first `cache.length` positions of these very rows, which are
            then not computed again.
    """
    start = cache.length
    hidden = language_model.forward(
        batch.inputs_embeds[:, start:],
        position_ids=batch.position_ids[:, start:],
        attention_mask=needed_mask(batch),
        cache=cache,
    )
    # The head is the widest matrix of a small model: only the last position needs it.
    return language_model.logits(hidden[:, -1])


def decode_one(
    language_model: LanguageModel,
    token_ids: Int[Tensor, " B"],
    position_ids: Int[Tensor, "B 1"],
    attention_mask: Bool[Tensor, "B S"] | None,
    cache: KVCache,
) -> Float[Tensor, "B V"]:
    """Logits after one more token of every row, which is added to the cache."""
    hidden = language_model.forward(
        language_model.embed(token_ids.unsqueeze(1)),
        position_ids=position_ids,
        attention_mask=attention_mask,
        cache=cache,
    )
    return language_model.logits(hidden[:, -1])


def needed_mask(batch: FusedBatch) -> Bool[Tensor, "B T"] | None:
    """The mask of a batch, or None where nothing is padded: attention is faster without one."""
    return None if bool(batch.attention_mask.all()) else batch.attention_mask


class Decoding:
    """The rows of a batch while their answers grow: cache, mask and positions of the next step.

    Args:
        language_model: any.
        batch: the prompts.
        cache: see `prefill`.
        room: most tokens that may follow the prompt.
    """

    def __init__(
        self, language_model: LanguageModel, batch: FusedBatch, cache: KVCache, *, room: int
    ) -> None:
        self._language_model = language_model
        self._lock = lock_of(language_model)
        self._room = room
        self._batch: FusedBatch | None = batch
        self.cache = cache
        # Counted, not read from the last column: prepared rows of compat may end in padding.
        self._positions = batch.attention_mask.sum(dim=1, keepdim=True) - 1
        self._mask = needed_mask(batch)

    @torch.inference_mode()
    def prefill(self) -> Float[Tensor, "B V"]:
        """Logits after the prompt; the prompt's embeddings are let go."""
        batch, self._batch = self._batch, None
        if batch is None:
            raise RuntimeError("this prompt was prefilled before")
        with self._lock.turn:
            logits = prefill(self._language_model, batch, self.cache)
        self._positions = self._positions + 1
        if self._mask is not None:
            # Room for all steps at once, so that a step only takes a longer view of it.
            rows, length = self._mask.shape
            grown = self._mask.new_ones(rows, length + self._room)
            grown[:, :length] = self._mask
            self._mask = grown
        return logits

    @torch.inference_mode()
    def advance(self, token_ids: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Logits after one more token of every row."""
        mask = None if self._mask is None else self._mask[:, : self.cache.length + 1]
        with self._lock.turn:
            logits = decode_one(self._language_model, token_ids, self._positions, mask, self.cache)
        self._positions += 1
        return logits

    @torch.inference_mode()
    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; a row may be named more than once."""
        index = torch.tensor(rows, device=self._positions.device)
        self.cache.reorder(index)
        self._positions = self._positions[index]
        if self._mask is not None:
            self._mask = self._mask[index]

"""Passes of a language model over a padded batch: prefill, then one token per row at a time.

A model is run by one thread at a time: engines and the plain loop hold the same lock in every
pass. Knows the cache and the mask; must not know the meaning of a token or when to stop.
"""

import os
import threading
import weakref
from collections.abc import Sequence

import torch

from lapilli.lm.base import LanguageModel
from lapilli.model.fuse import FusedBatch
from lapilli.nn.kv_cache import KVCache
from lapilli.shapes import Float, Int, Tensor


class ModelLock:
    """Lock of one language model; the thread that holds it may take it again.

    Taken as `with lock.turn:`, never through a function: an interrupt between call and `with` would
    leave it locked for good.
    """

    def __init__(self) -> None:
        self.turn = threading.RLock()

    def reset(self) -> None:
        """Unlock in a forked process, which has none of the threads that held it."""
        self.turn = threading.RLock()


_LOCKS: weakref.WeakKeyDictionary[object, ModelLock] = weakref.WeakKeyDictionary()
_FINDING = ModelLock()


def lock_of(language_model: object) -> ModelLock:
    """Return the lock of this language model, the same one for all callers."""
    with _FINDING.turn:
        return _LOCKS.setdefault(language_model, ModelLock())


def _reset_locks() -> None:
    for lock in (_FINDING, *_LOCKS.values()):
        lock.reset()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_reset_locks)


class DecodingBatch:
    """The rows of a batch while they are decoded: cache, mask and positions of the next step.

    Args:
        language_model: any.
        batch: the prompts.
        cache: empty, or holding the first `cache.length` positions of these very rows, which are
            then not computed again.
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
        # None where nothing is padded: attention is faster without a mask.
        self._mask = None if bool(batch.attention_mask.all()) else batch.attention_mask

    @torch.inference_mode()
    def prefill(self) -> Float[Tensor, "B V"]:
        """Return the logits after the prompt, whose embeddings are released."""
        batch, self._batch = self._batch, None
        if batch is None:
            raise RuntimeError("this prompt was prefilled before")
        start = self.cache.length
        with self._lock.turn:
            hidden = self._language_model.forward(
                batch.inputs_embeds[:, start:],
                position_ids=batch.position_ids[:, start:],
                attention_mask=self._mask,
                cache=self.cache,
            )
            # Only the last position: the head is the widest matrix of a small model.
            logits = self._language_model.logits(hidden[:, -1])
        self._positions = self._positions + 1
        if self._mask is not None:
            # Allocated once for all steps; a step takes a longer view of it.
            rows, length = self._mask.shape
            grown = self._mask.new_ones(rows, length + self._room)
            grown[:, :length] = self._mask
            self._mask = grown
        return logits

    @torch.inference_mode()
    def advance(self, token_ids: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Return the logits after one more token of every row."""
        mask = None if self._mask is None else self._mask[:, : self.cache.length + 1]
        with self._lock.turn:
            hidden = self._language_model.forward(
                self._language_model.embed(token_ids.unsqueeze(1)),
                position_ids=self._positions,
                attention_mask=mask,
                cache=self.cache,
            )
            logits = self._language_model.logits(hidden[:, -1])
        self._positions += 1
        return logits

    @torch.inference_mode()
    def take(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row may be named more than once."""
        index = torch.tensor(rows, device=self._positions.device)
        self.cache.reorder(index)
        self._positions = self._positions[index]
        if self._mask is not None:
            self._mask = self._mask[index]

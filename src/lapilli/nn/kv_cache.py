"""KV cache: keys and values of the positions that were already read, per layer.

per layer  [B, K, capacity, A]     the first `length` positions are filled
                                   append writes in place; full -> a buffer twice as long
"""

from collections.abc import Sequence

import torch

from lapilli.config.model import TextConfig
from lapilli.errors import GenerationError
from lapilli.nn.attention import attend
from lapilli.nn.paged import PagedBatch
from lapilli.nn.segments import Segments
from lapilli.nn.static_batch import StaticBatch
from lapilli.shapes import Float, Int, Tensor


class KVCache:
    """Keys and values per layer, preallocated.

    Meant for generation: appended tensors are written into a buffer, so run under
    `torch.no_grad()` or `torch.inference_mode()`.
    """

    ragged = False
    """All rows have the same number of positions; the caller's mask says which are padding."""

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        capacity: int = 256,
    ) -> None:
        self._shape = (batch, config.num_kv_heads, config.head_dim)
        self._lengths = [0] * config.num_layers
        self._keys = [self._empty(capacity, dtype, device) for _ in self._lengths]
        self._values = [self._empty(capacity, dtype, device) for _ in self._lengths]

    def _empty(self, capacity: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        batch, heads, width = self._shape
        return torch.empty(batch, heads, capacity, width, dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Return the number of positions that every layer holds."""
        return self._lengths[-1]

    @property
    def batch(self) -> int:
        """Return the number of sequences."""
        return self._shape[0]

    @property
    def device(self) -> torch.device:
        """Return where the positions are."""
        return self._keys[0].device

    @property
    def capacity(self) -> int:
        """Return the positions that fit before the next growth."""
        return self._keys[0].shape[2]

    def append(
        self, layer: int, k: Float[Tensor, "B K T A"], v: Float[Tensor, "B K T A"]
    ) -> tuple[Float[Tensor, "B K S A"], Float[Tensor, "B K S A"]]:
        """Append to a layer and return all of it, the new ones last: views until the next append.

        Raises:
            GenerationError: another number of rows than the cache was made for.
        """
        if k.shape[0] != self.batch:
            raise GenerationError(
                f"the KV cache holds {self.batch} rows but {k.shape[0]} rows were appended: "
                "reorder() it or make a new one"
            )
        start = self._lengths[layer]
        end = start + k.shape[2]
        if end > self._keys[layer].shape[2]:
            self._grow(layer, end)
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        self._lengths[layer] = end
        return keys[:, :, :end], values[:, :, :end]

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "B Q T A"],
        k: Float[Tensor, "B K T A"],
        v: Float[Tensor, "B K T A"],
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
        slopes: Tensor | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "B Q T A"]:
        """Append new keys and values, then `attention.attend` over all of the layer's."""
        keys, values = self.append(layer, k, v)
        return attend(q, keys, values, mask=mask, scale=scale, softcap=softcap)

    def _grow(self, layer: int, needed: int) -> None:
        """Return a buffer at least twice as long, so that n appends copy O(n) positions in all."""
        for buffers in (self._keys, self._values):
            old, filled = buffers[layer], self._lengths[layer]
            new = self._empty(max(needed, 2 * old.shape[2]), old.dtype, old.device)
            new[:, :, :filled] = old[:, :, :filled]
            buffers[layer] = new

    def reorder(self, rows: Sequence[int] | Int[Tensor, " rows"]) -> None:
        """Make row i what row rows[i] was; fewer or more rows than before are allowed."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self._keys[0].device)
        if index.tolist() == list(range(self.batch)):
            return
        self._shape = (len(index), *self._shape[1:])
        for layer, filled in enumerate(self._lengths):
            for buffers in (self._keys, self._values):
                old = buffers[layer]
                new = self._empty(old.shape[2], old.dtype, old.device)
                new[:, :, :filled] = old[:, :, :filled].index_select(0, index)
                buffers[layer] = new

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            GenerationError: the cache is shorter than that.
        """
        if not 0 <= length <= self.length:
            raise GenerationError(
                f"a KV cache of {self.length} positions cannot be truncated to {length}"
            )
        self._lengths = [length] * len(self._lengths)


Cache = KVCache | PagedBatch | StaticBatch | Segments
"""The `cache` of a language model: rows of one length, or ragged rows over blocks."""

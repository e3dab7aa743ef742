"""Paged keys and values: many sequences in blocks of P positions, per layer.

    per layer   keys, values  [N, K, P, A]
    a sequence  a table of blocks; position i lies in block table[i // P] at offset i % P

Block 0 is never written: tables of unequal length are padded with it.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from lapilli.config.model import TextConfig
from lapilli.kernels.attention import WIDTH_STEP, decode_attention
from lapilli.kernels.library import native
from lapilli.kernels.store import store_positions
from lapilli.shapes import Float, Int, Tensor


class BlockStore:
    """Memory for keys and values.

    On a CPU the operating system hands out the memory page by page as blocks are written.

    Args:
        config: layers, heads and widths.
        num_blocks: blocks, block 0 included.
        block_size: positions of a block.
        dtype: of the model, in which keys and values come and go.
        kept_dtype: of the memory; None: the model's.
        device: of the memory.
    """

    def __init__(
        self,
        config: TextConfig,
        num_blocks: int,
        *,
        block_size: int,
        dtype: torch.dtype,
        kept_dtype: torch.dtype | None = None,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = kept_dtype or dtype
        self.float_dtype = dtype
        self.device = device
        self._heads = config.num_kv_heads
        self._width = config.head_dim
        shape = (num_blocks, self._heads, block_size, self._width)
        self.keys = [lazy_zeros(shape, self.dtype, device) for _ in range(config.num_layers)]
        self.values = [lazy_zeros(shape, self.dtype, device) for _ in range(config.num_layers)]

    @staticmethod
    def bytes_per_block(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
        """Return the memory of one block in all layers; `dtype` is that of the memory."""
        positions = 2 * config.num_layers * config.num_kv_heads * block_size
        return positions * config.head_dim * dtype.itemsize

    def tensors(self) -> list[Tensor]:
        """Return all memory, every tensor with the blocks first."""
        return [*self.keys, *self.values]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks that somebody used before: nothing of theirs may leak, not even NaN."""
        if blocks:
            index = torch.tensor(blocks, device=self.device)
            for tensor in self.tensors():
                tensor.index_fill_(0, index, 0)

    def copy(self, source: int, target: int) -> None:
        """Copy one block over another."""
        for tensor in self.tensors():
            tensor[target] = tensor[source]

    def write(
        self,
        layer: int,
        blocks: Int[Tensor, " T"],
        offsets: Int[Tensor, " T"],
        k: Float[Tensor, "T K A"],
        v: Float[Tensor, "T K A"],
    ) -> None:
        """Write keys and values of T positions, each into its place."""
        store_positions(self.keys[layer], self.values[layer], blocks, offsets, k, v)

    @property
    def has_kernel(self) -> bool:
        """Return whether the compiled decode attention reads these blocks."""
        fits = self.float_dtype == torch.float32 and self._width % WIDTH_STEP == 0
        return fits and self.device.type == "cpu" and native() is not None

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "R Q A"],
        tables: Int[Tensor, "R n"],
        lengths: Int[Tensor, " R"],
        *,
        scale: float | None,
        window: int | None,
        slopes: Float[Tensor, " Q"] | None,
        softcap: float | None,
    ) -> Float[Tensor, "R Q A"]:
        """Attend with one query per row over the row's positions; where `has_kernel`."""
        return decode_attention(
            q,
            self.keys[layer],
            self.values[layer],
            tables,
            lengths,
            scale=scale,
            window=window,
            slopes=slopes,
            softcap=softcap,
            **self._scales(layer),
        )

    def _scales(self, layer: int) -> dict[str, Tensor]:
        return {}

    def rows_of(self, tables: Int[Tensor, "R n"]) -> Int[Tensor, " places"]:
        """Return what `gather` takes: the same for all layers, so it is computed once a step."""
        heads = torch.arange(self._heads, device=self.device)[None, :, None]
        return (tables[:, None] * self._heads + heads).flatten()

    def gather(
        self, layer: int, places: Int[Tensor, " places"], rows: int
    ) -> tuple[Float[Tensor, "R K S A"], Float[Tensor, "R K S A"]]:
        """Return copies of keys and values of R tables of n blocks, S = n * P."""
        return (
            self._gathered(self.keys[layer], places, rows).to(self.float_dtype),
            self._gathered(self.values[layer], places, rows).to(self.float_dtype),
        )

    def as_kept(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return new keys or values as they will come back.

        Who reads a prompt reads these: an answer does not depend on what was kept of it before.
        """
        return x.to(self.dtype).to(self.float_dtype)

    def _gathered(self, memory: Tensor, places: Tensor, rows: int) -> Tensor:
        found = memory.view(-1, self.block_size, self._width).index_select(0, places)
        return found.view(rows, self._heads, -1, self._width)


class QuantizedBlockStore(BlockStore):
    """The same in int8, with one float32 scale per position and head.

    A vector of A numbers is divided by its largest magnitude / 127 and rounded, so a number is off
    by at most 1/254 of the largest one in its vector.
    """

    def __init__(
        self,
        config: TextConfig,
        num_blocks: int,
        *,
        block_size: int,
        dtype: torch.dtype,
        kept_dtype: torch.dtype | None = torch.int8,
        device: torch.device,
    ) -> None:
        super().__init__(
            config,
            num_blocks,
            block_size=block_size,
            dtype=dtype,
            kept_dtype=kept_dtype,
            device=device,
        )
        shape = (num_blocks, self._heads, block_size)
        self.key_scales = [lazy_zeros(shape, torch.float32, device) for _ in self.keys]
        self.value_scales = [lazy_zeros(shape, torch.float32, device) for _ in self.keys]

    @staticmethod
    def bytes_per_block(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
        """Return the memory of one block in all layers, scales included; `dtype` does not count."""
        positions = 2 * config.num_layers * config.num_kv_heads * block_size
        return positions * (config.head_dim + torch.float32.itemsize)

    def tensors(self) -> list[Tensor]:
        """Return all memory, every tensor with the blocks first."""
        return [*self.keys, *self.values, *self.key_scales, *self.value_scales]

    def write(
        self,
        layer: int,
        blocks: Int[Tensor, " T"],
        offsets: Int[Tensor, " T"],
        k: Float[Tensor, "T K A"],
        v: Float[Tensor, "T K A"],
    ) -> None:
        """Write keys and values of T positions, rounded, each into its place."""
        for memory, scales, x in (
            (self.keys[layer], self.key_scales[layer], k),
            (self.values[layer], self.value_scales[layer], v),
        ):
            memory[blocks, :, offsets], scales[blocks, :, offsets] = _rounded(x)

    def gather(
        self, layer: int, places: Int[Tensor, " places"], rows: int
    ) -> tuple[Float[Tensor, "R K S A"], Float[Tensor, "R K S A"]]:
        """Return keys and values of R tables of n blocks, S = n * P, as floats again."""
        keys = self._gathered(self.keys[layer], places, rows)
        values = self._gathered(self.values[layer], places, rows)
        key_scales, value_scales = (
            scales.view(-1, self.block_size).index_select(0, places).view(*keys.shape[:3], 1)
            for scales in (self.key_scales[layer], self.value_scales[layer])
        )
        return (keys * key_scales).to(self.float_dtype), (values * value_scales).to(
            self.float_dtype
        )

    def as_kept(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return new keys or values as they will come back."""
        rounded, scale = _rounded(x)
        return (rounded * scale[..., None]).to(self.float_dtype)

    def _scales(self, layer: int) -> dict[str, Tensor]:
        return {"key_scales": self.key_scales[layer], "value_scales": self.value_scales[layer]}


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors in int8, and the scale of each."""
    x = x.float()
    scale = x.abs().amax(dim=-1) / 127
    rounded = (x / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round()
    return rounded.to(torch.int8), scale


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that take memory page by page as they are written, where the device can.

    Zeros, not whatever was there: what attention masks out must still be finite. torch.zeros would
    write every page at once; numpy leaves it to the operating system.
    """
    # Whoever makes a store inside inference mode must still be able to change it outside.
    with torch.inference_mode(mode=False):
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(memory).view(dtype).view(shape)

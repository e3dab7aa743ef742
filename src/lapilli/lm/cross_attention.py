"""Gated cross-attention: positions of a sequence look at features that stand beside it.

    x [B, T, D] --norm--> q --.
    features [B, M, D] -> k, v --attention--> tanh(gate) -> + -> norm -> MLP -> tanh(gate) -> +

Blocks stand between the layers of a language model. Both gates begin at 0, so that a fresh block
hands on what it is given, bit by bit. A position looks at the features whose place is not after it;
one that sees none goes past the block untouched. Knows rows, features and places; must not know
where features come from.

Source: Alayrac et al. 2022, Flamingo (arXiv 2204.14198) section 3.1.2. There a text sees the last
    picture before it alone, and positions without one go through the feed-forward block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from lapilli.config.model import DecoderConfig
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.nn.attention import attend
from lapilli.nn.layers import GatedMLP, RMSNorm
from lapilli.shapes import Bool, Float, Int, Tensor

Sight = tuple[Bool[Tensor, "B 1 T M"], Bool[Tensor, "B T 1"]]
"""Which features every position sees, and whether it sees any."""

ENDLESS = 1 << 62
"""The end of features that everything after them sees; the start of what nobody sees."""


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Features beside the rows of a pass.

    Attributes:
        features: of every row, padded with what nobody sees.
        starts: the first position of the row, its padding counted, that sees the feature.
        ends: the position from which on it is not seen any more.
        kept: keys and values by layer, made once where no gradient is asked for: the passes of an
            answer read the same memory.
        parts: the memories that this one of a single row was joined of, which keep theirs.
    """

    features: Float[Tensor, "B M D"]
    starts: Int[Tensor, "B M"]
    ends: Int[Tensor, "B M"]
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    parts: tuple["Memory", ...] = ()

    @classmethod
    def joined(cls, parts: Sequence["Memory"], places: Sequence[tuple[int, int]]) -> "Memory":
        """Return memories of one row each as that of a row which they share.

        Args:
            parts: at least one.
            places: of each the first position that sees all of it, and the end.
        """
        counts = [part.features.shape[1] for part in parts]
        edges = torch.tensor(places).repeat_interleave(torch.tensor(counts), dim=0)
        features = torch.cat([part.features for part in parts], dim=1)
        starts, ends = edges.to(features.device).T[:, None]
        return cls(features, starts, ends, parts=tuple(parts))

    @classmethod
    def of_rows(
        cls,
        features: Sequence[Float[Tensor, "_ D"]],
        places: Sequence[tuple[int, int, int]],
        *,
        rows: int,
        like: Tensor,
    ) -> "Memory":
        """Return the memory of some rows.

        Args:
            features: of every item.
            places: of every item its row, the first position that sees it, and the end.
            rows: B.
            like: a tensor of the width, dtype and device of the features.
        """
        counts = [0] * rows
        for item, (row, _, _) in zip(features, places, strict=True):
            counts[row] += len(item)
        shape = rows, max(1, *counts)
        starts = torch.full(shape, ENDLESS)
        ends = torch.full(shape, ENDLESS)
        of_row: list[list[Tensor]] = [[] for _ in range(rows)]
        filled = [0] * rows
        for item, (row, start, end) in zip(features, places, strict=True):
            here = slice(filled[row], filled[row] + len(item))
            starts[row, here], ends[row, here] = start, end
            of_row[row].append(item.to(like.device, like.dtype))
            filled[row] = here.stop
        padded = [
            torch.cat([*items, like.new_zeros(shape[1] - count, like.shape[-1])])
            for items, count in zip(of_row, counts, strict=True)
        ]
        return cls(torch.stack(padded), starts.to(like.device), ends.to(like.device))

    def sight(self, past: int, length: int) -> Sight:
        """Return which features `length` positions after `past` see, and whether they see any.

        A position that sees none is let see all, so that its attention stays finite.
        """
        places = torch.arange(past, past + length, device=self.starts.device)[None, :, None]
        seen = (self.starts[:, None] <= places) & (places < self.ends[:, None])
        looks = seen.any(dim=-1, keepdim=True)
        return (seen | ~looks)[:, None], looks

    def take(self, rows: Int[Tensor, " n"]) -> "Memory":
        """Return the memory of these rows, in this order; one may be named more than once."""
        kept = {layer: (k[rows], v[rows]) for layer, (k, v) in self.kept.items()}
        return Memory(self.features[rows], self.starts[rows], self.ends[rows], kept)


class GatedCrossAttention(nn.Module):
    """Attention to a memory, then a gated MLP, each behind its norm and before its gate.

    Args:
        config: of the decoder, whose heads and widths the block has.
        layer: number of the layer that it stands before.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        queries, groups = config.num_heads * head_dim, config.num_kv_heads * head_dim
        norm = partial(RMSNorm, width, config.norm_eps, config.norm_offset)
        self.attention_norm = norm()
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, groups, bias=False)
        self.v_proj = nn.Linear(width, groups, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_norm = norm()
        self.mlp = GatedMLP(
            width, config.intermediate_size, activation=config.activation, bias=False
        )
        self.mlp_gate = nn.Parameter(torch.zeros(1))
        self.head_dim = head_dim
        self.layer = layer

    def forward(
        self, x: Float[Tensor, "B T D"], memory: Memory, sight: Sight
    ) -> Float[Tensor, "B T D"]:
        """Return the hidden states after the block; `sight` is the memory's, of these positions."""
        mask, looks = sight
        q = self._by_head(self.q_proj(self.attention_norm(x)))
        keys, values = self.keys_values(memory)
        seen = attend(q, keys.to(q.dtype), values.to(q.dtype), mask=mask)
        x = x + _gated(self.o_proj(seen.transpose(1, 2).flatten(2)), self.attention_gate, looks, x)
        return x + _gated(self.mlp(self.mlp_norm(x)), self.mlp_gate, looks, x)

    def keys_values(
        self, memory: Memory
    ) -> tuple[Float[Tensor, "B K M A"], Float[Tensor, "B K M A"]]:
        """Return keys and values of a memory; kept with it where no gradient is asked for."""
        found = memory.kept.get(self.layer)
        if found is not None:
            return found
        if memory.parts:
            of_parts = [self.keys_values(part) for part in memory.parts]
            keys, values = (torch.cat(all_of, dim=2) for all_of in zip(*of_parts, strict=True))
        else:
            features = memory.features
            keys, values = (
                self._by_head(self.k_proj(features)),
                self._by_head(self.v_proj(features)),
            )
        if not torch.is_grad_enabled():
            memory.kept[self.layer] = keys, values
        return keys, values

    def _by_head(self, x: Float[Tensor, "B n width"]) -> Float[Tensor, "B heads n A"]:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


def _gated(
    update: Float[Tensor, "B T D"], gate: Float[Tensor, "1"], looks: Tensor, like: Tensor
) -> Float[Tensor, "B T D"]:
    """Return a share of an update, nothing where nothing is seen, in the dtype of `like`."""
    share = (torch.tanh(gate) * update).to(like.dtype)
    return torch.where(looks, share, share.new_zeros(()))


def build_cross_attention(config: DecoderConfig, every: int) -> nn.ModuleDict:
    """Return the blocks by the number of the layer that they stand before, with fresh weights.

    Raises:
        ConfigError: the model has fewer layers than `every`, so there would be no block.
    """
    places = range(every - 1, config.num_layers, every) if every > 0 else ()
    if not places:
        raise ConfigError(
            f"every is {every}, and the language model has {config.num_layers} layers: a block "
            f"stands before every n-th of them, so expected 1 to {config.num_layers}"
        )
    return nn.ModuleDict({str(layer): GatedCrossAttention(config, layer) for layer in places})


def refuse_memory(memory: Memory | None, name: str) -> None:
    """Refuse features beside the sequence, for a language model that has no blocks for them.

    Raises:
        UnsupportedModelError: there are some.
    """
    if memory is not None:
        raise UnsupportedModelError(
            f"{name} has no gated cross-attention, and media stand beside its sequence: declare "
            'the modality with fusion = "tokens", or take a Llama-shaped language model'
        )

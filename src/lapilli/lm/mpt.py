"""MosaicML's MPT: linear biases instead of positions, one fused qkv; parameters as in its files.

    inputs_embeds -> [ norm_1 -> attn -> + -> norm_2 -> ffn -> + ] x L -> norm_f -> hidden

Knows nothing of modalities or files.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lapilli.config.model import MptConfig
from lapilli.lm.cross_attention import Memory, refuse_memory
from lapilli.nn.attention import attend, causal_bias, causal_mask
from lapilli.nn.kv_cache import Cache, KVCache, Segments
from lapilli.nn.linear import kept_linear, linear_rows
from lapilli.shapes import Bool, Float, Int, Tensor


def alibi_slopes(num_heads: int, bias_max: int) -> Float[Tensor, " Q"]:
    """Return the slope by which each head forgets with distance, float32 on the CPU.

    Source: Press et al. 2022, "Train short, test long", with MPT's bias maximum; for a number of
    heads that is not a power of two, every second slope of the next power comes first.
    """
    power = 2 ** math.ceil(math.log2(num_heads))
    steps = torch.arange(1, power + 1, dtype=torch.float32, device="cpu") * (bias_max / power)
    slopes = torch.exp2(-steps)
    if power != num_heads:
        slopes = torch.cat((slopes[1::2], slopes[::2]))[:num_heads]
    return slopes


class MptAttention(nn.Module):
    """Self-attention with a fused projection and an additive distance bias."""

    def __init__(self, config: MptConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.head_dim = config.head_dim
        self.clip = config.clip_qkv
        self.scale = config.softmax_scale
        self.layer = layer

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        bias: Float[Tensor, "rows Q T S"] | None,
        slopes: Float[Tensor, " Q"],
        cache: Cache | None,
    ) -> Float[Tensor, "B T D"]:
        """Return the block's update, without the residual."""
        fused = self.Wqkv(x)
        if self.clip is not None:
            fused = fused.clamp(-self.clip, self.clip)
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (part.view(heads).transpose(1, 2) for part in fused.chunk(3, dim=-1))
        if cache is None:
            seen = attend(q, k, v, mask=bias, scale=self.scale)
        elif isinstance(cache, Segments):
            seen = cache.attend(q, k, v, scale=self.scale, slopes=slopes)
        else:
            seen = cache.attend(self.layer, q, k, v, mask=bias, scale=self.scale, slopes=slopes)
        out: Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return out


class MptFeedForward(nn.Module):
    """down(gelu(up(x))), the exact erf form."""

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        inner = config.expansion_ratio * config.hidden_size
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Return the block's update, without the residual."""
        out: Tensor = self.down_proj(functional.gelu(self.up_proj(x)))
        return out


class MptBlock(nn.Module):
    """Attention and feed-forward, each with its norm before and its residual around."""

    def __init__(self, config: MptConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_1 = nn.LayerNorm(width, eps=config.norm_eps, bias=False)
        self.attn = MptAttention(config, layer)
        self.norm_2 = nn.LayerNorm(width, eps=config.norm_eps, bias=False)
        self.ffn = MptFeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        bias: Float[Tensor, "rows Q T S"] | None,
        slopes: Float[Tensor, " Q"],
        cache: Cache | None,
    ) -> Float[Tensor, "B T D"]:
        """Return the hidden states after this block."""
        x = x + self.attn(self.norm_1(x), bias, slopes, cache)
        out: Tensor = x + self.ffn(self.norm_2(x))
        return out


class MptStack(nn.Module):
    """Part of the model that the files call `transformer`: embeddings, blocks, the final norm."""

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(MptBlock(config, i) for i in range(config.num_layers))
        self.norm_f = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)


class Mpt(nn.Module):
    """MPT behind the LanguageModel protocol.

    Source: Hugging Face MptForCausalLM (same numbers).
    Note: the bias of a head depends on the distance between query and key only, so padding on the
    left moves nothing, and `position_ids` are not read.
    """

    supports_varlen = True

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = MptStack(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._slopes = alibi_slopes(config.num_heads, config.alibi_bias_max)
        self.gradient_checkpointing = False

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Return the vectors of token ids."""
        vectors: Tensor = self.transformer.wte(ids)
        return vectors

    def forward(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        *,
        position_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the hidden states after the final norm; see LanguageModel.forward."""
        refuse_memory(memory, "MPT")
        length = inputs_embeds.shape[1]
        if self._slopes.device != inputs_embeds.device:
            self._slopes = self._slopes.to(inputs_embeds.device)
        slopes, bias = self._slopes, None
        if cache is None or not cache.ragged:
            keys = length if cache is None else cache.length + length
            mask = causal_mask(attention_mask, length, keys, device=inputs_embeds.device)
            bias = causal_bias(slopes, mask, length, keys, inputs_embeds)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        x = inputs_embeds
        for block in self.transformer.blocks:
            x = (
                checkpoint(block, x, bias, slopes, cache, use_reentrant=False)
                if recompute
                else block(x, bias, slopes, cache)
            )
        out: Tensor = self.transformer.norm_f(x)
        return out

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Return the scores of every vocabulary entry."""
        if self.config.tie_embeddings:
            return kept_linear(hidden, self.transformer.wte.weight, None)
        scores: Tensor = self.lm_head(hidden)
        return scores

    def token_logits(
        self, hidden: Float[Tensor, "... D"], ids: Int[Tensor, " n"]
    ) -> Float[Tensor, "... n"]:
        """Return the scores of these vocabulary entries alone."""
        if self.config.tie_embeddings:
            return kept_linear(hidden, self.transformer.wte.weight[ids], None)
        return linear_rows(hidden, self.lm_head, ids)

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """Return an empty cache in the dtype and on the device of the weights."""
        weight = self.transformer.norm_f.weight
        return KVCache(self.config, batch, weight.dtype, weight.device, capacity=capacity)

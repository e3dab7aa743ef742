"""The Llama-shaped decoder: llama, vicuna, mistral, yi, qwen2; parameters named as in their files.

    inputs_embeds -> [ norm -> attention -> + -> norm -> gated MLP -> + ] x L -> norm -> hidden

Knows nothing of modalities or files. What differs between families is in DecoderConfig.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lapilli.config.model import DecoderConfig
from lapilli.lm.fused_layer import FusedLayer
from lapilli.nn.attention import attend, causal_mask
from lapilli.nn.kv_cache import Cache, KVCache
from lapilli.nn.linear import project
from lapilli.nn.mlp import GatedMLP
from lapilli.nn.norm import RMSNorm
from lapilli.nn.rotary import Rotary, rotate
from lapilli.nn.segments import Segments
from lapilli.shapes import Bool, Float, Int, Tensor

RotaryTable = tuple[Tensor, Tensor]


class DecoderAttention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        queries, groups = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, groups, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, groups, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=config.output_bias)
        self.head_dim = head_dim
        self.window = config.sliding_window
        self.layer = layer

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        table: RotaryTable,
        mask: Bool[Tensor, "rows 1 T S"] | None,
        cache: Cache | None,
    ) -> Float[Tensor, "B T D"]:
        """The block's update, without the residual."""
        heads = (*x.shape[:2], -1, self.head_dim)
        projected = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.view(heads).transpose(1, 2) for y in projected)  # [B, Q or K, T, A]
        del projected  # a long prompt's unrotated queries and keys are megabytes
        q, k = rotate(q, *table), rotate(k, *table)
        if cache is None:
            seen = attend(q, k, v, mask=mask)
        elif isinstance(cache, Segments):
            seen = cache.attend(q, k, v, window=self.window)
        else:
            seen = cache.attend(self.layer, q, k, v, mask=mask, window=self.window)
        out: Tensor = self.o_proj(seen.transpose(1, 2).flatten(2))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each with its norm before and its residual around."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = DecoderAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
        )
        self._fused = FusedLayer(self)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        table: RotaryTable,
        mask: Bool[Tensor, "rows 1 T S"] | None,
        cache: Cache | None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after this layer."""
        if not torch.compiler.is_compiling():
            fused = self._fused.run(x, table, cache, index=self.self_attn.layer)
            if fused is not None:
                return fused
        x = x + self.self_attn(self.input_layernorm(x), table, mask, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DecoderStack(nn.Module):
    """What the files call `model`: embeddings, layers, the final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """A Llama-shaped language model behind the LanguageModel protocol.

    With tied embeddings there is no `lm_head`: the logits read `model.embed_tokens.weight`.

    Source: Hugging Face LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM (same numbers).
    """

    supports_varlen = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        self.gradient_checkpointing = False

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Vectors of token ids."""
        vectors: Tensor = self.model.embed_tokens(ids)
        return vectors

    def forward(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        *,
        position_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after the final norm; see LanguageModel.forward.

        While training with `gradient_checkpointing` set, the layers' inner values are computed
        again in the backward pass instead of being kept.
        """
        length = inputs_embeds.shape[1]
        mask = None
        if cache is None or not cache.ragged:
            past = 0 if cache is None else cache.length
            mask = causal_mask(
                attention_mask,
                length,
                past + length,
                window=self.config.sliding_window,
                device=inputs_embeds.device,
            )
        table = self.rotary.table(position_ids, inputs_embeds.dtype)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        x = inputs_embeds
        for layer in self.model.layers:
            if recompute:
                x = checkpoint(layer, x, table, mask, cache, use_reentrant=False)
            else:
                x = layer(x, table, mask, cache)
        out: Tensor = self.model.norm(x)
        return out

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Scores of every vocabulary entry."""
        if self.config.tie_embeddings:
            return functional.linear(hidden, self.model.embed_tokens.weight)
        scores: Tensor = self.lm_head(hidden)
        return scores

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """An empty cache in the dtype and on the device of the weights."""
        weight = self.model.norm.weight
        return KVCache(self.config, batch, weight.dtype, weight.device, capacity=capacity)

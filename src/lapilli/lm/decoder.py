"""The Llama-shaped decoder of every family but MPT; parameters named as in their files.

    inputs_embeds -> [ norm -> attention -> + -> norm -> gated MLP -> + ] x L -> norm -> hidden
    memory ----------^ before every n-th layer, where the model has blocks (lm/cross_attention.py)

Knows nothing of modalities or files. What differs between families is in DecoderConfig. A step that
is added here is followed everywhere: where lm/fused_layer.py computes a layer in one call, it first
compares that with `DecoderLayer.forward`.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lapilli.config.model import DecoderConfig
from lapilli.errors import ConfigError
from lapilli.kernels.layer import rotate
from lapilli.lm.cross_attention import Memory, Sight, build_cross_attention, refuse_memory
from lapilli.lm.fused_layer import FusedLayer, FusedLayers
from lapilli.nn.attention import attend, causal_mask
from lapilli.nn.kv_cache import Cache, KVCache, Segments
from lapilli.nn.layers import GatedMLP, RMSNorm, Rotary
from lapilli.nn.linear import kept_linear, linear_rows, project
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
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(head_dim, config.norm_eps, config.norm_offset)
        self.qk_norm = config.qk_norm
        self.head_dim = head_dim
        self.scale = None if config.query_scalar is None else config.query_scalar**-0.5
        self.softcap = config.attention_softcap
        self.window = config.window(layer)
        self.layer = layer

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        table: RotaryTable,
        mask: Bool[Tensor, "rows 1 T S"] | None,
        cache: Cache | None,
    ) -> Float[Tensor, "B T D"]:
        """Return the block's update, without the residual."""
        heads = (*x.shape[:2], -1, self.head_dim)
        projected = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.view(heads).transpose(1, 2) for y in projected)  # [B, Q or K, T, A]
        del projected  # a long prompt's unrotated queries and keys are megabytes
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *table), rotate(k, *table)
        scale, softcap = self.scale, self.softcap
        if cache is None:
            seen = attend(q, k, v, mask=mask, scale=scale, softcap=softcap)
        elif isinstance(cache, Segments):
            seen = cache.attend(q, k, v, window=self.window, scale=scale, softcap=softcap)
        else:
            seen = cache.attend(
                self.layer, q, k, v, mask=mask, scale=scale, window=self.window, softcap=softcap
            )
        out: Tensor = self.o_proj(seen.transpose(1, 2).flatten(2))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each with its norm before and its residual around.

    With `post_norms` each has a norm behind it as well. The files then call the norm before the MLP
    `pre_feedforward_layernorm`, and `post_attention_layernorm` is behind the attention.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.norm_eps, config.norm_offset)
        self.input_layernorm = norm()
        self.self_attn = DecoderAttention(config, layer)
        self.post_attention_layernorm = norm()
        self.post_norms = config.post_norms
        self.config = config
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
        )
        self.fused = FusedLayer(self)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        table: RotaryTable,
        mask: Bool[Tensor, "rows 1 T S"] | None,
        cache: Cache | None,
    ) -> Float[Tensor, "B T D"]:
        """Return the hidden states after this layer."""
        if not torch.compiler.is_compiling():
            fused = self.fused.run(x, table, cache, index=self.self_attn.layer)
            if fused is not None:
                return fused
        update = self.self_attn(self.input_layernorm(x), table, mask, cache)
        if not self.post_norms:
            x = x + update
            out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
            return out
        x = x + self.post_attention_layernorm(update)
        update = self.mlp(self.pre_feedforward_layernorm(x))
        y: Tensor = x + self.post_feedforward_layernorm(update)
        return y


class DecoderStack(nn.Module):
    """Part of the model that the files call `model`: embeddings, layers, the final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)


class Decoder(nn.Module):
    """A Llama-shaped language model behind the LanguageModel protocol.

    With tied embeddings there is no `lm_head`: the logits read `model.embed_tokens.weight`.

    Source: the numbers of Hugging Face's ...ForCausalLM of the families in config/families/.
    """

    supports_varlen = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        self.local_rotary = Rotary(config, local=True)
        self.cross_attention = nn.ModuleDict()
        self.gradient_checkpointing = False
        self._fused = FusedLayers(self, DecoderLayer)

    @property
    def local_layers(self) -> list[bool]:
        """Return which layers have the positions of local ones."""
        return [self._has_local_positions(i) for i in range(len(self.model.layers))]

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Return the vectors of token ids."""
        vectors: Tensor = self.model.embed_tokens(ids)
        scale = self.config.embedding_scale
        if scale == 1.0:
            return vectors
        # Rounded to the dtype first, as Gemma was trained.
        return vectors * torch.tensor(scale, dtype=vectors.dtype, device=vectors.device)

    def forward(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        *,
        position_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the hidden states after the final norm; see LanguageModel.forward.

        While training with `gradient_checkpointing` set, the layers' inner values are computed
        again in the backward pass instead of being kept.
        """
        masks: dict[int | None, Tensor | None] = {}  # by window, as tables by kind of layer
        tables: dict[bool, RotaryTable] = {}

        def table_of(local: bool) -> RotaryTable:
            if local not in tables:
                rotary = self.local_rotary if local else self.rotary
                tables[local] = rotary.table(position_ids, inputs_embeds.dtype)
            return tables[local]

        look = self._look(memory, inputs_embeds, cache)
        if look is None and not torch.compiler.is_compiling():
            fused = self._fused.run(inputs_embeds, table_of, cache)
            if fused is not None:
                after: Tensor = self.model.norm(fused)
                return after
        run = partial(checkpoint, use_reentrant=False) if self._recomputes else _call
        x = inputs_embeds
        for index, layer in enumerate(self.model.layers):
            window = self.config.window(index)
            if window not in masks:
                masks[window] = _mask(attention_mask, inputs_embeds, cache, window)
            mask, table = masks[window], table_of(self._has_local_positions(index))
            if look is not None and str(index) in self.cross_attention:
                x = run(self.cross_attention[str(index)], x, *look)
            x = run(layer, x, table, mask, cache)
        out: Tensor = self.model.norm(x)
        return out

    @property
    def _recomputes(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _look(
        self, memory: Memory | None, x: Float[Tensor, "B T D"], cache: Cache | None
    ) -> tuple[Memory, Sight] | None:
        """Return the memory, and what these positions see of it; None where there is none."""
        if not self.cross_attention:
            refuse_memory(memory, "the language model")
        if memory is None:
            return None
        past = 0 if cache is None or cache.ragged else cache.length
        return memory, memory.sight(past, x.shape[1])

    def add_cross_attention(self, every: int) -> None:
        """Put fresh blocks before every n-th layer; their gates are shut.

        Raises:
            ConfigError: there are fewer layers, or blocks already.
        """
        if self.cross_attention:
            raise ConfigError("the language model has gated cross-attention already")
        self.cross_attention = build_cross_attention(self.config, every)

    def layer(self, index: int) -> DecoderLayer:
        """Return one layer."""
        found: DecoderLayer = self.model.layers[index]  # type: ignore[assignment]  # of its list
        return found

    def layer_context(
        self, layer: int, position_ids: Int[Tensor, "B T"], dtype: torch.dtype
    ) -> tuple[RotaryTable, Bool[Tensor, "rows 1 T S"] | None]:
        """Return rotary table and mask of one layer, for rows without padding and cache."""
        rotary = self.local_rotary if self._has_local_positions(layer) else self.rotary
        length = position_ids.shape[1]
        mask = causal_mask(
            None, length, length, window=self.config.window(layer), device=position_ids.device
        )
        return rotary.table(position_ids, dtype), mask

    def _has_local_positions(self, layer: int) -> bool:
        return self.config.local_rope_theta is not None and self.config.is_local(layer)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Return the scores of every vocabulary entry."""
        scores: Tensor
        if self.config.tie_embeddings:
            scores = kept_linear(hidden, self.model.embed_tokens.weight, None)
        else:
            scores = self.lm_head(hidden)
        return self._capped(scores)

    def token_logits(
        self, hidden: Float[Tensor, "... D"], ids: Int[Tensor, " n"]
    ) -> Float[Tensor, "... n"]:
        """Return the scores of these vocabulary entries alone."""
        if self.config.tie_embeddings:
            return self._capped(kept_linear(hidden, self.model.embed_tokens.weight[ids], None))
        return self._capped(linear_rows(hidden, self.lm_head, ids))

    def _capped(self, scores: Tensor) -> Tensor:
        cap = self.config.logit_softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def untie(self) -> DecoderConfig:
        """Give the logits a layer of their own, with the values of the embedding.

        Returns:
            The configuration of the model from now on; as it was where there is one already.
        """
        if self.config.tie_embeddings:
            table = self.model.embed_tokens.weight
            vocabulary, width = table.shape
            self.lm_head = nn.Linear(width, vocabulary, bias=False, device="meta")
            self.lm_head.weight = nn.Parameter(table.detach().clone(), table.requires_grad)
            self.lm_head.train(self.training)
            self.config = replace(self.config, tie_embeddings=False)
        return self.config

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """Return an empty cache in the dtype and on the device of the weights."""
        weight = self.model.norm.weight
        return KVCache(self.config, batch, weight.dtype, weight.device, capacity=capacity)


def _call(module: nn.Module, *given: object) -> Tensor:
    """Run a module, as `checkpoint` does where its values are computed again."""
    found: Tensor = module(*given)
    return found


def _mask(
    attention_mask: Bool[Tensor, "B S"] | None,
    inputs_embeds: Float[Tensor, "B T D"],
    cache: Cache | None,
    window: int | None,
) -> Bool[Tensor, "rows 1 T S"] | None:
    """Return who sees whom in layers with this window; None where the cache knows, or all do."""
    if cache is not None and cache.ragged:
        return None
    length = inputs_embeds.shape[1]
    past = 0 if cache is None else cache.length
    device = inputs_embeds.device
    return causal_mask(attention_mask, length, past + length, window=window, device=device)

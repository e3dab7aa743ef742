"""Gemma 2: norms on both sides of a block, capped scores, every second layer with a window.

Source: transformers' Gemma2ForCausalLM. As there since release 5, the vectors of pictures are not
multiplied by the embedding scale.
"""

from lapilli.config.families import IGNORED
from lapilli.config.families.decoder import DecoderFamily

FAMILY = DecoderFamily(
    model_type="gemma2",
    original=("llava_gemma2", "LlavaGemma2ForCausalLM"),
    marks=("gemma2",),
    ignored=IGNORED | {"_sliding_window_pattern", "cache_implementation", "hidden_act"},
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    max_positions=8192,
    tied=True,
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    windows="every",
    sliding_window=4096,
    full_every=2,
    norm_offset=1.0,
    post_norms=True,
    scales_embedding=True,
    query_scalar=256,
    softcaps=(50.0, 30.0),
)

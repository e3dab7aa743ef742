"""The language model of Gemma 3: norms on queries and keys, five layers of six with a window.

Layers with a window have rotary positions of a base of their own. Source: transformers'
Gemma3ForCausalLM; the vectors of pictures are not multiplied by the embedding scale, as there.
"""

from lapilli.config.families import IGNORED
from lapilli.config.families.decoder import DecoderFamily

FAMILY = DecoderFamily(
    model_type="gemma3_text",
    original=("llava_gemma3", "LlavaGemma3ForCausalLM"),
    marks=("gemma3",),
    ignored=IGNORED | {"_sliding_window_pattern", "cache_implementation", "hidden_act"},
    vocab_size=262208,
    hidden_size=2304,
    intermediate_size=9216,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    max_positions=131072,
    tied=True,
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    windows="every",
    sliding_window=4096,
    full_every=6,
    full_every_key="sliding_window_pattern",
    rope_theta=1e6,
    local_rope_theta=1e4,
    qk_norm=True,
    norm_offset=1.0,
    post_norms=True,
    scales_embedding=True,
    query_scalar=256,
    softcaps=(None, None),
)

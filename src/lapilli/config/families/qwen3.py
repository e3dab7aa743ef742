"""Qwen3: a norm on every head's queries and keys instead of Qwen2's biases."""

from lapilli.config.families.decoder import DecoderFamily

FAMILY = DecoderFamily(
    model_type="qwen3",
    original=("llava_qwen3", "LlavaQwen3ForCausalLM"),
    marks=("qwen3",),
    vocab_size=151936,
    intermediate_size=22016,
    max_positions=32768,
    num_kv_heads=32,
    head_dim=128,
    windows="switched",
    sliding_window=4096,
    qk_norm=True,
)

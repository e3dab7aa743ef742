"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from lapilli.config.families.decoder import DecoderFamily

FAMILY = DecoderFamily(
    model_type="qwen2",
    # Not of the original but of its successor LLaVA-NeXT, with the same flat keys.
    original=("llava_qwen", "LlavaQwenForCausalLM"),
    marks=("qwen",),
    vocab_size=151936,
    intermediate_size=22016,
    max_positions=32768,
    num_kv_heads=32,
    windows="switched",
    sliding_window=4096,
    qkv_bias=True,
)

"""Mistral 7B: grouped heads, and a sliding window in every layer of its first release."""

from lapilli.config.families.decoder import DecoderFamily

FAMILY = DecoderFamily(
    model_type="mistral",
    original=("llava_mistral", "LlavaMistralForCausalLM"),
    marks=("mistral",),
    template="mistral_instruct",
    intermediate_size=14336,
    max_positions=4096 * 32,
    num_kv_heads=8,
    windows="all",
    sliding_window=4096,
)

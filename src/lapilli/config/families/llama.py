"""Llama and what is shaped and named like it: Vicuna, Yi, Llama 2, Llama 3."""

from lapilli.config.families.decoder import DecoderFamily

FAMILY = DecoderFamily(
    model_type="llama",
    original=("llava_llama", "LlavaLlamaForCausalLM"),
    slow_tokenizer=True,
    intermediate_size=11008,
    max_positions=2048,
)

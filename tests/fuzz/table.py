"""What is fuzzed: one row for each kind of file. To add a kind, add a row to `KINDS`.

A row says how an honest folder is made, which file of it is damaged and how, and what reads the
folder. The reader ends normally or with a CheckpointError; everything else is a fault.
"""

from tests.fuzz import honest, samples, states
from tests.fuzz.damage import JSON, PICKLE, PROTOBUF, SAFETENSORS
from tests.fuzz.kind import Kind

LLAMA, MPT, MISTRAL = (
    honest.original(name)
    for name in ("llava-v1.5-tiny-pad", "llava-mpt-tiny", "llava-v1.6-mistral-tiny")
)
LORA, PROJECTOR = (honest.original(f"llava-v1.5-tiny-{name}") for name in ("lora", "projector"))

KINDS: tuple[Kind, ...] = (
    *(
        Kind(make=make, file="model/config.json", damages=JSON, share=4)
        for make in (LLAMA, MPT, MISTRAL, honest.hf_llava, honest.hf_next, *honest.LANGUAGE_MODELS)
    ),
    Kind(make=LORA, file="model/config.json", damages=JSON),
    Kind(make=PROJECTOR, file="model/config.json", damages=JSON),
    Kind(make=LLAMA, file="vision/config.json", damages=JSON, share=2),
    Kind(make=LLAMA, file="vision/preprocessor_config.json", damages=JSON, share=2),
    Kind(make=honest.hf_llava, file="model/preprocessor_config.json", damages=JSON, share=2),
    Kind(make=honest.hf_next, file="model/processor_config.json", damages=JSON),
    Kind(make=LLAMA, file="model/generation_config.json", damages=JSON),
    Kind(make=LLAMA, file="model/tokenizer_config.json", damages=JSON, share=2),
    Kind(make=honest.hf_llava, file="model/tokenizer_config.json", damages=JSON, share=2),
    Kind(make=LLAMA, file="model/special_tokens_map.json", damages=JSON, share=2),
    Kind(make=LLAMA, file="model/added_tokens.json", damages=JSON, share=2),
    Kind(make=MPT, file="model/special_tokens_map.json", damages=JSON),
    Kind(make=MISTRAL, file="model/model.safetensors.index.json", damages=JSON),
    Kind(make=MISTRAL, file="model/model-00002-of-00003.safetensors", damages=SAFETENSORS, share=2),
    Kind(make=honest.hf_llava, file="model/model.safetensors", damages=SAFETENSORS, share=3),
    Kind(make=MPT, file="model/pytorch_model.bin", damages=PICKLE, share=3),
    Kind(make=LORA, file="model/non_lora_trainables.bin", damages=PICKLE),
    Kind(make=MPT, file="model/tokenizer.json", damages=JSON, share=3),
    Kind(make=honest.hf_llava, file="model/tokenizer.json", damages=JSON, share=3),
    Kind(make=honest.hf_next, file="model/tokenizer.json", damages=JSON, share=3),
    Kind(make=LLAMA, file="model/tokenizer.model", damages=PROTOBUF, share=2),
    Kind(make=MISTRAL, file="model/tokenizer.model", damages=PROTOBUF, share=2),
    Kind(make=honest.awq, file="model/config.json", damages=JSON, share=2),
    Kind(make=honest.awq, file="model/model.safetensors", damages=SAFETENSORS, share=2),
    Kind(make=honest.pebble, file="model/world.json", damages=JSON),
    Kind(make=honest.pebble, file="model/world.safetensors", damages=SAFETENSORS),
    Kind(make=honest.gptq, file="model/config.json", damages=JSON),
    Kind(make=honest.packed, file="model/config.json", damages=JSON, share=2),
    Kind(make=honest.packed, file="model/model.safetensors", damages=SAFETENSORS, share=2),
    *states.KINDS,
    *samples.KINDS,
)

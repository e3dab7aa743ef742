"""A tiny plain language model, and one declared modality of each kind."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import lapilli
from lapilli.config.huggingface import parse_text_config
from lapilli.lm import build_language_model

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1200,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
ENCODER = {**LLAMA, "hidden_size": 24, "intermediate_size": 48, "num_key_value_heads": 4}
DECLARED = {
    "user": {
        "kind": "events",
        "categorical": [
            {"name": "film", "size": 50, "width": 6},
            {"name": "genre", "size": 5, "width": 2},
        ],
        "numeric": ["rating"],
        "hidden_size": 16,
        "num_heads": 2,
        "max_events": 8,
        "projector": "linear",
    },
    "item": {
        "kind": "text",
        "text_config": {key: ENCODER[key] for key in ENCODER if not key.startswith("torch")},
        "tokens": 2,
        "projector": "linear",
    },
    "vec": {"kind": "vector", "width": 3, "tokens": 2},
}


def tiny_language_model(folder: Path) -> Path:
    """Write a plain language model with pebble's tokenizer, in Hugging Face's layout."""
    folder.mkdir()
    torch.manual_seed(0)
    model = build_language_model(parse_text_config(LLAMA))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(Path(lapilli.__file__).parent / "pebble" / name, folder)
    return folder

"""Write a tiny Llama that knows nothing yet, as a plain language model in Hugging Face's layout.

    python tiny_llama.py FOLDER

It stands for a small language model of yours: any folder with config.json, model.safetensors and a
tokenizer. The tokenizer is that of the embedded model.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import lapilli
from lapilli.config.model import DecoderConfig
from lapilli.lm.decoder import Decoder

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
config = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1200,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
torch.manual_seed(0)
model = Decoder(
    DecoderConfig(
        vocab_size=1200,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=512,
    )
)
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.05)
save_file(model.state_dict(), folder / "model.safetensors")
(folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
    shutil.copy(Path(lapilli.__file__).parent / "pebble" / name, folder)

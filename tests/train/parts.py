"""Random language models and towers, saved by transformers: what LLaVAs are built from in tests."""

import shutil

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.integration.oracle import make_tokenizer

VOCABULARY_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
ROWS = 264  # of the vocabulary tables; the tokenizer has 260 tokens
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MPT = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def sizes(common, rows):
    return {**common, "vocab_size": rows}


LANGUAGE_MODELS = {
    "llama": lambda rows: LlamaForCausalLM(LlamaConfig(**sizes(SIZES, rows))),
    "mistral": lambda rows: MistralForCausalLM(
        MistralConfig(**sizes(SIZES, rows), sliding_window=64)
    ),
    "qwen2": lambda rows: Qwen2ForCausalLM(
        Qwen2Config(**sizes(SIZES, rows), tie_word_embeddings=True)
    ),
    "mpt": lambda rows: MptForCausalLM(MptConfig(**sizes(MPT, rows))),
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TOWERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER)),
}


class Parts:
    """parts(language model, tower) -> their folders, with names that tell nothing.

    `vocabulary`: a folder whose tokenizer the language model takes, instead of the one of 260.
    """

    def __init__(self, root, dtype=torch.bfloat16, rows=ROWS, vocabulary=None):
        self.root = root
        self.dtype = dtype
        self.rows = rows
        self.vocabulary = vocabulary

    def __call__(self, language, tower):
        base, eyes = self.root / f"a-{language}", self.root / f"b-{tower}"
        if not base.exists():
            self._make(base, lambda: LANGUAGE_MODELS[language](self.rows))
            if self.vocabulary is None:
                make_tokenizer().save_pretrained(base)
            for file in VOCABULARY_FILES if self.vocabulary else ():
                shutil.copy(self.vocabulary / file, base)
        if not eyes.exists():
            self._make(eyes, TOWERS[tower])
        return str(base), str(eyes)

    def _make(self, path, build):
        torch.manual_seed(3)
        model = build()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        model.to(self.dtype).save_pretrained(path)

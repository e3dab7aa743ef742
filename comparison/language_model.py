"""Small language model from nothing: a tokenizer that is trained on texts, and random weights.

    texts --byte-level BPE--> tokenizer.json
    sizes --normal weights--> model.safetensors, a Qwen3 of a few hundred thousand parameters

The checkpoint is one of Hugging Face's layout, which lapilli loads as any other.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lapilli.config.huggingface import parse_text_config
from lapilli.lm import build_language_model

END: Final = "<|end|>"
_GATHERS: Final = 3.0  # a mean of ten words is a third of a word's length
_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a language model."""

    vocabulary: int = 1200
    width: int = 128
    inner: int = 384
    layers: int = 4
    heads: int = 4
    positions: int = 1024


def write_language_model(
    folder: Path,
    texts: Sequence[str],
    sizes: Sizes | None = None,
    *,
    matches: bool = True,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with fresh weights, a function of the texts, sizes and seed.

    Its conversation template writes what is said and nothing else.

    Args:
        folder: is made.
        texts: of which the tokenizer learns its words.
        sizes: of tokenizer and model; the vocabulary is smaller where the texts have fewer words.
        matches: a word looks at its like from the first step on; False: at all words alike, as
            who makes one vector of many words does.
        seed: of the weights.
    """
    sizes = sizes or Sizes()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(texts, sizes.vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", {"eos_token": END, "chat_template": _TEMPLATE})
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "head_dim": sizes.width // sizes.heads,
        "max_position_embeddings": sizes.positions,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.token_to_id(END),
        "torch_dtype": "float32",
    }
    _write(folder / "config.json", config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_language_model(parse_text_config(config))
        _draw(model, sizes, matches=matches)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def _draw(model: torch.nn.Module, sizes: Sizes, *, matches: bool) -> None:
    """Draw the weights.

    Where it matches, queries are made as keys are, so that a word looks at its like from the first
    step on: who matches texts finds equal words first. The last word looks at itself then, and
    little of the words before it comes into its state.

    Source: for queries and keys, the idea of Trockman and Kolter 2023 (arXiv 2305.09828).
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.dim() > 1:
            # What comes out of a block is small beside what it is added to.
            small = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = sizes.width**-0.5 / ((2 * sizes.layers) ** 0.5 if small else 1)
            if not matches and name.endswith("o_proj.weight"):
                std = _GATHERS * sizes.width**-0.5
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else std)
    for name, parameter in parameters.items():
        if matches and name.endswith("q_proj.weight"):
            parameter.data.copy_(parameters[name.replace("q_proj", "k_proj")].data)


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE, for which every text begins with a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

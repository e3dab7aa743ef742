"""Plain language models of families that lapilli does not have, through lapilli.lm.foreign."""

from pathlib import Path

import torch

from lapilli.checkpoint.directory import open_weights
from lapilli.checkpoint.files import read_optional_json
from lapilli.checkpoint.keymaps import LANGUAGE_MODEL
from lapilli.checkpoint.placement import choose_dtype
from lapilli.checkpoint.plan import Plan
from lapilli.checkpoint.source import resolve
from lapilli.checkpoint.tokenizer_files import load_tokenizer
from lapilli.checkpoint.vocabulary import Vocabulary
from lapilli.config.ignored import GENERATION, TEXT
from lapilli.config.model import ModelConfig
from lapilli.config.parse import supported_types
from lapilli.config.reader import (
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_WIDTH,
    MOST_WORDS,
    JsonObject,
    KeyReader,
    KeyReport,
)
from lapilli.config.tokens import parse_tokens
from lapilli.lm.foreign import load_foreign
from lapilli.model.vlm import VisionLanguageModel


def is_foreign(raw: JsonObject) -> bool:
    """Whether a config.json is a causal language model that only transformers may know."""
    named = "ForCausalLM" in str(raw.get("architectures", ""))
    return named and raw.get("model_type") not in supported_types()


# What other families call the sizes that memory and time grow with.
_SIZES = {
    MOST_LAYERS: ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    MOST_WIDTH: ("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner"),
    MOST_WORDS: ("vocab_size",),
    MOST_POSITIONS: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
}


def _refuse_sizes(raw: JsonObject) -> None:
    """Check the sizes before transformers builds what they say."""
    reader = KeyReader(raw, "config.json")
    for most, keys in _SIZES.items():
        for key in keys:
            reader.optional_positive(key, most=most)


def load_foreign_model(
    source: str | Path, *, device: torch.device, dtype: str | torch.dtype
) -> tuple[VisionLanguageModel, Plan] | None:
    """The model without images and what was done; None for every other checkpoint.

    Args:
        source: as for `load_checkpoint`.
        device: where it goes.
        dtype: as for `load_checkpoint`.

    Raises:
        UnsupportedModelError: transformers is not installed or cannot read the model.
        MissingFileError: no tokenizer.
        ConfigFileError: a size beyond every model that there is.

    Note: which keys are read is transformers' affair, so none is reported as unknown.
    """
    path = resolve(source, weights=False)
    raw = read_optional_json(path / "config.json") or {}
    if not is_foreign(raw):
        return None
    _refuse_sizes(raw)
    path = resolve(source)
    tokenizer = load_tokenizer(path, fast=True)
    infos = open_weights(path).infos.values()
    number_format = choose_dtype(
        dtype,
        device=device,
        stored=str(raw.get("dtype") or raw.get("torch_dtype")),
        num_parameters=sum(info.num_parameters for info in infos),
    )
    language_model = load_foreign(path, dtype=number_format, device=device)
    generation = read_optional_json(path / "generation_config.json") or {}
    text = language_model.config
    config = ModelConfig(
        text=text,
        tokens=parse_tokens(
            KeyReader(raw, "config.json", TEXT),
            KeyReader(generation, "generation_config.json", GENERATION),
        ),
        layout="text",
        torch_dtype=str(number_format).removeprefix("torch."),
        context_length=text.max_positions,
    )
    note = (
        f"model_type {raw.get('model_type')!r} is read through the library transformers: "
        "it is none of lapilli's own families"
    )
    plan = Plan(
        form="through transformers",
        path=path,
        raw=raw,
        weights_raw=raw,
        config=config,
        keys=KeyReport(used=tuple(sorted(raw))),
        parts=(),
        keymap=LANGUAGE_MODEL,
        tokenizer=tokenizer,
        tokenizer_path=path,
        vocabulary=Vocabulary(rows=text.vocab_size, accepted=frozenset()),
        notes=(note,),
    )
    return VisionLanguageModel(language_model, {}), plan

"""A trained model as a checkpoint in the original LLaVA layout; knows the parts, no file formats.

    config.json  model.safetensors  tokenizer.model  tokenizer_config.json  special_tokens_map.json
    generation_config.json  vision_tower/{config.json, preprocessor_config.json, model.safetensors}

The tower is kept in a folder of its own, as LLaVA 1.5 refers to a CLIP checkpoint: its weights
stand there and nowhere else.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lapilli.checkpoint.read.assemble import build_model
from lapilli.checkpoint.write.llava import save_llava
from lapilli.config.model import (
    DecoderConfig,
    ImageConfig,
    ModelConfig,
    PixelConfig,
    ProjectorConfig,
    TokenConfig,
    VisionConfig,
)
from lapilli.geometry import ImageSize
from lapilli.model import VisionLanguageModel
from lapilli.prompt.template import DEFAULT_TEMPLATE

_BOS, _EOS, _PAD = 1, 2, 0
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def export_llava(
    folder: Path,
    *,
    language_model: nn.Module,
    projector: nn.Module,
    tower: nn.Module,
    text: DecoderConfig,
    vision: VisionConfig,
    tokenizer_model: bytes,
    dtype: torch.dtype = torch.float16,
    template: str = DEFAULT_TEMPLATE,
) -> None:
    """Write a checkpoint that LLaVA's loader and ours can read.

    Args:
        folder: is made; files of these names in it are replaced, others stay.
        language_model: parameters named as in Llama files.
        projector: parameters `0.weight`, `2.weight`.
        tower: parameters `vision_model.*`.
        text: sizes of the language model.
        vision: sizes of the tower, and the hidden state that is taken.
        tokenizer_model: content of tokenizer.model.
        dtype: of the stored weights.
        template: name of the conversation template that it was trained with.
    """
    config = llava_config(text, vision)
    model = _joined(config, language_model=language_model, projector=projector, tower=tower)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
        tokenizer, written = Path(aside) / "tokenizer", Path(aside) / "llava"
        tokenizer.mkdir()
        (tokenizer / "tokenizer.model").write_bytes(tokenizer_model)
        _write_json(tokenizer / "tokenizer_config.json", tokenizer_config(text.max_positions))
        _write_json(tokenizer / "special_tokens_map.json", _SPECIAL)
        _write_json(
            tokenizer / "generation_config.json", {"bos_token_id": _BOS, "eos_token_id": _EOS}
        )
        save_llava(
            written,
            model,
            config,
            tokenizer_path=tokenizer,
            tower="beside",
            dtype=dtype,
            template=template,
        )
        for file in [path for path in written.rglob("*") if path.is_file()]:
            target = folder / file.relative_to(written)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)


def llava_config(text: DecoderConfig, vision: VisionConfig) -> ModelConfig:
    """LLaVA 1.5 with these parts: pictures padded to a square, a projector of two layers."""
    size = ImageSize(vision.image_size, vision.image_size)
    return ModelConfig(
        text=text,
        tokens=TokenConfig(bos_id=_BOS, eos_ids=(_EOS,), pad_id=_PAD, use_patch_token=False),
        vision=vision,
        projector=ProjectorConfig(
            kind="mlp", depth=2, vision_size=vision.hidden_size, hidden_size=text.hidden_size
        ),
        image=ImageConfig(
            pixels=PixelConfig(crop_size=size, shortest_edge=vision.image_size), aspect="pad"
        ),
        max_length=text.max_positions,
        context_length=text.max_positions,
    )


def tokenizer_config(max_length: int) -> dict[str, object]:
    """tokenizer_config.json of a slow LlamaTokenizer."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "right",
        "pad_token": None,
        **_SPECIAL,
    }


def _joined(
    config: ModelConfig, *, language_model: nn.Module, projector: nn.Module, tower: nn.Module
) -> VisionLanguageModel:
    """Return the whole model around parts that were trained apart."""
    model = build_model(config)
    image = model.modalities["image"]
    image.vision_tower, image.projector = tower, projector
    model.language_model = language_model  # type: ignore[assignment]  # a module that follows the protocol
    return model


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

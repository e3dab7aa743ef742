"""A trained model as files in the original LLaVA layout; knows file formats, no training.

    config.json  model.safetensors  tokenizer.model  tokenizer_config.json  special_tokens_map.json
    generation_config.json  vision_tower/{config.json, preprocessor_config.json, model.safetensors}

The tower is kept in a folder of its own, as LLaVA 1.5 refers to a CLIP checkpoint: its weights
stand there and nowhere
else. Every file is written aside and renamed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lapilli.config.model import DecoderConfig, VisionConfig
from lapilli.shapes import Tensor

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
) -> None:
    """Write a checkpoint that LLaVA's loader and ours can read.

    Args:
        folder: is made; files of these names in it are replaced.
        language_model: parameters named as in Llama files.
        projector: parameters `0.weight`, `2.weight`, ...
        tower: parameters `vision_model.*`.
        text: sizes of the language model.
        vision: sizes of the tower, and the hidden state that is taken.
        tokenizer_model: content of tokenizer.model.
        dtype: of the stored weights.

    Source: reference behaviour of LLaVA's saved models (keys `model.*`, `lm_head.*`,
        `model.mm_projector.*`).
    """
    tower_folder = folder / "vision_tower"
    tower_folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        **_tensors(language_model, "", dtype),
        **_tensors(projector, "model.mm_projector.", dtype),
    }
    _write_tensors(folder / "model.safetensors", tensors)
    _write_tensors(tower_folder / "model.safetensors", _tensors(tower, "", dtype))
    name = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", llava_config(text, vision, name))
    _write_json(tower_folder / "config.json", clip_config(vision, name))
    _write_json(tower_folder / "preprocessor_config.json", preprocessor_config(vision))
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_json(folder / "special_tokens_map.json", _SPECIAL)
    _write_json(folder / "tokenizer_config.json", tokenizer_config(text.max_positions))
    _write_bytes(folder / "tokenizer.model", tokenizer_model)


def llava_config(text: DecoderConfig, vision: VisionConfig, dtype: str) -> dict[str, Any]:
    """config.json of the whole model."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "hidden_act": text.activation,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": text.max_positions,
        "tie_word_embeddings": text.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": dtype,
        "use_cache": True,
        "image_aspect_ratio": "pad",
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": vision.feature_layer,
        "mm_vision_select_feature": vision.feature_select,
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": text.max_positions,
    }


def clip_config(vision: VisionConfig, dtype: str) -> dict[str, Any]:
    """config.json of the tower, as of a CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": vision.num_channels,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_eps,
        "projection_dim": vision.hidden_size,
        "torch_dtype": dtype,
    }


def preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json of the tower, as of a CLIPImageProcessor."""
    side = vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def tokenizer_config(max_length: int) -> dict[str, Any]:
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


def _tensors(module: nn.Module, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        prefix + name: value.detach().to(dtype).contiguous()
        for name, value in module.state_dict().items()
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    staged = path.with_suffix(".part")
    save_file(dict(tensors), staged, metadata={"format": "pt"})
    staged.replace(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def _write_bytes(path: Path, content: bytes) -> None:
    staged = path.with_suffix(".part")
    staged.write_bytes(content)
    staged.replace(path)

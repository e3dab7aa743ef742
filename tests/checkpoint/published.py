"""Checkpoints of AWQ and GPTQ, written from the formats' descriptions alone, and what they mean.

Weights are rounded, packed number by number, and multiplied out again; nothing of lapilli is used.
"""

import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from tests.checkpoint.test_hf import IMAGE_ID, PINPOINTS, TOWERS, VOCABULARY, add_tokenizer

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
TEXT = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    tie_word_embeddings=False,
)


def packed(nibbles, order):
    """Eight columns in one number: the nibble at 4 i is column order[i] of the eight."""
    words = np.zeros((nibbles.shape[0], nibbles.shape[1] // 8), dtype=np.uint32)
    for i, column in enumerate(order):
        words |= nibbles[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return torch.from_numpy(words.view(np.int32))


def drawn(inputs, outputs, group, seed):
    """Any integers [in, out] and zeros [groups, out], scales of a plausible size."""
    draw = np.random.default_rng(seed)
    groups = -(-inputs // group)
    nibbles, zeros = (
        draw.integers(0, 16, (inputs, outputs)),
        draw.integers(0, 16, (groups, outputs)),
    )
    return nibbles, zeros, draw.uniform(0.002, 0.008, (groups, outputs)).astype(np.float16)


def rounded(weight, group, *, zero_points=True):
    """The integers [in, out], zeros and scales [groups, out] nearest to a weight [out, in]."""
    weight = weight.float().numpy().T
    nibbles, zeros, scales = [], [], []
    for start in range(0, len(weight), group):
        rows = weight[start : start + group]
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        scale = (high - low) / 15 if zero_points else np.abs(rows).max(0) / 7
        scale = scale.astype(np.float16)
        exact = scale.astype(np.float32)
        zero = np.round(-low / exact) if zero_points else np.full_like(exact, 8)
        nibbles.append(np.clip(np.round(rows / exact) + zero, 0, 15).astype(int))
        zeros.append(np.clip(zero, 0, 15).astype(int))
        scales.append(scale)
    return np.concatenate(nibbles), np.stack(zeros), np.stack(scales)


def multiplied_out(nibbles, zeros, scales, group):
    """The float weight [out, in] that such integers stand for."""
    where = np.arange(nibbles.shape[0]) // group
    weight = (nibbles - zeros[where]).astype(np.float32) * scales[where].astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(weight.T))


def awq_tensors(nibbles, zeros, scales):
    """What AutoAWQ's gemm version stores."""
    return {
        "qweight": packed(nibbles, AWQ_ORDER),
        "qzeros": packed(zeros, AWQ_ORDER),
        "scales": torch.from_numpy(scales),
    }


def llm_awq_tensors(nibbles, zeros, scales, group, *, zeros_name="scaled_zeros"):
    """What llm-awq stores: nibble t of number c of a quarter is one of tile c // 64, see below."""
    values, outputs = nibbles.T.astype(np.uint16), nibbles.shape[1]
    words = np.zeros((outputs // 4, nibbles.shape[0]), dtype=np.uint16)
    for column in range(nibbles.shape[0]):
        tile, row, half, i = column // 64, column % 64 // 16, column % 16 // 8, column % 8
        for t in range(4):
            inputs = values[row::4, 64 * tile + 32 * half + 8 * t + i]
            words[:, column] |= inputs << np.uint16(4 * t)
    step = 8 * {32: 4, 64: 2}.get(group, 1)
    more = -len(scales) % step
    padded, products = (np.pad(x, ((0, more), (0, 0))) for x in (scales, -(zeros * scales)))
    return {
        "qweight": torch.from_numpy(words.view(np.int16)),
        "scales": torch.from_numpy(padded),
        zeros_name: torch.from_numpy(products.astype(np.float16)),
    }


def gptq_tensors(nibbles, zeros, scales, group, *, one_less=True):
    """What AutoGPTQ stores; `one_less`: version 1, whose zeros wrap."""
    inputs = nibbles.shape[0]
    return {
        "qweight": packed(nibbles.T, GPTQ_ORDER).t().contiguous(),
        "qzeros": packed((zeros - one_less) % 16, GPTQ_ORDER),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // group,
    }


def make_llava(path, *, is_next=False, text=TEXT):
    """A random Hugging Face LLaVA whose layers are wide enough for groups of 128."""
    torch.manual_seed(0)
    common = {
        "text_config": text,
        "vision_config": TOWERS["clip"],
        "image_token_index": IMAGE_ID,
    }
    if is_next:
        config = LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS)
        model = LlavaNextForConditionalGeneration(config)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**common))
    model.half().save_pretrained(path)
    add_tokenizer(path)


def convert(source, target, section, *, chosen, rename=lambda name: name, zero_points=True):
    """Two checkpoints of one: `target/packed` and, with the same rounded weights, `target/float`.

    Args:
        source: a directory with one model.safetensors.
        target: where both are made.
        section: the quantization_config.
        chosen: says of a tensor's name whether it becomes a packed layer.
        rename: style of the names in both.
        zero_points: where they fit best, or 8 everywhere.
    """
    group = section.get("group_size", 128)
    one_less = section.get("checkpoint_format", "gptq") == "gptq"
    files, floats = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        new = rename(name)
        floats[new] = tensor
        if not chosen(name):
            files[new] = tensor
            continue
        width = tensor.shape[1] if group < 0 else group
        integers = rounded(tensor, width, zero_points=zero_points)
        floats[new] = multiplied_out(*integers, width)
        if section.get("backend") == "llm-awq":
            parts = llm_awq_tensors(*integers, width)
        elif section.get("version") == "gemv_fast":
            parts = llm_awq_tensors(*integers, width, zeros_name="qzeros")
        elif section["quant_method"] == "awq":
            parts = awq_tensors(*integers)
        else:
            parts = gptq_tensors(*integers, width, one_less=one_less)
        files |= {f"{new.removesuffix('weight')}{kind}": part for kind, part in parts.items()}
    for folder, tensors in (("packed", files), ("float", floats)):
        shutil.copytree(source, target / folder)
        save_file(tensors, target / folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (target / "packed" / "config.json").write_text(
        json.dumps({**config, "quantization_config": section})
    )
    return target / "packed", target / "float"


def awq(group_size=128, **more):
    """The section of config.json as transformers writes it."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": ["vision_tower", "multi_modal_projector", "lm_head"],
        **more,
    }


def gptq(group_size=128, **more):
    """The section of config.json as optimum and GPTQModel write it."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": False,
        "sym": False,
        **more,
    }


def of_text_layers(name):
    """The linear layers of the language model, the last one aside."""
    return name.endswith("_proj.weight") and "vision" not in name

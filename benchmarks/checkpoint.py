"""Writes a LLaVA of real shape with gaussian weights, in a layout that all engines read.

Zeros would be faster than real weights, so none are used. S is CLIP-L/14-336 with TinyLlama 1.1B,
L the same tower with Llama-2 7B.
"""

import json
import shutil
import struct
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

VOCABULARY = 32000
IMAGE_ID = 31999  # an entry of the vocabulary that stands for the picture
SHARD_BYTES = 1 << 30
TEXT_SHAPES = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "S": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "L": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
CLIP_TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def write_checkpoint(
    shape: str, out: Path, *, dtype: torch.dtype = torch.float32, layers: int | None = None
) -> Path:
    """The directory of a checkpoint of `shape`, written once and reused by later runs.

    `layers`: another depth of the language model, and of the tower where that is deeper.
    """
    done = out / "complete"
    if done.exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    text, tower = TEXT_SHAPES[shape], CLIP_TINY if shape == "tiny" else CLIP_L
    if layers is not None:
        text = {**text, "num_hidden_layers": layers}
        tower = {**tower, "num_hidden_layers": min(layers + 1, tower["num_hidden_layers"])}
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=8192,  # eight pictures in one prompt
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            **text,
        ),
        vision_config=CLIPVisionConfig(
            image_size=336,
            patch_size=14,
            projection_dim=768,
            **tower,
        ),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype=str(dtype).removeprefix("torch."),
    )
    config.save_pretrained(out)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlavaForConditionalGeneration(config).state_dict().items()}
    _write_shards(shapes, out, dtype)
    _write_side_files(out)
    done.touch()
    return out


def write_quantized(source: Path, out: Path, bits: int) -> Path:
    """What `lapilli quantize --bits` makes of a checkpoint."""
    if not out.exists():
        aside = out.with_name(f"{out.name}.new")
        command = [str(Path(sys.executable).parent / "lapilli"), "quantize"]
        command += [str(source), str(aside), "--bits", str(bits), "--overwrite", "--quiet"]
        subprocess.run(command, check=True)
        aside.rename(out)
    return out


def with_pictures(source: Path, out: Path, side: int, *, anyres: bool = False) -> Path:
    """The same model with pictures of another size, or in tiles, and with text about them.

    Args:
        source: what `write_quantized` made.
        out: written once and reused by later runs.
        side: pixels of a tile; a picture is one of them, or with `anyres` up to four and itself.
    """
    if (out / "complete").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    (out / "vision_tower").mkdir(parents=True)
    for path in source.rglob("*"):
        if path.suffix in (".model", ".json"):
            shutil.copy(path, out / path.relative_to(source))
    weights = (source / "model.safetensors").resolve()
    config = json.loads((source / "config.json").read_text())
    del config["lapilli_image_token_index"]  # the tokenizer has no text for it
    if anyres:
        pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
        config |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints}
        config["mm_patch_merge_type"] = "spatial_unpad"
        newline = {"model.image_newline": torch.zeros(config["hidden_size"])}
        save_file(newline, out / "model-00002.safetensors")
        (out / "model-00001.safetensors").symlink_to(weights)
        with safe_open(weights, "pt") as file:
            weight_map = dict.fromkeys(file.keys(), "model-00001.safetensors")
        weight_map |= dict.fromkeys(newline, "model-00002.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (out / "model.safetensors").symlink_to(weights)
    (out / "config.json").write_text(json.dumps(config))
    _resize_tower(source / "vision_tower", out / "vision_tower", side)
    (out / "complete").touch()
    return out


def _resize_tower(source: Path, out: Path, side: int) -> None:
    """Cut a tower's positions to those of a picture of another size."""
    config = json.loads((source / "config.json").read_text())
    positions = (side // config["patch_size"]) ** 2 + 1
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "position_embedding" in name:
            tensors[name] = tensor[:positions].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"image_size": side}))
    preparing = json.loads((source / "preprocessor_config.json").read_text())
    preparing |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (out / "preprocessor_config.json").write_text(json.dumps(preparing))


def _write_shards(shapes: dict[str, torch.Size], out: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = number = 0

    def flush() -> None:
        nonlocal size, number
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    for name, shape in shapes.items():
        is_norm = "norm" in name and name.endswith("weight")
        tensor = torch.randn(shape, generator=generator) * 0.02 + float(is_norm)
        shard[name] = tensor.to(dtype)
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_side_files(out: Path) -> None:
    pebble = files("lapilli") / "pebble"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (out / name).write_bytes((pebble / name).read_bytes())
    words = (pebble / "tokenizer.model").read_bytes()
    known = SentencePieceProcessor(model_proto=words).vocab_size()
    words += b"".join(_piece(f"\u2581w{i}", -1e3 - i) for i in range(known, IMAGE_ID))
    (out / "tokenizer.model").write_bytes(words)
    (out / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": {"height": 336, "width": 336},
                "size": {"shortest_edge": 336},
                "do_center_crop": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_processor_type": "CLIPImageProcessor",
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "rescale_factor": 1 / 255,
            }
        )
    )


def _piece(text: str, score: float) -> bytes:
    """One more entry of a SentencePiece model: entries may follow each other anywhere in it."""
    raw = text.encode()
    entry = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score)
    return b"\x0a" + bytes([len(entry)]) + entry

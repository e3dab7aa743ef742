"""Writes a checkpoint of benchmarks/checkpoint.py as GGUF files, and quantizes them.

    python -m benchmarks.gguf_files CHECKPOINT OUT Q4_0 Q4_K_M Q8_0    (numpy, gguf, llama_cpp)

Runs where llama.cpp is installed. Same weights, one tensor at a time in memory; the text file is
rounded by llama.cpp's own quantizer, kinds of ik_llama.cpp by that one's (--quantizer).
mmproj.gguf is the tower and the projector in float16, as llama.cpp's converters write it.
"""

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from benchmarks.gguf_header import weight_bytes
from benchmarks.quantizer import is_known, quantize, run_quantizer

Array = NDArray[Any]
DONE = "complete.json"
MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOWER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
OUTSIDE = {
    "model.language_model.embed_tokens.weight": "token_embd.weight",
    "model.language_model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.vision_tower.embeddings.class_embedding": "v.class_embd",
    "model.vision_tower.embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "model.vision_tower.embeddings.position_embedding.weight": "v.position_embd.weight",
    "model.vision_tower.pre_layrnorm.weight": "v.pre_ln.weight",
    "model.vision_tower.pre_layrnorm.bias": "v.pre_ln.bias",
    "model.multi_modal_projector.linear_1.weight": "mm.0.weight",
    "model.multi_modal_projector.linear_1.bias": "mm.0.bias",
    "model.multi_modal_projector.linear_2.weight": "mm.2.weight",
    "model.multi_modal_projector.linear_2.bias": "mm.2.bias",
}


class Tensors:
    """The tensors of all shards, mapped."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Array, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            mapped = np.memmap(path, dtype=np.uint8, mode="r")
            (length,) = struct.unpack("<Q", mapped[:8].tobytes())
            header = json.loads(mapped[8 : 8 + length].tobytes())
            for name, entry in header.items():
                if name != "__metadata__":
                    self._places[name] = (mapped[8 + length :], entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._places[name][1]["shape"])

    def read(self, name: str, dtype: type) -> Array:
        """One tensor as float16 or float32."""
        mapped, entry = self._places[name]
        start, end = entry["data_offsets"]
        raw = mapped[start:end]
        if entry["dtype"] == "BF16":
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view({"F32": np.float32, "F16": np.float16}[entry["dtype"]])
        return np.ascontiguousarray(values.astype(dtype).reshape(entry["shape"]))


def gguf_name(name: str) -> str | None:
    """What llama.cpp calls a tensor; None: it has no use for it."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    for start, table, prefix in (
        ("model.language_model.layers.", MATRICES, "blk"),
        ("model.vision_tower.encoder.layers.", TOWER, "v.blk"),
    ):
        if name.startswith(start):
            layer, _, rest = name.removeprefix(start).partition(".")
            module, _, kind = rest.rpartition(".")
            return f"{prefix}.{layer}.{table[module]}.{kind}"
    return None


def by_pairs(weight: Array, heads: int) -> Array:
    """Rows of queries or keys in llama.cpp's order: its rotary pairs are neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_tensors(writer: gguf.GGUFWriter, tensors: Tensors, text: dict[str, Any] | None) -> None:
    """All tensors of the language model (`text` given) or of the tower and the projector."""
    heads = {}
    if text is not None:
        heads = {"attn_q": text["num_attention_heads"], "attn_k": text["num_key_value_heads"]}
    chosen: list[tuple[str, str, type]] = []
    for name in tensors:
        target = gguf_name(name)
        is_tower = "vision_tower" in name or "projector" in name
        if target is None or is_tower is (text is not None):
            continue
        shape = tensors.shape(name)
        dtype: type = np.float16 if len(shape) > 1 and "position" not in name else np.float32
        chosen.append((name, target, dtype))
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(target, shape, np.dtype(dtype), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, target, dtype in chosen:
        values = tensors.read(name, dtype)
        count = next((n for key, n in heads.items() if f".{key}." in target), None)
        writer.write_tensor_data(values if count is None else by_pairs(values, count))
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Words that nobody says: as many as the matrices have rows.

    Byte-level BPE, since OpenVINO reads GGUF files with no other vocabulary.
    """
    types = gguf.TokenType
    shown = [i for i in range(256) if 33 <= i < 127 or (161 <= i < 256 and i != 173)]
    hidden = [chr(256 + i) for i in range(256 - len(shown))]  # as GPT-2 writes the other bytes
    tokens = ["<unk>", "<s>", "</s>", *map(chr, shown), *hidden]
    tokens += [f"w{i}" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([types.UNKNOWN, *[types.CONTROL] * 2, *[types.NORMAL] * (size - 3)])
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write_text(config: dict[str, Any], tensors: Tensors, path: Path) -> None:
    """The language model in float16."""
    text = config["text_config"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(text["hidden_size"] // text["num_attention_heads"])
    writer.add_vocab_size(text["vocab_size"])
    add_vocabulary(writer, text["vocab_size"])
    write_tensors(writer, tensors, text)


def write_tower(config: dict[str, Any], tensors: Tensors, path: Path) -> None:
    """CLIP and the projector."""
    vision, pixels = config["vision_config"], config["pixels"]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)  # CLIP's quick approximation
    for key, value in {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embedding_length": vision["hidden_size"],
        "feed_forward_length": vision["intermediate_size"],
        "block_count": vision["num_hidden_layers"],
        "projection_dim": vision["projection_dim"],
        "attention.head_count": vision["num_attention_heads"],
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
    writer.add_array("clip.vision.image_mean", pixels["image_mean"])
    writer.add_array("clip.vision.image_std", pixels["image_std"])
    write_tensors(writer, tensors, None)


def make(source: Path, target: Path, kind: str, threads: int, program: Path | None) -> None:
    """Round by llama.cpp's own quantizer, or by ik_llama.cpp's what llama.cpp does not know.

    Raises:
        SystemExit: nobody here can make this kind, or the quantizer failed.
    """
    if is_known(kind):
        quantize(source, target, kind, threads)
    elif program is not None:
        run_quantizer(program, source, target, kind, threads)
    else:
        raise SystemExit(f"{kind}: llama.cpp does not know it, and ik_llama.cpp is not here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantizer", type=Path, help="llama-quantize of ik_llama.cpp")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    note = options.out / DONE
    known = json.loads(note.read_text()) if note.exists() else {}
    missing = [kind for kind in options.kinds if kind not in known]
    if not missing:
        return
    config = json.loads((options.checkpoint / "config.json").read_text())
    config["pixels"] = json.loads((options.checkpoint / "preprocessor_config.json").read_text())
    tensors = Tensors(options.checkpoint)
    write_tower(config, tensors, options.out / "mmproj.gguf")
    plain = options.out / "F16.gguf"
    write_text(config, tensors, plain)
    for kind in missing:
        path = options.out / f"{kind}.gguf"
        if kind != "F16":
            make(plain, path, kind, options.threads, options.quantizer)
        known[kind] = weight_bytes(path)
        note.write_text(json.dumps(known))
    if "F16" not in options.kinds:
        plain.unlink()


if __name__ == "__main__":
    main()

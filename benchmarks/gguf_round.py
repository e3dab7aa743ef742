"""Rounds a Llama as a GGUF kind and gives it back in floats: the same weights in another format.

    python -m benchmarks.gguf_round FOLDER OUT.npz Q4_0    (numpy, gguf, llama_cpp)

Runs in the peers' environment. FOLDER is a language model in Hugging Face's layout without a
tokenizer: quantizing asks for none. Where a matrix does not fit into blocks of a kind, llama.cpp's
quantizer takes another kind for it, which the bits per weight in OUT.npz count.
"""

import argparse
import json
import tempfile
from pathlib import Path

import gguf
import numpy as np

from benchmarks.gguf_files import Tensors, by_pairs
from benchmarks.quantizer import quantize
from benchmarks.smollm2_gguf import SIZES, by_halves, gguf_name, hf_name

BITS, HEAD_BITS = "bits", "bits of the head"


def write(folder: Path, target: Path) -> dict[str, int]:
    """Write a language model as F32 without words; return the heads of queries and keys."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, name in SIZES.items():
        value = config[name]
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(key, value)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_dimension_count(config["head_dim"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = Tensors(folder)
    for name in tensors:
        values = tensors.read(name, np.float32)
        count = next((n for key, n in heads.items() if key in name), None)
        writer.add_tensor(gguf_name(name), values if count is None else by_pairs(values, count))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return heads


def read(source: Path, heads: dict[str, int]) -> dict[str, np.ndarray]:
    """Return the tensors in floats under Hugging Face's names, and bits per weight."""
    found: dict[str, np.ndarray] = {}
    size = weights = 0
    for tensor in gguf.GGUFReader(source).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = hf_name(tensor.name)
        count = next((n for key, n in heads.items() if key in name), None)
        found[name] = values if count is None else by_halves(values, count)
        if tensor.name.startswith("blk.") and values.ndim > 1:
            size += int(tensor.n_bytes)
            weights += values.size
        if name == "lm_head.weight":
            found[HEAD_BITS] = np.array(8 * int(tensor.n_bytes) / values.size)
    found[BITS] = np.array(8 * size / weights)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        floats, packed = Path(place) / "F32.gguf", Path(place) / "packed.gguf"
        heads = write(options.folder, floats)
        quantize(floats, packed, options.kind, threads=2)
        np.savez(options.out, **read(packed, heads))


if __name__ == "__main__":
    main()

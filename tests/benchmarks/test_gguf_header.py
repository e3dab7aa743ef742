"""Sizes in the header of a GGUF file, whatever the types of its tensors."""

import struct
from pathlib import Path

import pytest

from benchmarks.gguf_header import Stored, stored_tensors, weight_bytes

IQ4_KS = 144  # of ik_llama.cpp alone


def write_gguf(path: Path, tensors: dict[str, tuple[list[int], int]]) -> None:
    """Write a file with keys of every kind, and tensors of (shape, bytes)."""

    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words)) + words.encode()

    keys = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, 1),
        text("llama.rope.freq_base") + struct.pack("<If", 6, 1e4),
        text("tokenizer.ggml.add_bos_token") + struct.pack("<I?", 7, False),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("tokenizer.ggml.token_type") + struct.pack("<IIQ2i", 9, 5, 2, 1, 3),
    ]
    infos, data = b"", b""
    for name, (shape, size) in tensors.items():
        infos += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        infos += struct.pack("<IQ", IQ4_KS, len(data))
        data += bytes(-(-size // 32) * 32)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys)) + b"".join(keys) + infos
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def test_a_tensor_ends_where_the_next_one_begins(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    sizes = {"token_embd.weight": ([64, 10], 320), "blk.0.attn_norm.weight": ([64], 256)}
    sizes |= {"blk.0.ffn_up.weight": ([64, 2], 70), "output.weight": ([64, 10], 384)}
    write_gguf(path, sizes)
    assert stored_tensors(path) == {
        "token_embd.weight": Stored(640, 320, 2),
        "blk.0.attn_norm.weight": Stored(64, 256, 1),
        "blk.0.ffn_up.weight": Stored(128, 96, 2),  # up to 31 bytes of padding
        "output.weight": Stored(640, 384, 2),
    }


def test_a_token_reads_the_matrices_but_not_the_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shape = [64, 10]
    write_gguf(
        path, {"token_embd.weight": (shape, 320), "a.weight": (shape, 640), "b": ([64], 256)}
    )
    assert weight_bytes(path) == 640


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(100))
    with pytest.raises(SystemExit, match="no GGUF file"):
        stored_tensors(path)

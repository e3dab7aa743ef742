"""The tokenizer of a checkpoint directory: reads its files, lapilli.prompt builds the tokenizer."""

from pathlib import Path

from lapilli.checkpoint.formats.files import (
    has_file,
    read_optional_bytes,
    read_optional_json,
    read_optional_text,
)
from lapilli.config.reader import KeyReader
from lapilli.errors import MissingFileError
from lapilli.prompt.tokenizer import Tokenizer, TokenizerFiles, build_tokenizer

MOST_BYTES = 64 << 20
"""Of a tokenizer's file: the largest that are published have half of it."""
IMAGE_PATCH = "<im_patch>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"


def load_tokenizer(directory: Path, *, fast: bool) -> Tokenizer:
    """Load the tokenizer of a directory.

    Args:
        directory: of the checkpoint, or of the base model of an adapter.
        fast: the class that the original takes for this backbone: SentencePiece itself for llama
            (False), the tokenizers library for everything else.

    Raises:
        MissingFileError: no tokenizer there.
        CheckpointError: a file of it is damaged.
    """
    files = TokenizerFiles(
        model=read_optional_bytes(directory / "tokenizer.model", most=MOST_BYTES),
        json=read_optional_text(directory / "tokenizer.json", most=MOST_BYTES),
        config=read_optional_json(directory / "tokenizer_config.json") or {},
        special_map=read_optional_json(directory / "special_tokens_map.json") or {},
        added=_added(directory / "added_tokens.json"),
    )
    if files.model is None and files.json is None:
        raise MissingFileError(
            f"no tokenizer in {directory}: looked for tokenizer.model and tokenizer.json; "
            "copy them from the language model that the checkpoint was made from"
        )
    return build_tokenizer(files, fast=fast)


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds a tokenizer."""
    return any(has_file(directory / name) for name in ("tokenizer.model", "tokenizer.json"))


def add_image_tokens(tokenizer: Tokenizer, *, use_patch: bool, use_start_end: bool) -> int:
    """Add the tokens that the original adds at loading; return how many were new.

    Source: LLaVA builder.py: `<im_patch>` first, then `<im_start>` and `<im_end>`, all special.
    """
    count = tokenizer.add_tokens([IMAGE_PATCH], special=True) if use_patch else 0
    if use_start_end:
        count += tokenizer.add_tokens([IMAGE_START, IMAGE_END], special=True)
    return count


def _added(path: Path) -> dict[str, int]:
    found = read_optional_json(path) or {}
    return KeyReader(found, path.name).all_ids()

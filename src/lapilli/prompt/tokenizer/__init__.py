"""Text to token ids and back, exactly as the tokenizers that checkpoints were trained with.

Knows file contents (bytes, parsed JSON), never a disk: `build_tokenizer` is the entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lapilli.errors import MissingFileError
from lapilli.prompt.tokenizer.base import Token, Tokenizer
from lapilli.prompt.tokenizer.fast import FastTokenizer
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer

__all__ = [
    "FastTokenizer",
    "SentencePieceTokenizer",
    "Token",
    "Tokenizer",
    "TokenizerFiles",
    "build_tokenizer",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """Contents of the files of a tokenizer; None or empty where a checkpoint has none.

    model: tokenizer.model. json: text of tokenizer.json. config: tokenizer_config.json.
    special_map: special_tokens_map.json. added: added_tokens.json.
    """

    model: bytes | None = None
    json: str | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    special_map: Mapping[str, object] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)


def build_tokenizer(files: TokenizerFiles, *, fast: bool) -> Tokenizer:
    """Build the slow tokenizer (llama of the original) or the fast one (all other families).

    `fast` prefers tokenizer.json and builds one out of a tokenizer.model; without `fast` a
    tokenizer.model is read by SentencePiece, as the original does for every llama. Where only one
    of the files is there, that one is used.

    Raises:
        MissingFileError: neither tokenizer.model nor tokenizer.json.
        CheckpointError: a file that cannot be read.
    """
    if files.model is not None and not fast:
        return SentencePieceTokenizer(
            files.model, config=files.config, special_map=files.special_map, added=files.added
        )
    source = files.model if files.json is None else files.json
    if source is None:
        raise MissingFileError(
            "the checkpoint has neither tokenizer.model nor tokenizer.json: copy one of them from "
            "the language model it was made from"
        )
    return FastTokenizer(
        source, config=files.config, special_map=files.special_map, added=files.added
    )

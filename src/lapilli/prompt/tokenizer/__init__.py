"""Text to token ids and back, exactly as the tokenizers that checkpoints were trained with.

Knows file contents (bytes, parsed JSON), never a disk: `build_tokenizer` is the entry.
"""

from lapilli.errors import MissingFileError
from lapilli.prompt.tokenizer.base import Token, Tokenizer, TokenizerFiles
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


def build_tokenizer(files: TokenizerFiles, *, fast: bool) -> Tokenizer:
    """Build the slow tokenizer (llama of the original) or the fast one (all other families).

    `fast` prefers tokenizer.json and builds one out of a tokenizer.model; without `fast` a
    tokenizer.model is read by SentencePiece, as the original does for every llama. Where only one
    of the files is there, that one is used.

    Raises:
        MissingFileError: neither tokenizer.model nor tokenizer.json.
        CheckpointError: a file that cannot be read.
    """
    if files.model is None and files.json is None:
        raise MissingFileError(
            "the checkpoint has neither tokenizer.model nor tokenizer.json: copy one of them from "
            "the language model it was made from"
        )
    is_fast = fast or files.model is None
    return FastTokenizer(files) if is_fast else SentencePieceTokenizer(files)

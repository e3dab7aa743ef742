"""Text to token ids and back, exactly as the tokenizers that checkpoints were trained with.

Knows file contents (bytes, parsed JSON), never a disk: `build_tokenizer` is the entry.
"""

from lapilli.prompt.tokenizer.base import Token, Tokenizer
from lapilli.prompt.tokenizer.build import TokenizerFiles, build_tokenizer
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

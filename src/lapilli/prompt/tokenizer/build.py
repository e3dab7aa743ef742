"""Which tokenizer a set of files makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lapilli.errors import MissingFileError
from lapilli.prompt.tokenizer.base import Tokenizer
from lapilli.prompt.tokenizer.fast import FastTokenizer
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer


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
    """The slow tokenizer (llama of the original) or the fast one (mistral, mpt, Hugging Face).

    `fast` prefers tokenizer.json and builds one out of a tokenizer.model; without `fast` a
    tokenizer.model is read by SentencePiece, as the original does for every llama. Where only one
    of the files is there, that one is used.

    Raises:
        MissingFileError: neither tokenizer.model nor tokenizer.json.
        CheckpointError: a file that cannot be read.
    """
    if files.json is not None and (fast or files.model is None):
        return FastTokenizer(
            files.json, config=files.config, special_map=files.special_map, added=files.added
        )
    if files.model is None:
        raise MissingFileError(
            "the checkpoint has neither tokenizer.model nor tokenizer.json: copy one of them from "
            "the language model it was made from"
        )
    build = FastTokenizer.from_spm if fast else SentencePieceTokenizer
    return build(files.model, config=files.config, special_map=files.special_map, added=files.added)

"""A tokenizer.json, run by the `tokenizers` library.

Exactly what transformers' fast tokenizers do: special tokens of the configuration that the file
lacks are added, the Llama family writes BOS as `add_bos_token` says, every other family as the
post-processor of the file says.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from lapilli.errors import PromptError
from lapilli.prompt.tokenizer.added import AddedTokens
from lapilli.prompt.tokenizer.base import Range, Token, clean_up, length_limit
from lapilli.prompt.tokenizer.byte_level import BYTE_OF
from lapilli.prompt.tokenizer.convert import llama_tokenizer
from lapilli.prompt.tokenizer.json_file import (
    encode_text,
    frame_of,
    parse_tokenizer,
    refusing_panics,
    state_of,
)
from lapilli.prompt.tokenizer.pieces import SPACE
from lapilli.prompt.tokenizer.plain import PlainText
from lapilli.prompt.tokenizer.roles import Roles
from lapilli.prompt.tokenizer.special import LLAMA_TOKENS, AddedToken, read_special_tokens


class FastTokenizer(Roles):
    """Any tokenizer.json.

    Args:
        source: content of tokenizer.json, or what the library made of it.
        config: parsed tokenizer_config.json.
        special_map: parsed special_tokens_map.json.
        added: parsed added_tokens.json.

    Raises:
        CheckpointError: a text that the `tokenizers` library does not read.
    """

    def __init__(
        self,
        source: str | tokenizers.Tokenizer,
        *,
        config: Mapping[str, object] | None = None,
        special_map: Mapping[str, object] | None = None,
        added: Mapping[str, int] | None = None,
    ) -> None:
        config = config or {}
        self._rust = parse_tokenizer(source) if isinstance(source, str) else source
        family = str(config.get("tokenizer_class") or "").removesuffix("Fast")
        is_llama = family in ("LlamaTokenizer", "CodeLlamaTokenizer")
        self._special = read_special_tokens(
            config, special_map or {}, added or {}, defaults=LLAMA_TOKENS if is_llama else {}
        )
        self._register()
        default_side = "left" if is_llama else "right"
        self.padding_side = str(config.get("padding_side", default_side))
        self.model_max_length = length_limit(config.get("model_max_length"))
        self._clean_up = bool(config.get("clean_up_tokenization_spaces", not is_llama))
        prefix, suffix = frame_of(self._rust)
        if is_llama:
            prefix = self._wanted("bos") if config.get("add_bos_token", True) else ()
            suffix = self._wanted("eos") if config.get("add_eos_token", False) else ()
        self.prefix_ids: tuple[int, ...] = prefix
        self.suffix_ids: tuple[int, ...] = suffix
        # Neither special tokens nor trimmed offsets: `encode` writes the prefix itself.
        self._rust.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        decoder = state_of(self._rust.decoder)
        self._is_byte_level = "ByteLevel" in _types(decoder)
        self.strips_leading_space = _strips(decoder)
        self._plain = PlainText(self._rust.to_str)

    @classmethod
    def from_spm(
        cls,
        model: bytes,
        *,
        config: Mapping[str, object] | None = None,
        special_map: Mapping[str, object] | None = None,
        added: Mapping[str, int] | None = None,
    ) -> "FastTokenizer":
        """LlamaTokenizerFast out of a tokenizer.model alone."""
        config = dict(config or {}) | {"tokenizer_class": "LlamaTokenizerFast"}
        source = llama_tokenizer(model)
        return cls(source, config=config, special_map=special_map, added=added)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    def encode(
        self, text: str, *, add_bos: bool = True, literal: Sequence[Range] = ()
    ) -> list[int]:
        """Ids of a text."""
        ids = [token.id for token in self.tokenize(text, literal=literal)]
        return [*self.prefix_ids, *ids] if add_bos else ids

    def tokenize(self, text: str, *, literal: Sequence[Range] = ()) -> list[Token]:
        """Tokens with their characters, without prefix."""
        if self._first_cut.has_typed(text, literal):
            return self._tokenize_typed(text, literal)
        encoding = encode_text(self._rust, text)
        return [Token(i, *span) for i, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids."""
        with refusing_panics():
            text = str(self._rust.decode(list(ids), skip_special_tokens=skip_special))
        return clean_up(text) if self._clean_up else text

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None where it is not in the vocabulary."""
        index: int | None = self._rust.token_to_id(token)
        return index

    def id_to_token(self, token_id: int) -> str:
        """The token as the file writes it.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        added = self._added.tokens.get(token_id)
        return self._in_library(token_id) if added is None else added.content

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8; added tokens go through the decoder too."""
        token = self._in_library(token_id)
        if self._is_byte_level:
            is_written = all(character in BYTE_OF for character in token)
            return bytes(map(BYTE_OF.__getitem__, token)) if is_written else token.encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[1:-1], 16)])
        return token.replace(SPACE, " ").encode()

    def add_tokens(self, tokens: Sequence[str], *, special: bool) -> int:
        """Grow the vocabulary by those `tokens` that it lacks; how many were new."""
        before = self.vocab_size
        known = self._special_ids if special else self._added.tokens.keys()
        new = [name for name in tokens if self._added.ids.get(name) not in known]
        if special:
            self._rust.add_special_tokens([self._as_special(name) for name in new])
        else:
            self._rust.add_tokens(new)
        self._note_added()
        return self.vocab_size - before

    def _in_library(self, token_id: int) -> str:
        """The token as the library has it: some added ones with the space that they begin with."""
        token: str | None = self._rust.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise PromptError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return token

    def _as_special(self, name: str) -> tokenizers.AddedToken:
        """A new token, or one that is there already with its flags."""
        known = self._added.tokens.get(self._added.ids.get(name, -1))
        return _entry(known or AddedToken(name, normalized=False))

    def _wanted(self, role: str) -> tuple[int, ...]:
        index = self._id_of(role)
        return () if index is None else (index,)

    def _register(self) -> None:
        """Add what the configuration names; tokens that the file has too get its properties."""
        listed = [token for _, token in sorted(self._special.added.items())]
        known = {token.content for token in listed} | set(_added_of(self._rust).ids)
        missing = [token for token in self._special.all if token.content not in known]
        names = {token.content for token in self._special.all}
        for token in (*listed, *missing):
            if token.special or token.content in names:
                self._rust.add_special_tokens([_entry(token)])
            else:
                self._rust.add_tokens([_entry(token)])
        self._note_added()

    def _note_added(self) -> None:
        self._added = _added_of(self._rust)
        tokens = self._added.tokens
        self._special_ids = frozenset(i for i, token in tokens.items() if token.special)
        # Tokens that are looked for in the text as it is; the others wait for the normalizer.
        early = {i: one for i, one in tokens.items() if one.special or not one.normalized}
        self._first_cut = AddedTokens(early, by_words=True)

    def _tokenize_typed(self, text: str, literal: Sequence[Range]) -> list[Token]:
        """As `tokenize`, where a person typed a special token: it stays text."""
        tokens: list[Token] = []
        for start, end, index in self._first_cut.cut(text, literal, ids=self._special_ids):
            if index is None:
                tokens += self._plain.tokenize(text, start, end, self._added)
            else:
                tokens.append(Token(index, start, end))
        return tokens


def _entry(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
    )


def _added_of(tokenizer: tokenizers.Tokenizer) -> AddedTokens:
    return AddedTokens(
        {
            index: AddedToken(
                token.content,
                special=token.special,
                normalized=token.normalized,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
            )
            for index, token in tokenizer.get_added_tokens_decoder().items()
        }
    )


def _types(state: dict[str, Any]) -> set[str]:
    inner = (_types(part) for part in state.get("decoders", []))
    return {str(state.get("type"))}.union(*inner)


def _strips(state: dict[str, Any]) -> bool:
    """Whether a decoder drops the space in front of the first word."""
    kind = state.get("type")
    if kind == "Metaspace":
        return str(state.get("prepend_scheme", "always")) != "never"
    if kind == "Strip":
        return state.get("content") == " " and int(state.get("start", 0)) > 0
    return any(map(_strips, state.get("decoders", [])))

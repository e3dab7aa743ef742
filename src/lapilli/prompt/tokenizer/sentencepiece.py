"""A tokenizer.model read by the sentencepiece library, as the slow LlamaTokenizer reads it.

Exactly the behaviour of transformers 4.37.2 with `legacy` true, false or absent (= true):

    text -> cut at added tokens -> every piece in between through SentencePiece on its own
      legacy      every piece gets a space in front of its first word
      not legacy  only the first piece does
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lapilli.errors import PromptError
from lapilli.prompt.tokenizer import spm_model
from lapilli.prompt.tokenizer.added import AddedTokens
from lapilli.prompt.tokenizer.base import Range, Token, clean_up, length_limit, shifted
from lapilli.prompt.tokenizer.pieces import SPACE, PieceEncoder
from lapilli.prompt.tokenizer.roles import Roles
from lapilli.prompt.tokenizer.special import LLAMA_TOKENS, AddedToken, read_special_tokens


class SentencePieceTokenizer(Roles):
    """The slow LlamaTokenizer.

    Args:
        model: content of tokenizer.model.
        config: parsed tokenizer_config.json.
        special_map: parsed special_tokens_map.json.
        added: parsed added_tokens.json.

    Raises:
        CheckpointError: bytes that are not a SentencePiece model.
    """

    strips_leading_space = True
    apart_ids: frozenset[int]
    """Added tokens that `decode` sets off by spaces."""

    def __init__(
        self,
        model: bytes,
        *,
        config: Mapping[str, object] | None = None,
        special_map: Mapping[str, object] | None = None,
        added: Mapping[str, int] | None = None,
    ) -> None:
        config = config or {}
        self.legacy = config.get("legacy") is not False
        self.padding_side = str(config.get("padding_side", "right"))
        self.model_max_length = length_limit(config.get("model_max_length"))
        self._clean_up = bool(config.get("clean_up_tokenization_spaces", False))
        model = model if self.legacy else spm_model.without_dummy_prefix(model)
        self._encoder = PieceEncoder(model)
        self._spm = self._encoder.processor
        self._num_pieces: int = self._spm.get_piece_size()
        self._special = read_special_tokens(
            config, special_map or {}, added or {}, defaults=LLAMA_TOKENS
        )
        self._special_names = {token.content for token in self._special.all}
        self._extra_special = [token.content for token in self._special.additional]
        self._added = AddedTokens(self._special.added)
        self._register(self._special.all)
        self._guard_typed(self._special_names)
        self._sort()
        self._guard = self._special.content("unk") or LLAMA_TOKENS["unk"]
        self._guard_length = len(self._spm.encode(self._guard, out_type=str))
        self._adds_bos = bool(config.get("add_bos_token", True))
        self._adds_eos = bool(config.get("add_eos_token", False))

    @property
    def vocab_size(self) -> int:
        """Pieces and added tokens, the original's len(tokenizer)."""
        return self._num_pieces + sum(self._piece_id(name) is None for name in self._added.ids)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """BOS, unless the files say `add_bos_token: false`."""
        return (self.bos_id,) if self._adds_bos and self.bos_id is not None else ()

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """EOS, if the files say `add_eos_token: true`."""
        return (self.eos_id,) if self._adds_eos and self.eos_id is not None else ()

    def encode(
        self, text: str, *, add_bos: bool = True, literal: Sequence[Range] = ()
    ) -> list[int]:
        """Ids of a text."""
        ids = [token.id for token in self.tokenize(text, literal=literal)]
        return [*self.prefix_ids, *ids] if add_bos else ids

    def tokenize(self, text: str, *, literal: Sequence[Range] = ()) -> list[Token]:
        """Tokens with their characters, without BOS."""
        if not text:
            return []
        if self.legacy:
            return self._tokenize(text, literal)
        text = SPACE + text.replace(SPACE, " ")
        tokens = self._tokenize(text, shifted(literal, 1))
        if len(tokens) > 1 and self._is_lone_space(tokens[0]) and self._is_special(tokens[1]):
            tokens = tokens[1:]
        return [Token(i, max(start - 1, 0), max(end - 1, 0)) for i, start, end in tokens]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids: runs of pieces through SentencePiece, added tokens set off by spaces.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        special = self._special_ids
        parts: list[str] = []
        run: list[str] = []
        for token in (self.id_to_token(i) for i in ids if not (skip_special and i in special)):
            if token not in self._apart:
                run.append(token)
                continue
            parts += [text for text in [self._join(run)] if text]
            parts.append(token)
            run = []
        if run:
            parts.append(self._join(run))
        text = " ".join(parts)
        return clean_up(text) if self._clean_up else text

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None where it is not in the vocabulary."""
        added = self._added.ids.get(token)
        return self._piece_id(token) if added is None else added

    def id_to_token(self, token_id: int) -> str:
        """The piece or added token.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        added = self._added.tokens.get(token_id)
        if added is not None:
            return added.content
        if not 0 <= token_id < self._num_pieces:
            raise PromptError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return str(self._spm.id_to_piece(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8."""
        token = self.id_to_token(token_id)
        if token_id in self._added.tokens:
            return token.encode()
        if self._spm.is_byte(token_id):
            return bytes([int(token[1:-1], 16)])
        return token.replace(SPACE, " ").encode()

    def add_tokens(self, tokens: Sequence[str], *, special: bool) -> int:
        """Grow the vocabulary by those `tokens` that it lacks; how many were new."""
        before = self.vocab_size
        new = [name for name in tokens if name not in self._added.ids]
        self._register(AddedToken(name, special=special, normalized=not special) for name in new)
        if special:
            self._guard_typed(tokens)
            self._extra_special += [name for name in new if name not in self._special_names]
            self._special_names |= set(new)
        self._sort()
        return self.vocab_size - before

    def _guard_typed(self, names: Iterable[str]) -> None:
        """Leave tokens that were added before as text where a person types them."""
        for name in names:
            index = self._added.ids.get(name)
            if index is not None:
                self._added.add(index, replace(self._added.tokens[index], special=True))

    def _piece_id(self, piece: str) -> int | None:
        index: int = self._spm.piece_to_id(piece)
        return index if self._spm.id_to_piece(index) == piece else None

    def _register(self, tokens: Iterable[AddedToken]) -> None:
        """Give every token that is not added yet the id of its piece, or the next free one."""
        for token in tokens:
            if token.content and token.content not in self._added.ids:
                index = self._piece_id(token.content)
                self._added.add(self.vocab_size if index is None else index, token)

    def _tokenize(self, text: str, literal: Sequence[Range]) -> list[Token]:
        tokens: list[Token] = []
        for start, end, index in self._added.cut(text, literal):
            if index is not None:
                tokens.append(Token(index, start, end))
                continue
            inside = [(b - start, e - start) for b, e in literal if b < end and start < e]
            found = self._encode_piece(text[start:end], inside)
            tokens += found if start == 0 else [Token(i, start + b, start + e) for i, b, e in found]
        return tokens

    def _encode_piece(self, text: str, literal: Sequence[Range]) -> list[Token]:
        """Through SentencePiece; a leading space survives only behind a guard (not legacy)."""
        if self.legacy or not text.startswith((SPACE, " ")):
            return self._encoder.tokenize(text, literal)
        shift = len(self._guard)
        tokens = self._encoder.tokenize(self._guard + text, shifted(literal, shift))
        tokens = tokens[self._guard_length :]
        return [Token(i, max(b - shift, 0), max(e - shift, 0)) for i, b, e in tokens]

    def _is_lone_space(self, token: Token) -> bool:
        return self.id_to_token(token.id) == SPACE

    def _is_special(self, token: Token) -> bool:
        return self.id_to_token(token.id) in self._special_names

    def _sort(self) -> None:
        """Note what `decode` treats apart, once for every change of the vocabulary."""
        ids = self._added.ids
        self._special_ids = frozenset(ids[name] for name in self._special_names if name in ids)
        # Between spaces: added tokens that are not special, or special and not a piece.
        new = {name for name in self._extra_special if ids[name] >= self._num_pieces}
        self._apart = (set(ids) - self._special_names) | new
        self.apart_ids = frozenset(ids[name] for name in self._apart)

    def _join(self, tokens: list[str]) -> str:
        """Pieces through SentencePiece, with special tokens in between as they are."""
        if not tokens:
            return ""
        tokens = [tokens[0].removeprefix(SPACE), *tokens[1:]]
        text = ""
        run: list[str] = []
        after_special = False
        for i, token in enumerate(tokens):
            if token not in self._special_names:
                run.append(token)
                after_special = False
                continue
            if self.legacy and i and not after_special:
                text += " "
            text += self._spm.decode_pieces(run) + token
            run = []
            after_special = True
        return str(text + self._spm.decode_pieces(run))

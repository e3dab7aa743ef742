"""Fast tokenizer: a tokenizer.json, checked, and run by the `tokenizers` library.

Exactly what transformers' fast tokenizers do: special tokens of the configuration that the file
lacks are added, the Llama family writes BOS as `add_bos_token` says, every other family as the
post-processor of the file says. `llama_tokenizer` makes one of a tokenizer.model.

The library is written in Rust. What it did not expect of a file ends in a panic: no Exception, and
several lines on standard error. And it follows every step that a file lists, so that a few steps
which double the text make gigabytes of one question.
"""

import base64
import binascii
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from lapilli.errors import CheckpointError, PromptError
from lapilli.prompt.tokenizer import (
    LLAMA_TOKENS,
    AddedTokens,
    Range,
    Token,
    Tokenizer,
    TokenizerFiles,
    clean_up,
)
from lapilli.prompt.tokenizer.sentencepiece import BPE, SPACE, parse_model

_LLAMA_NAMES = ("<unk>", "<s>", "</s>")


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on,
    in order. Source: GPT-2's encoder.py.
    """
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


_BYTE_OF: Mapping[str, int] = MappingProxyType(_byte_alphabet())


class FastTokenizer(Tokenizer):
    """Any tokenizer.json, or LlamaTokenizerFast out of a tokenizer.model alone.

    Raises:
        CheckpointError: a file that the `tokenizers` library does not read.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        family = str(files.config.get("tokenizer_class") or "").removesuffix("Fast")
        is_llama = files.json is None or family in ("LlamaTokenizer", "CodeLlamaTokenizer")
        if files.json is None:
            self._rust = llama_tokenizer(files.model or b"")
        else:
            self._rust = parse_tokenizer(files.json)
        super().__init__(
            files,
            defaults=LLAMA_TOKENS if is_llama else {},
            padding_side="left" if is_llama else "right",
            clean_up=not is_llama,
        )
        self._register()
        self.prefix_ids, self.suffix_ids = prefix_and_suffix(self._rust)
        if is_llama:
            self._write_around(files.config)
        # Neither special tokens nor trimmed offsets: `encode` writes the prefix itself.
        self._rust.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        self._is_byte_level = "ByteLevel" in _types(state_of(self._rust.decoder))
        self._typed_text = _TypedText(self._rust.to_str)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    def _tokens_of(self, text: str, literal: Sequence[Range]) -> list[Token]:
        """Return the tokens of a text with their characters, without prefix."""
        if self._first_cut.has_typed(text, literal):
            return self._tokenize_typed(text, literal)
        encoding = encode_text(self._rust, text)
        return [Token(i, *span) for i, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ids."""
        with library_errors():
            text = str(self._rust.decode(list(ids), skip_special_tokens=skip_special))
        return clean_up(text) if self._clean_up else text

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, None where it is not in the vocabulary."""
        index: int | None = self._rust.token_to_id(token)
        return index

    def id_to_token(self, token_id: int) -> str:
        """Return the token as the file writes it.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        added = self._added.tokens.get(token_id)
        return self._in_library(token_id) if added is None else added.content

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text; added tokens go through the decoder too."""
        token = self._in_library(token_id)
        if self._is_byte_level:
            is_written = all(character in _BYTE_OF for character in token)
            return bytes(map(_BYTE_OF.__getitem__, token)) if is_written else token.encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[1:-1], 16)])
        return token.replace(SPACE, " ").encode()

    def add_tokens(self, tokens: Sequence[str], *, special: bool) -> int:
        """Add those `tokens` that the vocabulary lacks; return how many were new."""
        before = self.vocab_size
        known = self.special_ids if special else self._added.tokens.keys()
        new = [content for content in tokens if self._added.ids.get(content) not in known]
        if special:
            # A token that is there already keeps its flags.
            ids = [self._added.ids.get(content, -1) for content in new]
            self._rust.add_special_tokens(
                [
                    self._added.tokens.get(i) or AddedToken(content, normalized=False)
                    for i, content in zip(ids, new, strict=True)
                ]
            )
        else:
            self._rust.add_tokens(new)
        self._note_added()
        return self.vocab_size - before

    def _in_library(self, token_id: int) -> str:
        """Return the token as the library has it: some added ones begin with a space there."""
        token: str | None = self._rust.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise PromptError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return token

    def _register(self) -> None:
        """Add what the configuration names; tokens that the file has too get its properties."""
        listed = [token for _, token in sorted(self._special.added.items())]
        in_file = self._rust.get_added_tokens_decoder().values()
        known = {token.content for token in (*listed, *in_file)}
        missing = [token for token in self._special.all if token.content not in known]
        special = {token.content for token in self._special.all}
        for token in (*listed, *missing):
            is_special = token.special or token.content in special
            add = self._rust.add_special_tokens if is_special else self._rust.add_tokens
            add([token])
        self._note_added()

    def _note_added(self) -> None:
        tokens = self._rust.get_added_tokens_decoder()
        self._added = AddedTokens(tokens)
        self.special_ids = frozenset(i for i, token in tokens.items() if token.special)
        # Tokens that are looked for in the text as it is; the others wait for the normalizer.
        early = {i: one for i, one in tokens.items() if one.special or not one.normalized}
        self._first_cut = AddedTokens(early, by_words=True)

    def _tokenize_typed(self, text: str, literal: Sequence[Range]) -> list[Token]:
        """Do the work of `tokenize` where a person typed a special token: it stays text."""
        tokens: list[Token] = []
        for start, end, index in self._first_cut.cut(text, literal, ids=self.special_ids):
            if index is None:
                tokens += self._typed_text.tokenize(text, start, end, self._added)
            else:
                tokens.append(Token(index, start, end))
        return tokens


class _TypedText:
    """A tokenizer.json without its special tokens, for text in which a person typed one of them.

    Other added tokens are found there as everywhere. The model of the tokenizer could still put a
    special token together from its letters, so what it would need for that is taken out as well.

    `source` gives the content of tokenizer.json when it is first needed.
    """

    def __init__(self, source: Callable[[], str]) -> None:
        self._source = source
        self._added: AddedTokens | None = None
        self._ids: dict[int, int] = {}

    def tokenize(self, text: str, start: int, end: int, added: AddedTokens) -> list[Token]:
        """Return the tokens of text[start:end] without the special ones among `added`."""
        if self._added is not added:
            self._build(added)
        encoding = encode_text(self._later if start else self._first, text[start:end])
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [Token(self._ids.get(i, i), start + b, start + e) for i, (b, e) in found]

    def _build(self, added: AddedTokens) -> None:
        """Build two tokenizers: `_later` puts no space in front of its text."""
        special = {token.content for token in added.tokens.values() if token.special}
        raw = json.loads(self._source())
        raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] not in special]
        raw["post_processor"] = None
        _remove_from_model(raw["model"], special)
        self._first = parse_tokenizer(json.dumps(raw))
        _prepend_no_space(raw["pre_tokenizer"])
        self._later = parse_tokenizer(json.dumps(raw))
        # Tokens that are not in the model's vocabulary are counted anew.
        pairs = [(self._first.token_to_id(t["content"]), t["id"]) for t in raw["added_tokens"]]
        self._ids = {theirs: ours for theirs, ours in pairs if theirs not in (None, ours)}
        self._added = added


def _remove_from_model(model: dict[str, Any], contents: set[str]) -> None:
    """Make the tokenizer's model unable to produce the tokens `contents` from text."""
    if "merges" in model:
        pairs = model["merges"]
        whole = (p.replace(" ", "") if isinstance(p, str) else "".join(p) for p in pairs)
        kept = zip(pairs, whole, strict=True)
        model["merges"] = [pair for pair, joined in kept if joined not in contents]
    elif isinstance(model.get("vocab"), list):  # unigram: [piece, score], the id is the index
        model["vocab"] = [
            [f"\0{i}" if piece in contents else piece, score]
            for i, (piece, score) in enumerate(model["vocab"])
        ]


def _prepend_no_space(pre_tokenizer: dict[str, Any] | None) -> None:
    """Turn "a space before the first word of the text" into "none"."""
    if pre_tokenizer is None:
        return
    for inner in pre_tokenizer.get("pretokenizers", []):
        _prepend_no_space(inner)
    if pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"


def _types(state: dict[str, Any]) -> set[str]:
    inner = (_types(part) for part in state.get("decoders", []))
    return {str(state.get("type"))}.union(*inner)


MOST_STEPS: Final = 100
MOST_GROWTH: Final = 64
"""Most times that a text may become longer by what a file replaces; honest files: twice."""
MOST_ADDED: Final = 1000
_SHOWN = 200


def parse_tokenizer(source: str) -> tokenizers.Tokenizer:
    """Parse a tokenizer.json; truncation and padding are left out.

    Raises:
        CheckpointError: a text that the library does not read, or steps that make a text grow.
    """
    advice = "; is it truncated, or written by a newer `tokenizers`?"
    with _quiet(), library_errors(f"({len(source)} characters) cannot be read", advice):
        tokenizer = tokenizers.Tokenizer.from_str(source)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for part in ("normalizer", "decoder"):
        _check_growth(part, state_of(getattr(tokenizer, part)))
    return tokenizer


def state_of(part: Any) -> dict[str, Any]:  # noqa: ANN401 - any part of a tokenizer
    """Return a part of a tokenizer as the JSON that it is saved as; empty where there is none."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


@contextmanager
def library_errors(failed: str | None = None, advice: str = "") -> Iterator[None]:
    """Turn a panic of the library inside into an error of the file that it follows.

    Args:
        failed: what went wrong where the library raises an Exception; None: it is let through.
        advice: behind the library's own words.

    Raises:
        CheckpointError: for a panic, and for an Exception where `failed` is given.
    """
    try:
        yield
    except BaseException as error:  # a panic of Rust is no Exception, and not importable by name
        if type(error).__name__ == "PanicException":
            raise CheckpointError(
                f"tokenizer.json: the library tokenizers fails on it: {str(error)[:_SHOWN]}"
            ) from None
        if failed is None or not isinstance(error, Exception):
            raise
        # The library raises nothing more precise.
        raise CheckpointError(f"tokenizer.json {failed}: {str(error)[:_SHOWN]}{advice}") from error


def encode_text(
    tokenizer: tokenizers.Tokenizer, text: str, *, special: bool = False
) -> tokenizers.Encoding:
    """Encode a text.

    With `special` the post-processor writes what it writes around a text.

    Raises:
        CheckpointError: the file gives no way to encode it.
    """
    with library_errors(f"cannot encode {text[:20]!r}"):
        encoding = tokenizer.encode(text, add_special_tokens=special)
    if max((end for _, end in encoding.offsets), default=0) > len(text):
        raise CheckpointError("tokenizer.json: tokens have places outside of the text")
    return encoding


def prefix_and_suffix(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor writes before and after a text.

    Raises:
        CheckpointError: it changes the text itself, or writes what no vocabulary has.
    """
    with _quiet():
        bare = encode_text(tokenizer, "a").ids
        full = encode_text(tokenizer, "a", special=True).ids
    before = next(
        (i for i in range(len(full)) if full[i : i + len(bare)] == bare), None if full else 0
    )
    if before is None or len(full) - len(bare) > MOST_ADDED:
        raise CheckpointError(
            f"tokenizer.json: the post_processor makes {len(full)} tokens of {len(bare)}, expected "
            "the same ones between a few others"
        )
    prefix, suffix = tuple(full[:before]), tuple(full[before + len(bare) :])
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    unknown = next((i for i in (*prefix, *suffix) if i >= size), None)
    if unknown is not None:
        raise CheckpointError(
            f"tokenizer.json: the post_processor writes token {unknown}, the vocabulary has {size}"
        )
    return prefix, suffix


def _check_growth(part: str, state: Mapping[str, Any]) -> None:
    steps = list(_steps(state))
    # What Unicode forms make longer are few letters, and only once.
    growth = math.prod(_growth(step) for step in steps)
    if len(steps) > MOST_STEPS or growth > MOST_GROWTH:
        raise CheckpointError(
            f"tokenizer.json: the {part} has {len(steps)} steps that make a text up to "
            f"{growth:.0f} times as long, expected at most {MOST_STEPS} and {MOST_GROWTH}"
        )


def _steps(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer or decoder in order, sequences opened."""
    inner = state.get("normalizers") or state.get("decoders")
    if inner is None:
        yield state
        return
    for one in inner:
        yield from _steps(one)


def _growth(step: Mapping[str, Any]) -> float:
    """Return how many times longer a step may make a text."""
    kind = step.get("type")
    if kind == "Replace":
        literal = step["pattern"].get("String")
        content = len(step["content"])
        return max(1.0, content / len(literal)) if literal else 1.0 + content
    if kind == "Prepend":  # once, before the whole text
        return 1.0 + len(step["prepend"]) / MOST_ADDED
    if kind == "Precompiled":
        return _charsmap_growth(step["precompiled_charsmap"])
    return 1.0


def _charsmap_growth(charsmap: str) -> float:
    """Return how many times longer a charsmap of SentencePiece may make a text.

    Source: sentencepiece normalizer.cc: the size of a trie, the trie, and texts that end with 0.
    """
    try:
        blob = base64.b64decode(charsmap)
    except binascii.Error:
        return math.inf
    texts = blob[4 + int.from_bytes(blob[:4], "little") :].split(b"\0")
    # Its own ligatures become up to 18 characters, none of them in a text of many.
    return max(1.0, max(map(len, texts)) / (18 * 4))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold standard error back until the end, and drop what was written where an error leaves."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except CheckpointError:
            said.truncate(0)
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            if text := said.read():
                os.write(2, text)


def llama_tokenizer(model: bytes, *, legacy: bool = True) -> tokenizers.Tokenizer:
    """Convert a tokenizer.model of Llama or Mistral for the `tokenizers` library.

    With `legacy` a space is written before the first word of every text between added tokens, else
    at the beginning of a text alone, as slow tokenizers with `legacy: false` do.

    Raises:
        CheckpointError: a unigram, word or character model.

    Note: the first three pieces are called <unk>, <s> and </s> whatever the file calls them, and
        text that no piece covers becomes bytes. Source: what transformers 4.37.2 builds for
        LlamaTokenizerFast when a checkpoint has only a tokenizer.model.
    """
    parsed = parse_model(model)
    if parsed.algorithm != BPE:
        raise CheckpointError(
            f"tokenizer.model holds algorithm {parsed.algorithm}, expected BPE ({BPE}): "
            "use the slow tokenizer, or give a tokenizer.json"
        )
    others = parsed.pieces[len(_LLAMA_NAMES) :]
    scores = dict.fromkeys(_LLAMA_NAMES, 0.0) | {piece.text: piece.score for piece in others}
    vocab = {text: i for i, text in enumerate((*_LLAMA_NAMES, *(p.text for p in others)))}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges(scores, {piece.text: i for i, piece in enumerate(parsed.pieces)}),
            unk_token=parsed.unk_piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            SPACE, prepend_scheme="first", split=False
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in _LLAMA_NAMES])
    return tokenizer


def merges(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the merges of a BPE vocabulary that lists only its pieces.

    Every way to cut a piece into two pieces is a merge, ranked by the score of what it makes, then
    by the id of its first half.

    `scores` are those of the pieces that merges may make, `ids` of the pieces that may be merged.
    """
    found: list[tuple[str, str]] = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        cuts = [
            (first, piece[at:])
            for at in range(1, len(piece))
            if (first := piece[:at]) in ids and piece[at:] in ids
        ]
        found += sorted(cuts, key=lambda cut: ids[cut[0]])
    return found

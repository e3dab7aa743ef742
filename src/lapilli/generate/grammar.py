"""Structured output: the tokens that a grammar allows next, by the library llguidance.

    Grammar --GrammarCompiler.compile: tried out--> CompiledGrammar --matcher--> TokenMatcher
    TokenMatcher   masks of all rows, in parallel (fill_masks) -> token -> consume -> is_over
    forced tokens  the only ones that the grammar allows: a draft that is always right

The grammar speaks of the text that a reader sees. Tokenizers of the SentencePiece kind drop the
space before the first word, so there an answer may begin with one more. Special tokens are no text,
and no grammar allows them.

llguidance knows one token more than the model, END, right behind the vocabulary: where it is
allowed, so are the tokens that end this answer, and only there. So one vocabulary serves all
requests, whichever tokens end them.
"""

import json
import os
import re
import weakref
from collections.abc import Collection, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from lapilli.config.grammar import Grammar, has_finite_instance
from lapilli.errors import GrammarError
from lapilli.generate.output import TokenBytes
from lapilli.generate.speculative import IsWorth, Proposer
from lapilli.generate.vocabulary import Vocabulary
from lapilli.shapes import Bool, Int, Tensor

LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 30_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""Limits of llguidance, below its own, so that a hostile grammar costs parts of a second."""
KEPT = 32
"""Compiled grammars that are kept per tokenizer."""
_WORD = 32  # bits
_TRIED = 2  # tokens
_WRITTEN = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON in one line, as json.dumps writes it: what stands between values is forced."""
_TOO_COSTLY = (
    "it takes too much time or memory: make it smaller, bound what repeats, and put no repetition "
    "inside of another"
)
_REASONS = (
    (r"NoExtension", "nothing matches it from here on"),
    (
        r"lexer error|LexerTooComplex|[Ff]uel|Too many items|too many (states|expressions)|"
        r"too (big|large|complex)|limit (for|exceeded|reached)|max is \d|exceeds? (size )?limit|"
        r"stack level exceeded|maximum number of",
        _TOO_COSTLY,
    ),
)
"""What llguidance says of its own insides, and what that means to whoever wrote the grammar."""
_NO_INSTANCE = (
    "nothing matches it: its required parts contain the schema again, so no value of it ever ends; "
    "make the part that refers back optional, or allow null in its place"
)


@cache
def _library() -> ModuleType:
    """Return llguidance.

    Raises:
        GrammarError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError(
            "an answer is held to a schema by the library llguidance, which is not installed: "
            'pip install "lapilli[grammar]"'
        ) from error
    return llguidance


@cache
def _executor(process: int) -> Any:  # noqa: ANN401  see _library
    """Return the threads that fill masks; a forked process has none of its parent's."""
    del process
    return _library().LLExecutor()


class TokenMatcher:
    """Grammar and the tokens of one answer so far.

    Args:
        matcher: llguidance's, of its own.
        stop_ids: tokens that end the answer; allowed where the grammar may end, nowhere else.
        vocab_size: width of the logits.
        name: of the grammar, in errors.
    """

    def __init__(
        self,
        matcher: Any,  # noqa: ANN401  see _library
        *,
        stop_ids: Collection[int],
        vocab_size: int,
        name: str,
    ) -> None:
        self._matcher = matcher
        self._stop_ids = frozenset(stop_ids)
        self._ends = [token for token in sorted(stop_ids) if token < vocab_size]
        self._vocab_size = vocab_size
        self._name = name
        self.is_over = False
        """True once nothing may follow: the answer is whole."""

    def consume(self, token_id: int) -> None:
        """Advance by the token that was sampled.

        Raises:
            GrammarError: the grammar does not allow it, because no token of the model goes on
                with this text, or because a limit was reached.
        """
        if token_id in self._stop_ids and self._matcher.is_accepting():
            self.is_over = True
            return
        if not self._matcher.consume_token(token_id):
            raise GrammarError(
                f"the answer cannot go on as {self._name} asks: "
                f"{_in_plain_words(self._matcher.get_error())}"
            )
        self.is_over = self._matcher.is_stopped()

    def forced(self) -> list[int]:
        """Return the tokens that follow in any case; often none."""
        return [] if self.is_over else self._matcher.compute_ff_tokens()

    def allows(self, token_ids: Sequence[int]) -> int:
        """Return how many of these tokens, one after the other, are allowed."""
        ordinary = [*token_ids]
        at = next((at for at, token in enumerate(ordinary) if token in self._stop_ids), None)
        return int(self._matcher.validate_tokens(ordinary[:at]))

    def check(self) -> None:
        """Check that llguidance computed the last mask.

        Raises:
            GrammarError: it reached a limit, or nothing may follow.
        """
        if self._matcher.is_error():
            raise GrammarError(
                f"the answer cannot go on as {self._name} asks: "
                f"{_in_plain_words(self._matcher.get_error())}"
            )

    def place(self, row: int) -> tuple[Any, int]:
        """Return what llguidance needs to fill the mask of a row."""
        return self._matcher, row

    def allow_ends(self, words: "np.ndarray[Any, np.dtype[np.uint32]]") -> None:
        """Allow the tokens that end the answer in a mask [words] if END is, and only then."""
        is_end = words[self._vocab_size // _WORD] >> np.uint32(self._vocab_size % _WORD) & 1
        for token in self._ends:
            bit = np.uint32(1 << token % _WORD)
            if is_end:
                words[token // _WORD] |= bit
            else:
                words[token // _WORD] &= ~bit


def fill_masks(
    wanted: Sequence[tuple[int, TokenMatcher, Sequence[int]]], *, rows: int, vocab_size: int
) -> Int[Tensor, "rows words"]:
    """Return the masks of a pass, packed: 32 tokens a word, the lowest bit first.

    Args:
        wanted: per constrained sequence its first row, its matcher, and its draft tokens, whose
            rows follow. What is behind a draft token that is not allowed is left as it is.
        rows: of the pass; those that nobody constrains allow everything.
        vocab_size: width of the logits.
    """
    masks = torch.full((rows, -(-(vocab_size + 1) // _WORD)), -1, dtype=torch.int32)
    places = [(*matcher.place(row), list(draft)) for row, matcher, draft in wanted]
    alone = [place[:2] for place in places if not place[2]]
    drafted = [place for place in places if place[2]]
    where = (masks.data_ptr(), 4 * masks.shape[1], rows)
    executor = _executor(os.getpid())
    if alone:
        executor.unsafe_compute_mask_ptr(alone, *where)
    if drafted:
        executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *where)
    words = masks.numpy().view(np.uint32)
    for row, matcher, draft in wanted:
        for at in range(row, row + 1 + len(draft)):
            matcher.allow_ends(words[at])
    return masks


def unpack_masks(
    masks: Int[Tensor, "rows words"], vocab_size: int, device: torch.device
) -> Bool[Tensor, "rows vocab_size"]:
    """Return packed masks as one flag per token, on a device."""
    if device.type == "cpu":
        flags = np.unpackbits(masks.numpy().view(np.uint8), axis=1, bitorder="little")
        return torch.from_numpy(flags[:, :vocab_size]).view(torch.bool)
    shifts = torch.arange(_WORD, dtype=torch.int32, device=device)
    bits = masks.to(device, non_blocking=True).unsqueeze(-1) >> shifts & 1
    return bits.flatten(1)[:, :vocab_size].bool()


class CompiledGrammar:
    """A grammar that was compiled and tried; every answer gets a matcher of its own."""

    def __init__(self, matcher: Any, *, vocab_size: int, name: str) -> None:  # noqa: ANN401
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._name = name

    def matcher(self, stop_ids: Collection[int]) -> TokenMatcher:
        """Return the matcher of a new answer."""
        return TokenMatcher(
            self._matcher.deep_copy(),
            stop_ids=stop_ids,
            vocab_size=self._vocab_size,
            name=self._name,
        )


class GrammarCompiler:
    """Compiler of grammars for one tokenizer.

    Args:
        tokenizer: it is not kept.
        vocab_size: width of the logits.
    """

    def __init__(self, tokenizer: TokenBytes, vocab_size: int) -> None:
        library = _library()
        vocabulary = Vocabulary(tokenizer, vocab_size)
        self._vocab_size = vocab_size
        self._tokenizer = library.LLTokenizer(
            library.TokenizerWrapper(vocabulary), n_vocab=vocab_size + 1
        )
        self._space = next((i for i, text in enumerate(vocabulary.tokens) if text == b" "), None)
        self._drops_space = vocabulary.drops_space
        self._limits = library.LLParserLimits(**LIMITS)
        self.compile = lru_cache(maxsize=KEPT)(self._compile)
        """Return the CompiledGrammar of a Grammar; raises GrammarError."""

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        for one in (grammar, *grammar.parts):
            _check_instance(one)
        try:
            return self._compiled(grammar)
        except GrammarError:
            for part in grammar.parts:  # the whole is ours, a part is what somebody wrote
                self.compile(part)
            raise

    def _compiled(self, grammar: Grammar) -> CompiledGrammar:
        matcher = self._matcher(grammar, _source(grammar))
        if self._drops_space:
            # Where the text may begin with a space, the one that is dropped has to be there.
            needs = self._space is not None and matcher.validate_tokens([self._space]) == 1
            matcher = self._matcher(grammar, _source(grammar, " " if needs else "?"))
        self._try(grammar, matcher.deep_copy())
        return CompiledGrammar(matcher, vocab_size=self._vocab_size, name=grammar.name)

    def _matcher(self, grammar: Grammar, source: str) -> Any:  # noqa: ANN401
        matcher = _library().LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        self._check(grammar, matcher)
        return matcher

    def _try(self, grammar: Grammar, matcher: Any) -> None:  # noqa: ANN401
        """Take the first steps here: what costs too much shows before other answers wait for it."""
        for _ in range(_TRIED):
            mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            self._check(grammar, matcher)
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")[: self._vocab_size])
            if not len(allowed):
                break
            matcher.consume_token(int(allowed[0]))
            self._check(grammar, matcher)

    def _check(self, grammar: Grammar, matcher: Any) -> None:  # noqa: ANN401
        if matcher.is_error():
            reason = _in_plain_words(matcher.get_error())
            place = "" if grammar.parts else f" (in {grammar.text!r:.100})"
            raise GrammarError(f"{grammar.name} cannot be followed: {reason}{place}")


_COMPILERS: dict[tuple[int, int, object], GrammarCompiler] = {}


def compiler_of(tokenizer: TokenBytes, vocab_size: int) -> GrammarCompiler:
    """Return the compiler of a tokenizer, the same one for as long as the tokenizer lives.

    Raises:
        GrammarError: llguidance is not installed.
    """
    key = (id(tokenizer), vocab_size, getattr(tokenizer, "vocab_size", None))
    found = _COMPILERS.get(key)
    if found is None:
        found = GrammarCompiler(tokenizer, vocab_size)
        weakref.finalize(tokenizer, _COMPILERS.pop, key, None)
        found = _COMPILERS.setdefault(key, found)
    return found


def compiled(
    grammar: Grammar | None, tokenizer: TokenBytes, vocab_size: int
) -> CompiledGrammar | None:
    """Return a grammar compiled for a tokenizer; None where there is no grammar.

    Raises:
        GrammarError: it cannot be followed, or llguidance is not installed.
    """
    if grammar is None:
        return None
    return compiler_of(tokenizer, vocab_size).compile(grammar)


class GrammarProposer:
    """Proposer of forced tokens, and of another proposer's tokens as far as they are allowed.

    Args:
        matcher: of the sequence.
        proposer: is asked where nothing is forced.
    """

    def __init__(self, matcher: TokenMatcher, proposer: Proposer) -> None:
        self._matcher = matcher
        self._proposer = proposer

    def propose(self, keys: Sequence[int], most: int, is_worth: IsWorth) -> list[int]:
        """Return forced tokens, whose chance is 1, or what the other proposer says."""
        forced: list[int] = []
        for token_id in self._matcher.forced()[:most]:
            if not is_worth(1.0):
                break
            forced.append(token_id)
        if forced:
            return forced
        proposed = self._proposer.propose(keys, most, is_worth)
        return proposed[: self._matcher.allows(proposed)]


def _check_instance(grammar: Grammar) -> None:
    """Refuse a JSON schema that no finite value follows.

    The first steps show it only where it is the whole form: the model may choose another branch.

    Raises:
        GrammarError: there is none.
    """
    if grammar.kind == "json_schema" and not has_finite_instance(json.loads(grammar.text)):
        raise GrammarError(
            f"{grammar.name} cannot be followed: {_NO_INSTANCE} (in {grammar.text!r:.100})"
        )


def _source(grammar: Grammar, space: str | None = None) -> str:
    """Return the grammar as llguidance reads it; `space`: " " or "?" for one that may be there."""
    library = _library()
    if grammar.kind == "json_schema":
        body: dict[str, Any] = {"json_schema": _written(json.loads(grammar.text))}
    elif grammar.kind == "regex":
        body = json.loads(library.LLMatcher.grammar_from_regex(grammar.text))["grammars"][0]
    elif grammar.kind == "choice":
        texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
        body = {"lark_grammar": f"start: {' | '.join(texts)}"}
    else:
        body = {"lark_grammar": grammar.text}
    grammars = [body | {"name": "answer"}]
    if space is not None:
        rule = 'start: " " @answer' if space == " " else 'start: " "? @answer'
        grammars.insert(0, {"lark_grammar": rule})
    return json.dumps({"grammars": grammars})


def _written(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with how its JSON is written, unless it says so itself.

    With any white space a small model may write line ends for ever, and no key is forced.
    """
    options = schema.get("x-guidance")
    return schema | {"x-guidance": _WRITTEN | (options if isinstance(options, dict) else {})}


def _in_plain_words(error: str) -> str:
    """Return what a message of llguidance means; its first lines where it says so itself."""
    for pattern, words in _REASONS:
        if re.search(pattern, error):
            return words
    text = " ".join(error.replace("<non-verbose/>", "").split())
    return f"{text[:300]}..." if len(text) > 300 else text

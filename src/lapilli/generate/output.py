"""Output of generation: text from tokens as they come, chunks (Piece) and results (Generation).

    token --IncrementalDetokenizer--> text --StopStrings--> GenerationState --take--> Piece

A character may need several tokens (byte-level BPE, byte fallback), and the first word of an
answer loses its leading space while a later one keeps it. Text that may become a stop string is
held back, so no part of one is ever shown. Imports no torch and knows no model.
"""

from codecs import getincrementaldecoder
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from lapilli.config.generation import SamplingParams
from lapilli.errors import PromptError

Utf8Decoder = getincrementaldecoder("utf-8")


@runtime_checkable
class TokenBytes(Protocol):
    """The part of a tokenizer (`lapilli.prompt.tokenizer.Tokenizer`) that generation needs."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends an answer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not part of a text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text, in UTF-8; not necessarily whole characters.

        Raises:
            PromptError: the tokenizer has no such token.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens without special ones."""


class IncrementalDetokenizer:
    """Decoder of a growing list of tokens that returns text as soon as it is certain.

    The pieces together, with that of `flush` at the end, are `tokenizer.decode` of all ids.

    Note:
        For bytes that are no text the number of replacement characters may differ from `decode`:
        the `tokenizers` library replaces a whole run of byte tokens, its valid characters too,
        when a part of it is invalid. Text that was returned before stays as it is here.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._silent = tokenizer.special_ids
        # Added tokens that the slow tokenizers set off by spaces; most tokenizers have none.
        self._apart: frozenset[int] = getattr(tokenizer, "apart_ids", frozenset())
        self._utf8 = Utf8Decoder(errors="replace")
        self._ids: list[int] = []
        self._length = 0  # of the text so far
        # Tokenizers differ in the white space at the beginning of a text and after a token that is
        # set off, so until other text follows it is taken from `decode`.
        self._is_open = True

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; empty while a character is incomplete."""
        if token_id in self._silent:
            return ""
        try:
            added = self._tokenizer.token_bytes(token_id)
        except PromptError:
            # Embeddings are often padded to more rows than the tokenizer has tokens. If a model
            # generates one of them, the answer goes on.
            return ""
        self._ids.append(token_id)
        if token_id in self._apart:
            self._utf8.reset()
            self._is_open = True
            return self._shown(self._behind())
        text = self._utf8.decode(added)
        if not self._is_open:
            return self._shown(text)
        if not text.strip():
            return ""
        self._is_open = False
        return self._shown(_white(self._behind()) + text.lstrip())

    def flush(self) -> str:
        """Return the rest: an incomplete character as a replacement character."""
        text = self._utf8.decode(b"", final=True)
        return self._shown(_white(self._behind()) + text if self._is_open else text)

    def _behind(self) -> str:
        """Return what `decode` has behind the text so far."""
        return self._tokenizer.decode(self._ids)[self._length :]

    def _shown(self, text: str) -> str:
        self._length += len(text)
        return text


def _white(text: str) -> str:
    """Return the white space that a text begins with."""
    return text[: len(text) - len(text.lstrip())]


class StopStrings:
    """Search for stop strings across tokens; the text is cut before the one completed first.

    The result does not depend on how the text is cut into pieces: among several stop strings the
    one that ends first counts, and of those the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return the text that is certain now and was not returned before."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        kept = self._forming(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """Return the text that was held back; call at the end."""
        held, self._held = self._held, ""
        return held

    def _forming(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token, and of its alternatives.

    Natural logarithms of the model's own probabilities, before bias, penalties, temperature and
    filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer.

    Attributes:
        token_ids: every generated token, the one that ended the answer included.
        text: without special tokens, and without the stop string or stop token that ended it.
        finish_reason: `stop` (end token, stop token, stop string, end of a grammar), `length`
            (max_new_tokens or the context is used up) or `cancelled`.
        logprobs: one report per token, if SamplingParams.logprobs asked for it.
        score: of the best beam: log-probability / length ** length_penalty; None without beams.
        prompt_len: tokens of the prompt, every visual token counted.
        stop: the stop string that ended it; None where something else did.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None
    prompt_len: int = 0
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunk of an answer: the text that became certain since the chunk before it.

    Attributes:
        text: never a part of a character or of a stop string.
        token_ids: generated since the chunk before.
        finish_reason: set on the last chunk only.
        logprobs: one report per token, if they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class GenerationState:
    """An answer while it is generated: its tokens and text, and whether they have ended.

    Args:
        tokenizer: turns ids into text.
        params: when to stop, and whether log-probabilities are kept.
        eos_ids: end tokens of the model; None: the tokenizer's.
        room: most tokens that the context leaves.
        prompt_len: passed on to the result.

    Attributes:
        limit: most tokens.
        stop_ids: tokens that end the answer.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        params: SamplingParams,
        *,
        eos_ids: Collection[int] | None,
        room: int,
        prompt_len: int = 0,
    ) -> None:
        if eos_ids is None:
            eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.stop_ids = frozenset((*eos_ids, *params.stop_token_ids))
        self.limit = min(params.max_new_tokens, room)
        self._tokenizer = tokenizer
        self._params = params
        self.finish_reason: FinishReason | None = None
        self.score: float | None = None
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopStrings(params.stop)
        self._prompt_len = prompt_len
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._texts: list[str] = []
        self._num_taken_tokens = 0
        self._num_taken_texts = 0
        self._is_end_taken = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far, the one that ended the answer included."""
        return tuple(self._token_ids)

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far."""
        return len(self._token_ids)

    @property
    def is_finished(self) -> bool:
        """True once no further token is taken."""
        return self.finish_reason is not None

    def push(
        self, token_id: int, logprob: TokenLogprob | None = None, *, is_whole: bool = False
    ) -> None:
        """Add the next token; `is_whole`: nothing may follow, by the grammar of the answer."""
        self._token_ids.append(token_id)
        if self._logprobs is not None and logprob is not None:
            self._logprobs.append(logprob)
        if token_id in self.stop_ids:
            self._finish("stop")
            return
        self._texts.append(self._stops.push(self._detokenizer.push(token_id)))
        if self._stops.found is not None:
            self.finish_reason = "stop"
        elif is_whole:
            self._finish("stop")
        elif len(self._token_ids) >= self.limit:
            self._finish("length")

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Return whether an answer of these tokens would be whole; nothing is added."""
        if len(token_ids) >= self.limit or token_ids[-1] in self.stop_ids:
            return True
        if not self._params.stop:
            return False
        stops, text = StopStrings(self._params.stop), IncrementalDetokenizer(self._tokenizer)
        for token_id in token_ids:
            stops.push(text.push(token_id))
        return stops.found is not None

    def cancel(self) -> None:
        """End the answer here, unless it is finished."""
        if not self.is_finished:
            self._finish("cancelled")

    def take(self) -> Piece | None:
        """Return the text since the last call; None while there is none.

        The last piece may be empty.
        """
        text = "".join(self._texts[self._num_taken_texts :])
        if self._is_end_taken or not (text or self.is_finished):
            return None
        self._is_end_taken = self.is_finished
        token_ids = tuple(self._token_ids[self._num_taken_tokens :])
        logprobs = tuple((self._logprobs or ())[self._num_taken_tokens :])
        self._num_taken_texts = len(self._texts)
        self._num_taken_tokens = len(self._token_ids)
        return Piece(text, token_ids, self.finish_reason, logprobs)

    def result(self) -> Generation:
        """Return the answer so far, cancelled unless it is finished."""
        self.cancel()
        return Generation(
            token_ids=self.token_ids,
            text="".join(self._texts),
            finish_reason=self.finish_reason or "cancelled",
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            score=self.score,
            prompt_len=self._prompt_len,
            stop=self._stops.found,
        )

    def _finish(self, reason: FinishReason) -> None:
        """Append the text that was held back and set the reason."""
        self._texts.append(self._stops.push(self._detokenizer.flush()))
        if self._stops.found is None:
            self._texts.append(self._stops.flush())
        self.finish_reason = "stop" if self._stops.found is not None else reason

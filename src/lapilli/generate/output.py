"""Output of generation: chunks (Piece), results (Generation), and the state that they come from.

Imports no torch and knows no model.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from lapilli.config.generation import SamplingParams
from lapilli.generate.detokenizer import IncrementalDetokenizer, StopStrings, TokenBytes

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
        finish_reason: `stop` (end token, stop token, stop string), `length` (max_new_tokens or the
            context is used up) or `cancelled`.
        logprobs: one report per token, if SamplingParams.logprobs asked for it.
        score: of the best beam: log-probability / length ** length_penalty; None without beams.
        prompt_len: tokens of the prompt, every visual token counted.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None
    prompt_len: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunk of an answer: the text that became certain since the chunk before it.

    Attributes:
        text: never a part of a character or of a stop string.
        token_ids: generated since the chunk before.
        finish_reason: set on the last chunk only.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


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

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Add the next token."""
        self._token_ids.append(token_id)
        if self._logprobs is not None and logprob is not None:
            self._logprobs.append(logprob)
        if token_id in self.stop_ids:
            self._finish("stop")
            return
        self._texts.append(self._stops.push(self._detokenizer.push(token_id)))
        if self._stops.found is not None:
            self.finish_reason = "stop"
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
        self._num_taken_texts = len(self._texts)
        self._num_taken_tokens = len(self._token_ids)
        return Piece(text, token_ids, self.finish_reason)

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
        )

    def _finish(self, reason: FinishReason) -> None:
        """Append the text that was held back and set the reason."""
        self._texts.append(self._stops.push(self._detokenizer.flush()))
        if self._stops.found is None:
            self._texts.append(self._stops.flush())
        self.finish_reason = "stop" if self._stops.found is not None else reason

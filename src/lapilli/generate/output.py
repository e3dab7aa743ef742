"""The answer of one row while it grows: its tokens, its text, why it ended; no torch, no model."""

from collections.abc import Collection

from lapilli.config.generation import SamplingParams
from lapilli.generate.detokenizer import SettlingText, TokenBytes
from lapilli.generate.outputs import FinishReason, Generation, Piece, TokenLogprob
from lapilli.generate.stop import StopStrings


class Answer:
    """Takes the tokens of one row and decides when they end.

    Args:
        tokenizer: turns ids into text.
        params: stop strings, and whether log-probabilities are kept.
        stop_ids: tokens that end the answer.
        limit: most tokens.
        prompt_len: passed on to the result.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        params: SamplingParams,
        *,
        stop_ids: Collection[int],
        limit: int,
        prompt_len: int = 0,
    ) -> None:
        self._settling = SettlingText(tokenizer)
        self._stops = StopStrings(params.stop)
        self._stop_ids = stop_ids
        self._limit = limit
        self._prompt_len = prompt_len
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._pieces: list[str] = []
        self._taken_tokens = 0
        self._taken_pieces = 0
        self._end_taken = False
        self.finish_reason: FinishReason | None = None
        self.score: float | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far, the one that ended the answer included."""
        return tuple(self._token_ids)

    @property
    def limit(self) -> int:
        """Most tokens that this answer may have."""
        return self._limit

    @property
    def is_finished(self) -> bool:
        """Whether nothing more is taken."""
        return self.finish_reason is not None

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Add the next token."""
        self._token_ids.append(token_id)
        if self._logprobs is not None and logprob is not None:
            self._logprobs.append(logprob)
        if token_id in self._stop_ids:
            self._finish("stop")
            return
        self._pieces.append(self._stops.push(self._settling.push(token_id)))
        if self._stops.found is not None:
            self.finish_reason = "stop"
        elif len(self._token_ids) >= self._limit:
            self._finish("length")

    def cancel(self) -> None:
        """End here, if nothing else ended the answer before."""
        if not self.is_finished:
            self._finish("cancelled")

    def take(self) -> Piece | None:
        """What came since the last call; None while there is nothing to show.

        The piece that tells the end may be empty.
        """
        text = "".join(self._pieces[self._taken_pieces :])
        if self._end_taken or not (text or self.is_finished):
            return None
        self._end_taken = self.is_finished
        token_ids = tuple(self._token_ids[self._taken_tokens :])
        self._taken_pieces = len(self._pieces)
        self._taken_tokens = len(self._token_ids)
        return Piece(text, token_ids, self.finish_reason)

    def result(self) -> Generation:
        """The answer so far; cancelled, if it had not ended."""
        self.cancel()
        return Generation(
            token_ids=tuple(self._token_ids),
            text="".join(self._pieces),
            finish_reason=self.finish_reason or "cancelled",
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            score=self.score,
            prompt_len=self._prompt_len,
        )

    def _finish(self, reason: FinishReason) -> None:
        """Hand out what was held back: it cannot become anything else any more."""
        self._pieces.append(self._stops.push(self._settling.flush()))
        if self._stops.found is None:
            self._pieces.append(self._stops.flush())
        self.finish_reason = "stop" if self._stops.found is not None else reason

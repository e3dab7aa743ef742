"""What generation hands out; no torch, no model."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable a token was, and what else could have stood there.

    Natural logarithms of the model's own probabilities: before the repetition penalty, the
    temperature and the filters, so they do not depend on how the token was drawn.
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
        prompt_len: positions of the prompt, every visual token counted.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None
    prompt_len: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain since the piece before it.

    Attributes:
        text: never a part of a character or of a stop string.
        token_ids: generated since the piece before.
        finish_reason: set on the last piece only.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None

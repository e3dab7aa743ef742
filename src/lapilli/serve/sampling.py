"""Sampling options of OpenAI's protocols, with those that vLLM's clients add."""

import re
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from lapilli.config.generation import SamplingParams
from lapilli.config.grammar import Grammar
from lapilli.errors import GenerationError
from lapilli.serve.errors import invalid

MOST_STOPS = 64
"""Each of them is looked for in every token."""
SHARED = (
    "temperature",
    "top_p",
    "min_p",
    "stop",
    "stop_token_ids",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
"""Options that the engine has under the same name."""


class SamplingBody(BaseModel):
    """Options that chat, completions and their kin share; None is the default of the server."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    user: str | None = None

    @property
    def reports_usage(self) -> bool:
        """Return whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(
        self,
        base: SamplingParams,
        *,
        logprobs: int | None = None,
        max_new_tokens: int | None = None,
        grammar: Grammar | None = None,
        longest: str = "max_tokens",
    ) -> SamplingParams:
        """Return them as the engine's, with those that protocols name differently, over `base`.

        Args:
            base: options that count where the body says nothing.
            logprobs: how many alternatives are reported.
            max_new_tokens: the longest answer.
            grammar: form of the answer.
            longest: what the client calls the longest answer.

        Raises:
            ApiError: a value out of its bounds, or a token of logit_bias that is none.
        """
        check_stops(self.stop, "stop")
        try:
            bias = {int(key): value for key, value in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise invalid(f"logit_bias: {error}: its keys are token ids", "logit_bias") from error
        options = {name: getattr(self, name) for name in SHARED} | {
            "top_k": None if self.top_k in (0, -1) else self.top_k,  # "all of them" elsewhere
            "seed": None if self.seed is None else self.seed % (1 << 63),
            "logit_bias": bias or None,  # none says nothing, and the server's own counts
            "logprobs": logprobs,
            "max_new_tokens": max_new_tokens,
            "grammar": grammar,
        }
        return updated(base, options, {"max_new_tokens": longest})


def updated(
    base: SamplingParams, options: Mapping[str, object], names: Mapping[str, str] | None = None
) -> SamplingParams:
    """Return options over others; those that are None say nothing.

    Args:
        base: the others.
        options: by their names in the engine.
        names: what the client calls those that have another name there.

    Raises:
        ApiError: a value out of its bounds, by the client's name of it.
        GenerationError: options that contradict each other.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return base.updated(**given)
    except GenerationError:
        for name, value in given.items():
            _check_option(base, name, value, (names or {}).get(name, name))
        raise


def _check_option(base: SamplingParams, name: str, value: object, said: str) -> None:
    """Refuse one option that is wrong by itself.

    Raises:
        ApiError: it is; the message has the client's name of it, `said`.
    """
    try:
        base.updated(**{name: value})
    except GenerationError as error:
        message = re.sub(rf"\b{name}\b", said, str(error))
        raise invalid(message, said, code=type(error).__name__) from error


def check_stops(given: object, where: str) -> None:
    """Refuse too many stop strings.

    Raises:
        ApiError: there are more than `MOST_STOPS`.
    """
    if isinstance(given, list) and len(given) > MOST_STOPS:
        raise invalid(f"{where} has {len(given)} texts, the limit is {MOST_STOPS}", where)


class StreamOptions(BaseModel):
    """What a stream reports besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


SamplingBody.model_rebuild()

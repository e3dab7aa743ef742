"""Sampling options of OpenAI's protocols, with those that vLLM's clients add."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from lapilli.config.generation import SamplingParams
from lapilli.serve.errors import ApiError

MOST_STOPS = 64
"""Each of them is looked for in every token."""


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
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, base: SamplingParams, **more: Any) -> SamplingParams:  # noqa: ANN401  of any field
        """Return them as the engine's, over those of the server.

        Raises:
            GenerationError: a value out of its bounds.
            ApiError: a token of logit_bias that is none.
        """
        check_stops(self.stop, "stop")
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "stop",
            "stop_token_ids",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
        )
        options = {name: getattr(self, name) for name in names}
        if options["top_k"] in (0, -1):  # "all of them" in other servers
            options["top_k"] = None
        options["seed"] = None if self.seed is None else self.seed % (1 << 63)
        try:
            options["logit_bias"] = {int(key): v for key, v in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise ApiError(
                400, f"logit_bias: {error}: its keys are token ids", param="logit_bias"
            ) from error
        options.update(more)
        return base.updated(**{name: value for name, value in options.items() if value is not None})


def check_stops(given: object, where: str) -> None:
    """Refuse too many stop strings.

    Raises:
        ApiError: there are more than `MOST_STOPS`.
    """
    if isinstance(given, list) and len(given) > MOST_STOPS:
        raise ApiError(
            400, f"{where} has {len(given)} texts, the limit is {MOST_STOPS}", param=where
        )


class StreamOptions(BaseModel):
    """What a stream reports besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


SamplingBody.model_rebuild()

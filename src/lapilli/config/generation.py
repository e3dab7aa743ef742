"""What a person asks of the sampler: one frozen, validated record; knows no torch and no model."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import isinf
from typing import Any, cast

from lapilli.errors import GenerationError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How answers are drawn, when they stop, and what is reported about them.

    Temperature 0 is greedy: the most probable token at every step. Probability filters (`top_k`,
    `top_p`, `min_p`) then change nothing, because each of them keeps the most probable token.

    Args:
        max_new_tokens: most tokens that one answer may have, at least 1.
        temperature: divides the logits; 0 takes the best token.
        top_p: keep the smallest set of tokens whose probabilities sum to this, in (0, 1].
        top_k: keep this many best tokens, at least 1.
        min_p: keep tokens at least this many times as probable as the best one, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens already seen.
        num_beams: width of the beam search; 1 is no beam search. With a temperature the beams go
            on with continuations that are drawn.
        length_penalty: a beam's score is its log-probability / length ** length_penalty.
        stop: strings that end an answer; they are not part of it.
        stop_token_ids: ids that end an answer, besides the model's own end tokens.
        seed: of the random numbers of this answer; None draws a fresh one.
        logprobs: alternatives reported per token (0: the chosen token only); None: no report.

    Raises:
        GenerationError: a value is out of its range, or two of them contradict each other.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_ranges()
        self._check_stops()

    @classmethod
    def from_options(cls, **options: object) -> "SamplingParams":
        """Parameters from keyword options, a single stop string allowed.

        Raises:
            GenerationError: an option has another name than a field.
        """
        return cls().updated(**options)

    def updated(self, **options: object) -> "SamplingParams":
        """These parameters with some of them changed; the same rules as `from_options`."""
        known = sorted(field.name for field in fields(self))
        unknown = sorted(set(options) - set(known))
        if unknown:
            names = ", ".join(unknown)
            raise GenerationError(
                f"unknown sampling option {names}: choose from {', '.join(known)}"
            )
        if isinstance(options.get("stop"), str):
            options["stop"] = (options["stop"],)
        for name in ("stop", "stop_token_ids"):
            value = options.get(name)
            if isinstance(value, Iterable):
                options[name] = tuple(value)
        # Whether each value has the type of its field is checked in __post_init__.
        return replace(self, **cast("dict[str, Any]", options))

    @property
    def is_greedy(self) -> bool:
        """Whether every step takes the most probable token."""
        return self.temperature == 0 and self.num_beams == 1

    def _check_counts(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens, least=1)
        check_count("num_beams", self.num_beams, least=1)
        if self.top_k is not None:
            check_count("top_k", self.top_k, least=1)
        if self.logprobs is not None:
            check_count("logprobs", self.logprobs, least=0)
        if self.seed is not None:
            check_count("seed", self.seed, least=-(2**63))
            if self.seed >= 2**64:
                raise GenerationError(f"seed must be below 2 ** 64, got {self.seed}")

    def _check_ranges(self) -> None:
        infinity = float("inf")
        check_number("temperature", self.temperature, 0.0, infinity)
        check_number("length_penalty", self.length_penalty, -infinity, infinity)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, infinity, low_open=True)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        if self.min_p is not None:
            check_number("min_p", self.min_p, 0.0, 1.0)

    def _check_stops(self) -> None:
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise GenerationError(f"stop must hold non-empty strings, got {self.stop!r}")
        for token_id in self.stop_token_ids:
            check_count("stop_token_ids", token_id, least=0)


def check_count(name: str, value: object, *, least: int) -> None:
    """Refuse anything but a whole number of at least `least`.

    Raises:
        GenerationError: the value is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise GenerationError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_number(
    name: str, value: object, low: float, high: float, *, low_open: bool = False
) -> None:
    """Refuse anything but a number from `low` to `high`; infinite ends are open.

    Raises:
        GenerationError: the value is no number, not a number (NaN) or out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GenerationError(f"{name} must be a number, got {value!r}")
    low_open = low_open or isinf(low)
    # NaN fails every comparison.
    fits = (low < value if low_open else low <= value) and (
        value < high if isinf(high) else value <= high
    )
    if not fits:
        span = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if isinf(high) else ']'}"
        raise GenerationError(f"{name} must be in {span}, got {value}")

"""Configuration of a low-rank adapter: rank, scale and the modules it sits on."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

from lapilli.errors import ConfigError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter.

    Attributes:
        rank: r, columns of B and rows of A.
        alpha: the update is scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`.
        targets: patterns of full module paths for a fresh adapter, `*` for anything and `{a,b}`
            for a choice: "language_model.*.{q,k,v,o}_proj".
        dropout: probability of dropping an input of A while training.
        use_rslora: rank-stabilised scaling.
        fan_in_fan_out: weights stored as [in, out]; none of our models does.
        rank_pattern: other ranks by the end of a module path (a regular expression).
        alpha_pattern: other alphas, likewise.

    Source: Hu et al. 2021, LoRA section 4.1; Kalajdzievski 2023 (rslora); peft's LoraConfig.

    Raises:
        ConfigError: a rank below one, a dropout outside of [0, 1), or fan_in_fan_out.
    """

    rank: int
    alpha: int | float
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = (self.rank, *self.rank_pattern.values())
        if min(ranks) < 1:
            raise ConfigError(f"a LoRA rank must be at least 1, found {min(ranks)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"LoRA dropout must be in [0, 1), found {self.dropout}")
        if self.fan_in_fan_out:
            raise ConfigError(
                "fan_in_fan_out adapters belong to models with [in, out] weights (GPT-2); "
                "no language model here stores them so"
            )

    def is_target(self, path: str) -> bool:
        """Return whether a fresh adapter sits on the module of this path."""
        return any(
            fnmatchcase(path, choice) for target in self.targets for choice in _choices(target)
        )

    def rank_of(self, path: str) -> int:
        """Return the rank on this module."""
        return _by_ending(self.rank_pattern, path, self.rank)

    def scaling(self, path: str) -> float:
        """Return the factor on the update of this module."""
        rank = self.rank_of(path)
        alpha = _by_ending(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _choices(pattern: str) -> list[str]:
    """Return a pattern without braces for every choice in its braces."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [c for choice in found[1].split(",") for c in _choices(before + choice + after)]


def ends_with(pattern: str, path: str) -> bool:
    """Return whether a path ends with whole names that a regular expression describes.

    Source: peft, get_pattern_key.
    """
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _by_ending(patterns: Mapping[str, Number], path: str, default: Number) -> Number:
    return next((value for pattern, value in patterns.items() if ends_with(pattern, path)), default)

"""Low-rank adapters: their configuration, put beside the linear layers of a model, and merged.

tensors given   where they say, and every one of them must find its layer
tensors None    fresh, on every linear layer that a target pattern matches
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from lapilli.errors import ConfigError, MissingWeightsError, ShapeMismatchError
from lapilli.lora.linear import LoraLayer, LoraLinear, QLoraLinear
from lapilli.nn.linear import FrozenQuantizedLinear
from lapilli.shapes import Tensor

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


Linear = nn.Linear | FrozenQuantizedLinear
_HALVES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class LoraReport:
    """The adapters of a model, in numbers.

    Attributes:
        paths: full paths of the modules, in the order of the model.
        num_parameters: numbers in all A and B.
    """

    paths: tuple[str, ...]
    num_parameters: int


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield every layer with an adapter, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return A and B of every adapter by full name, as `inject` takes them back."""
    return {
        f"{path}.{half}.weight": getattr(module, half).weight
        for path, module in adapters(model)
        for half in ("lora_A", "lora_B")
    }


def report(model: nn.Module) -> LoraReport:
    """Return the adapters that a model has now."""
    tensors = adapter_tensors(model)
    paths = tuple(path for path, _ in adapters(model))
    return LoraReport(paths, sum(tensor.numel() for tensor in tensors.values()))


def inject(
    model: nn.Module,
    config: LoraConfig,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> LoraReport:
    """Put adapters beside linear layers of `model`, which is changed in place.

    `requires_grad` of the other parameters is left as it is.

    Args:
        model: any module without adapters.
        config: rank, scale, dropout; the targets count for a fresh adapter only.
        tensors: `PATH.lora_A.weight` and `PATH.lora_B.weight` by full path in `model`.
        dtype: of the adapters; None: of the weights beside them.

    Raises:
        ConfigError: the model has adapters already, or nothing in it is a target.
        MissingWeightsError: a tensor that belongs to no linear layer, or half of a pair.
        ShapeMismatchError: a tensor that does not fit its layer or the rank.
    """
    if any(True for _ in adapters(model)):
        raise ConfigError("the model has an adapter already: merge() it before another one")
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | FrozenQuantizedLinear)
    }
    paths = _fresh_paths(linears, config) if tensors is None else _told_paths(linears, tensors)
    if tensors is not None:
        for path in paths:
            _check_shapes(path, linears[path], config.rank_of(path), tensors)
    for path in paths:
        layer = _beside(linears[path], config, path).to_dtype(dtype)
        if tensors is not None:
            _fill(layer, path, tensors)
        model.set_submodule(path, layer)
    return report(model)


def _beside(base: Linear, config: LoraConfig, path: str) -> LoraLayer:
    sizes: dict[str, Any] = {
        "rank": config.rank_of(path),
        "scaling": config.scaling(path),
        "dropout": config.dropout,
    }
    if isinstance(base, FrozenQuantizedLinear):
        return QLoraLinear(base, **sizes).train(base.training)
    return LoraLinear(base, **sizes).train(base.training)


def _fresh_paths(linears: Mapping[str, Linear], config: LoraConfig) -> list[str]:
    paths = [path for path in linears if config.is_target(path)]
    if not paths:
        raise ConfigError(
            f"no linear layer matches {', '.join(config.targets) or 'an empty list of targets'}: "
            "patterns are full module paths, for instance 'language_model.*.{q,v}_proj'"
        )
    return paths


def _told_paths(linears: Mapping[str, Linear], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return paths of the tensors in the order of the model, every tensor accounted for."""
    known = {path + half for path in linears for half in _HALVES}
    lost = sorted(name for name in tensors if name not in known)
    if lost:
        raise MissingWeightsError(
            f"{len(lost)} adapter tensors belong to no linear layer of the model, for instance "
            f"{lost[0]}: was the adapter trained on another base, or on layers that are not linear?"
        )
    paths = [path for path in linears if any(path + half in tensors for half in _HALVES)]
    for path in paths:
        for half in _HALVES:
            if path + half not in tensors:
                raise MissingWeightsError(f"the adapter of {path} is incomplete: no {path}{half}")
    if not paths:
        raise MissingWeightsError("the adapter has no lora_A and lora_B tensors")
    return paths


def _check_shapes(path: str, linear: Linear, rank: int, tensors: Mapping[str, Tensor]) -> None:
    expected = ((rank, linear.in_features), (linear.out_features, rank))
    for half, shape in zip(_HALVES, expected, strict=True):
        found = tuple(tensors[path + half].shape)
        if found != shape:
            raise ShapeMismatchError(
                f"{path}{half}: expected {list(shape)} for rank {rank}, found {list(found)}: "
                "was the adapter trained on another base?"
            )


def _fill(layer: LoraLayer, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors in the device and dtype of the layer's weight."""
    for half, part in zip(_HALVES, (layer.lora_A, layer.lora_B), strict=True):
        with torch.no_grad():
            part.weight.copy_(tensors[path + half])


def merge(model: nn.Module) -> LoraReport:
    """Add every adapter of `model` to its weight and drop it; the model is changed in place.

    Sums are taken in float32 and rounded once to the dtype of the weight.

    Source: LLaVA model/builder.py merges at load time (peft merge_and_unload).
    """
    done = report(model)
    for path, layer in list(adapters(model)):
        model.set_submodule(path, layer.merged().train(layer.training))
    return done

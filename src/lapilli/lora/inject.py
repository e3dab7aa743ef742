"""Adapters put beside the linear layers of a model, and merged into their weights.

tensors given   where they say, and every one of them must find its layer
tensors None    fresh, on every linear layer that a target pattern matches
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lapilli.errors import ConfigError, MissingWeightsError, ShapeMismatchError
from lapilli.lora.config import LoraConfig
from lapilli.lora.linear import LoraLayer, LoraLinear, QLoraLinear
from lapilli.nn.linear import FrozenQuantizedLinear
from lapilli.shapes import Tensor

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

"""Low-rank adapters: put beside the linear layers of a plain model, trained there, and merged.

    y = x W^T + b + s * drop(x) A^T B^T

over floats or over a quantized weight, in one step of autograd, which keeps x, once, and x A^T
[.., r] for the backward pass: neither the update nor the dropped x, whose mask takes a byte per
number.

    inject, tensors given   where they say, and every one of them must find its layer
    inject, tensors None    fresh, on every linear layer that a target pattern matches

Knows linear layers; must not know how adapters lie in files.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from lapilli.errors import ConfigError, MissingWeightsError, ShapeMismatchError
from lapilli.nn.linear import FrozenQuantizedLinear, onednn_linear, times_transposed
from lapilli.shapes import Bool, Float, Tensor

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


@dataclass(frozen=True, slots=True)
class Update:
    """The way in which the two small matrices are applied.

    Attributes:
        scaling: factor on the update.
        dropout: probability that an input of A is dropped; the others grow.
        by_onednn: float32 on a CPU goes to oneDNN.
    """

    scaling: float
    dropout: float
    by_onednn: bool


def lora_product(
    x: Float[Tensor, "... K"],
    base: Tensor | FrozenQuantizedLinear,
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "r K"],
    b: Float[Tensor, "out r"],
    *,
    how: Update,
) -> Float[Tensor, "... out"]:
    """Return the layer's output with the update, in the dtype of x or of the autocast around it."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    keep = torch.rand_like(x, dtype=torch.float32) >= how.dropout if how.dropout else None
    found: Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]  # torch's own
        x, base, bias, a.to(x.dtype), b.to(x.dtype), keep, how
    )
    return found


def _dropped(x: Tensor, keep: Bool[Tensor, "..."] | None, dropout: float) -> Tensor:
    return x if keep is None else x * keep * (1 / (1 - dropout))


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:  # noqa: ANN401  torch's protocol
        x, base, bias, a, b, keep, how = given
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            if isinstance(base, FrozenQuantizedLinear):
                out = base.times(rows)
            elif how.by_onednn and x.dtype == base.dtype == torch.float32:
                out = onednn_linear(rows, base, bias)
            else:
                cast = None if bias is None else bias.to(x.dtype)
                out = functional.linear(rows, base.to(x.dtype), cast)
            kept = None if keep is None else keep.view(rows.shape)
            inner = times_transposed(_dropped(rows, kept, how.dropout), a)
            out.addmm_(inner, b.t(), alpha=how.scaling)
        ctx.how, ctx.base = how, base if isinstance(base, FrozenQuantizedLinear) else None
        weight = None if isinstance(base, FrozenQuantizedLinear) else base
        ctx.save_for_backward(x, weight, a, b, keep, inner)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401  torch's protocol
        x, weight, a, b, keep, inner = ctx.saved_tensors
        how: Update = ctx.how
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        kept = None if keep is None else keep.view(rows.shape)
        narrow = times_transposed(gradient, b.t()) * how.scaling  # [M, r]
        of_a = times_transposed(narrow.t(), _dropped(rows, kept, how.dropout).t())
        of_b = times_transposed(gradient.t(), inner.t()) * how.scaling
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.base is not None:
                of_x = ctx.base.grad_input(gradient)
            else:
                of_x = times_transposed(gradient, weight.to(x.dtype).t())
            if kept is None:
                of_x.addmm_(narrow, a)
            else:
                of_x += _dropped(narrow @ a, kept, how.dropout)
            of_x = of_x.view(x.shape)
        if ctx.needs_input_grad[1] and weight is not None:
            of_weight = times_transposed(gradient.t(), rows.t()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=0)
        return of_x, of_weight, of_bias, of_a, of_b, None, None


class LoraLayer(nn.Module, ABC):
    """A linear layer with an adapter: `lora_A.weight` [r, in] and `lora_B.weight` [out, r].

    Source: Hu et al. 2021, LoRA section 4.1: A starts random and B at zero, so that a fresh
    adapter changes nothing. The names are peft's.
    """

    def __init__(
        self,
        base: nn.Linear | FrozenQuantizedLinear,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.Linear(
            base.in_features, rank, bias=False, device=like.device, dtype=like.dtype
        )
        self.lora_B = nn.Linear(
            rank, base.out_features, bias=False, device=like.device, dtype=like.dtype
        )
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scaling = scaling

    @abstractmethod
    def merged(self) -> nn.Linear:
        """Return a plain linear layer with the update in its weight, summed in float32."""

    def update_rows(self) -> Float[Tensor, "out in"]:
        """Return what the adapter adds to the weight, in float32."""
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def _product(
        self,
        x: Tensor,
        base: Tensor | FrozenQuantizedLinear,
        bias: Tensor | None = None,
        *,
        by_onednn: bool = False,
    ) -> Tensor:
        how = Update(self.scaling, self.dropout.p if self.training else 0.0, by_onednn)
        return lora_product(x, base, bias, self.lora_A.weight, self.lora_B.weight, how=how)


class LoraLinear(LoraLayer):
    """An adapter over floats, which takes their parameters over by name: `q_proj.weight` stays.

    Attributes:
        by_onednn: as of the FloatLinear that it was.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout, like=base.weight)
        self.weight = base.weight
        self.bias = base.bias
        self.by_onednn = bool(getattr(base, "by_onednn", False))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... out"]:
        """Return the layer's output with the update."""
        if not torch.compiler.is_compiling():
            return self._product(x, self.weight, self.bias, by_onednn=self.by_onednn)
        out = functional.linear(x, self.weight, self.bias)
        inner = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))
        update: Tensor = self.lora_B(inner)
        return out + self.scaling * update.to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain linear layer with the update in its weight, summed in float32."""
        out_features, in_features = self.weight.shape
        plain = nn.Linear(in_features, out_features, bias=False, device="meta")
        # A new tensor: the old one may be a read-only mapping of a file.
        weight = (self.weight.float() + self.update_rows()).to(self.weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain


class QLoraLinear(LoraLayer):
    """An adapter over a frozen quantized weight, which stays what it is as `base` (QLoRA).

    Source: Dettmers et al. 2023, QLoRA section 3.
    """

    def __init__(
        self, base: FrozenQuantizedLinear, *, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        like = torch.empty(0, device=next(base.buffers()).device)
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout, like=like)
        self.base = base

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... out"]:
        """Return the layer's output with the update, of exactly the stored weight."""
        return self._product(x, self.base)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain linear layer in float32 with the update in its weight."""
        plain = nn.Linear(self.base.in_features, self.base.out_features, bias=False, device="meta")
        weight = self.base.weight_rows(0, self.base.out_features) + self.update_rows()
        plain.weight = nn.Parameter(weight, requires_grad=False)
        bias = self.base.plain_bias
        if bias is not None:
            plain.bias = nn.Parameter(bias, requires_grad=False)
        return plain


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
        layer = _beside(linears[path], config, path)
        if dtype is not None:
            layer.lora_A.to(dtype)
            layer.lora_B.to(dtype)
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

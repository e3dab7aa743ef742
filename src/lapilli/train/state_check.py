"""What a saved state has to be before any of it is used; a silent half would be another run.

Checked are types, names, shapes, dtypes and that every number is finite: a moment of another shape
makes torch's fused optimizers write beyond their memory. Knows tensors and plain values, no files.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lapilli.shapes import Tensor
from lapilli.train.trainer.contract import Plain, TrainingError
from lapilli.train.trainer.state_file import damaged

_ADVICE = "go on with the recipe that began the run, or train into another folder"
_NOT_NEGATIVE = frozenset(
    {"step", "exp_avg_sq", "max_exp_avg_sq"}
)  # counts and averages of squares


def checked_values(
    values: Mapping[str, Any], path: Path
) -> tuple[int, int, tuple[int, float] | None]:
    """Return steps done, samples skipped, and step and loss of the best evaluation, or None.

    Raises:
        TrainingError: one of them cannot be that.
    """
    step, skipped = values.get("step"), values.get("skipped", 0)
    for name, number in (("step", step), ("skipped", skipped)):
        if not is_count(number):
            raise damaged(path, f"{name} is {number!r:.80}, expected a count")
    best = values.get("best")
    if best is None:
        return int(step), skipped, None  # type: ignore[arg-type]  # is_count has looked
    is_pair = isinstance(best, (list, tuple)) and len(best) == 2
    if not (is_pair and is_count(best[0]) and is_number(best[1]) and best[0] <= step):
        raise damaged(path, f"best is {best!r:.80}, expected a step that is done and its loss")
    return int(step), skipped, (best[0], float(best[1]))  # type: ignore[arg-type]


def check_identity(ours: Mapping[str, Plain] | None, theirs: object, path: Path) -> None:
    """Refuse a state of another run; one that does not say is believed.

    Raises:
        TrainingError: every difference is named.
    """
    if theirs is not None and not _is_identity(theirs):
        raise damaged(path, "its identity is no record of plain values")
    if ours is None or not isinstance(theirs, Mapping):
        return
    names = [*theirs, *(name for name in ours if name not in theirs)]
    differ = [name for name in names if ours.get(name) != theirs.get(name)]
    if differ:
        told = "; ".join(
            f"{name}: the state says {_said(theirs, name)}, the recipe {_said(ours, name)}"
            for name in differ
        )
        raise TrainingError(f"{path} is of another run ({told}): {_ADVICE}")


def check_shapes(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Sequence[int]], path: Path
) -> None:
    """Refuse a state of other weights, by name and shape.

    Raises:
        TrainingError: the first difference is named.
    """
    for name in sorted(set(ours) | set(theirs)):
        found = tuple(theirs[name]) if name in theirs else "nothing"
        expected = tuple(ours[name].shape) if name in ours else "nothing (it is frozen or absent)"
        if found != expected:
            raise TrainingError(
                f"{path} has {found} for {name}, and this recipe trains {expected}: {_ADVICE}"
            )


def checked_weights(
    ours: Mapping[str, Tensor], theirs: object, path: Path, what: str
) -> Mapping[str, Tensor]:
    """Return saved weights that fit ours, name by name.

    Args:
        ours: what this recipe trains, in pieces or whole.
        theirs: what the file holds, whole.
        path: of the file.
        what: how the file calls them.

    Raises:
        TrainingError: they do not fit, or are no finite numbers.
    """
    if not isinstance(theirs, Mapping) or not all(isinstance(name, str) for name in theirs):
        raise damaged(path, f"{what} holds no named tensors")
    for name, value in theirs.items():
        if not isinstance(value, Tensor):
            raise damaged(path, f"{what} has a {type(value).__name__} for {name}")
    check_shapes(ours, {name: value.shape for name, value in theirs.items()}, path)
    for name, value in theirs.items():
        check_numbers(value, path, f"{what} of {name}")
    return theirs


def checked_moments(
    optimizer: torch.optim.Optimizer, saved: object, path: Path
) -> dict[int, dict[str, Any]]:
    """Return what the optimizer of the saved run kept of each parameter, by its number.

    Args:
        optimizer: of this run, over the same groups.
        saved: its `state_dict` as the file has it.
        path: of the file.

    Raises:
        TrainingError: other groups, or moments that no parameter of ours can have.
    """
    own, first = [], 0  # torch numbers parameters through all groups
    for group in optimizer.param_groups:
        own.append(list(range(first, first + len(group["params"]))))
        first += len(group["params"])
    groups, state = (
        saved.get(key) if isinstance(saved, Mapping) else None for key in ("param_groups", "state")
    )
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        raise damaged(path, "optimizer holds no groups and moments")
    found = [group.get("params") if isinstance(group, Mapping) else None for group in groups]
    if found != own:
        sizes = [len(params) if isinstance(params, list) else "no" for params in found]
        raise TrainingError(
            f"{path} has other parameter groups (of {sizes} parameters, this recipe has "
            f"{[len(params) for params in own]}): {_ADVICE}"
        )
    owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, kept in state.items():
        if not is_count(number) or number >= len(owners) or not isinstance(kept, Mapping):
            raise damaged(path, f"optimizer has moments for parameter {number!r:.40}")
        for key, value in kept.items():
            _check_moment(value, owners[number], path, f"{key!s:.40} of parameter {number}", key)
    return {number: dict(kept) for number, kept in state.items()}


def _check_moment(value: object, parameter: Tensor, path: Path, what: str, key: object) -> None:
    if value is None and key == "momentum_buffer":  # SGD without momentum
        return
    if not isinstance(key, str) or not isinstance(value, Tensor):
        raise damaged(path, f"{what} is a {type(value).__name__}")
    check_moment_shape(value.shape, parameter, key, path, what)
    check_numbers(value, path, what, not_negative=key in _NOT_NEGATIVE)


def check_moment_shape(
    shape: Sequence[int], parameter: Tensor, key: str, path: Path, what: str
) -> None:
    """Refuse a moment that is not of the shape of its parameter; "step" is one number.

    Raises:
        TrainingError: it is of another.
    """
    expected = () if key == "step" else tuple(parameter.shape)
    if tuple(shape) != expected:
        raise damaged(path, f"{what} has the shape {tuple(shape)}, expected {expected}")


def check_numbers(value: Tensor, path: Path, what: str, *, not_negative: bool = False) -> None:
    """Refuse what is no plain tensor of finite floats.

    Args:
        value: whole, or in pieces of which this process looks at its own.
        path: of the file.
        what: the tensor, for the message.
        not_negative: it holds counts or averages of squares.

    Raises:
        TrainingError: it is not.
    """
    own = value.to_local() if isinstance(value, DTensor) else value
    is_plain = own.layout == torch.strided and not (own.is_meta or own.is_nested)
    if not is_plain or not own.dtype.is_floating_point:
        raise damaged(path, f"{what} is of {own.dtype} {own.layout}, expected plain floats")
    if not bool(torch.isfinite(own).all()):
        raise damaged(path, f"{what} has numbers that are not finite")
    if not_negative and own.numel() and bool((own < 0).any()):
        raise damaged(path, f"{what} has negative numbers")


def is_count(value: object) -> bool:
    """Whether this is a whole number from zero to 2^53, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


def is_number(value: object) -> bool:
    """Whether this is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_identity(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(said, (str, int, float, bool))
        for name, said in value.items()
    )


def _said(identity: Mapping[str, Plain], name: str) -> str:
    return repr(identity[name]) if name in identity else "nothing"

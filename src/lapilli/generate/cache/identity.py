"""What a cached value depends on: the content of a medium, and whether a model is still the same.

Knows tensors and modules; must not know what is cached.
"""

import hashlib
import secrets
import weakref
from collections import OrderedDict
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from lapilli.shapes import Tensor

SCALARS = (bool, int, float, str, bytes)
_NO_SETTINGS = frozenset((dict, OrderedDict, set, type(None)))  # most attributes, sorted out first

Setting = tuple[str, type, tuple[tuple[str, Any], ...]]
Held = tuple[str, str, "weakref.ref[Tensor]", tuple[int, int]]
State = tuple[list[Setting], list[Held]]


def content_digest(item: Any) -> bytes:  # noqa: ANN401 - every modality has its own items
    """SHA-256 of what a modality prepared, or of features: equal digests mean equal numbers.

    Records, tuples and lists of tensors, numbers and texts are read part by part. Anything else
    gets a digest that never comes again, so that it is never taken for something known.
    """
    digest = hashlib.sha256()
    _add(digest, item)
    return digest.digest()


def _add(digest: Any, item: Any) -> None:  # noqa: ANN401 - hashlib's type has no public name
    if isinstance(item, Tensor):
        digest.update(f"tensor {item.dtype} {list(item.shape)} ".encode())
        plain = item.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    elif is_dataclass(item) and not isinstance(item, type):
        digest.update(f"{type(item).__module__}.{type(item).__qualname__}(".encode())
        for field in fields(item):
            digest.update(f"{field.name}=".encode())
            _add(digest, getattr(item, field.name))
        digest.update(b")")
    elif isinstance(item, tuple | list):
        digest.update(f"{type(item).__qualname__} {len(item)} ".encode())
        for part in item:
            _add(digest, part)
    elif item is None or isinstance(item, SCALARS):
        digest.update(f"{type(item).__name__} {item!r} ".encode())
    else:
        digest.update(secrets.token_bytes(32))


def media_digest(modality: str, item: Any) -> bytes:  # noqa: ANN401
    """The digest of an item that this modality looks at; two modalities see two things."""
    return hashlib.sha256(modality.encode() + b"\0" + content_digest(item)).digest()


class WeightWatch:
    """Notices that a model is not the one it was: other tensors, changed tensors, other settings.

    Every difference begins a new epoch, and no epoch comes again: after an adapter was switched
    off and on, everything is computed anew. Compared are, per module, its class and its plain
    attributes (a LoRA's scaling, training mode), per parameter and buffer the tensor itself, its
    memory and its version, which every in-place operation counts up.

    Note: a module that counts something in a plain attribute looks changed every time, and nothing
        is found again; keep counts in a record of their own.
    Note: torch does not count operations on `tensor.data`, nor on tensors made under
    `torch.inference_mode()`; whoever changes weights in such a way calls `renew`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._epoch = 0
        self._state = self._current_state()
        self._glances = [_Glance(module) for module in model.modules()]

    @property
    def epoch(self) -> int:
        """A number that is the same as before exactly while nothing has changed."""
        # Asked before every token: a glance that sees too much is followed by a look that does not.
        if all(map(_Glance.is_same, self._glances)):
            return self._epoch
        state = self._current_state()
        if not _same(state, self._state):
            self._epoch += 1
        self._state = state
        self._glances = [_Glance(module) for module in self._model.modules()]
        return self._epoch

    def renew(self) -> None:
        """Begin a new epoch."""
        self._epoch += 1

    def _current_state(self) -> State:
        """One walk over all modules; tensors are held weakly, so that replaced ones can go."""
        settings: list[Setting] = []
        tensors: list[Held] = []
        for path, module in self._model.named_modules():
            inside = vars(module)
            plain = tuple(
                item
                for item in inside.items()
                if type(item[1]) not in _NO_SETTINGS and isinstance(item[1], SCALARS)
            )
            settings.append((path, type(module), plain))
            for held in (inside["_parameters"], inside["_buffers"]):
                for name, tensor in held.items():
                    if tensor is not None:
                        state = (tensor.data_ptr(), _version(tensor))
                        tensors.append((path, name, weakref.ref(tensor), state))
        return settings, tensors


class _Glance:
    """One module's attributes, children and tensors, compared by identity in microseconds.

    Holds nothing alive: weights that somebody replaces go at once.
    """

    __slots__ = ("_attributes", "_children", "_count", "_kind", "_module", "_tensors", "_types")

    def __init__(self, module: nn.Module) -> None:
        inside = vars(module)
        self._module, self._kind, self._count = weakref.ref(module), type(module), len(inside)
        self._attributes = [
            (name, value)
            for name, value in inside.items()
            if value is None or isinstance(value, SCALARS)
        ]
        self._types = [
            (name, type(value))
            for name, value in inside.items()
            if value is not None and not isinstance(value, (*SCALARS, dict, set))
        ]
        self._children = [
            None if child is None else weakref.ref(child) for child in inside["_modules"].values()
        ]
        self._tensors = [_held(tensor) for tensor in _tensors_of(inside)]

    def is_same(self) -> bool:
        """False for every change that counts, and sometimes where there is none."""
        module = self._module()
        if module is None or type(module) is not self._kind:
            return False
        inside = module.__dict__
        if len(inside) != self._count:
            return False
        for name, value in self._attributes:
            if inside.get(name) is not value:
                return False
        for name, kind in self._types:
            if type(inside.get(name)) is not kind:
                return False
        children = inside["_modules"].values()
        if len(children) != len(self._children):
            return False
        for child, held in zip(children, self._children, strict=True):
            if child is not (None if held is None else held()):
                return False
        return self._has_same_tensors(_tensors_of(inside))

    def _has_same_tensors(self, tensors: list[Tensor | None]) -> bool:
        if len(tensors) != len(self._tensors):
            return False
        for tensor, held in zip(tensors, self._tensors, strict=True):
            if tensor is None or held is None:
                if (tensor is None) != (held is None):
                    return False
            elif (
                tensor is not held[0]()
                or tensor.data_ptr() != held[1]
                or _version(tensor) != held[2]
            ):
                return False
        return True


def _tensors_of(inside: dict[str, Any]) -> list[Tensor | None]:
    return [*inside["_parameters"].values(), *inside["_buffers"].values()]


def _held(tensor: Tensor | None) -> tuple["weakref.ref[Tensor]", int, int] | None:
    return None if tensor is None else (weakref.ref(tensor), tensor.data_ptr(), _version(tensor))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same(new: State, old: State) -> bool:
    """Whether both name the same living tensors in the same state, and the same settings."""
    if new[0] != old[0] or len(new[1]) != len(old[1]):
        return False
    return all(
        a[:2] == b[:2] and a[2]() is b[2]() and a[3] == b[3]
        for a, b in zip(new[1], old[1], strict=True)
    )

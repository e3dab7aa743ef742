"""Feature cache: tower and projector run once per picture, for all requests.

The key of a cached value is the content of its medium (content_digest) and the version of the
weights (WeightWatch). Knows tensors and modules; must not know what a picture is.
"""

import hashlib
import secrets
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import nn

from lapilli.shapes import Float, Tensor

Key = tuple[object, ...]
SCALARS = (bool, int, float, str, bytes)
_NO_SETTINGS = frozenset((dict, OrderedDict, set, type(None)))  # most attributes, sorted out first

State = tuple[list[Any], list["weakref.ref[Tensor]"]]
"""Facts of all modules and tensors one after the other, and the tensors."""


@dataclass(slots=True)
class FeatureStats:
    """Counts since the cache was made."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class FeatureCache:
    """Least recently used cache of features, for any number of threads.

    Args:
        max_bytes: of all tensors together; 0 caches nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.stats = FeatureStats()
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of all cached features."""
        return self._bytes

    def get(self, key: Key) -> Float[Tensor, "n D"] | None:
        """Return the features of this key and mark them as used, or return None."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self.stats.misses += 1
                return None
            self._kept.move_to_end(key)
            self.stats.hits += 1
            return found

    def put(self, key: Key, features: Float[Tensor, "n D"]) -> None:
        """Cache features; the least recently used ones are evicted to make room."""
        if features.nbytes > self.max_bytes:
            return
        with self._lock:
            old = self._kept.pop(key, None)
            self._bytes += features.nbytes - (0 if old is None else old.nbytes)
            self._kept[key] = features
            while self._bytes > self.max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.nbytes
                self.stats.evictions += 1

    def recount(self) -> None:
        """Count the bytes again after an interrupted change."""
        with self._lock:
            self._bytes = sum(features.nbytes for features in self._kept.values())

    def clear(self) -> None:
        """Discard everything."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0


def content_digest(item: Any) -> bytes:  # noqa: ANN401 - every modality has its own items
    """Return the SHA-256 of a prepared item or of features: equal digests mean equal numbers.

    Dataclasses, tuples and lists of tensors, numbers and texts are read part by part. Anything else
    gets a random digest, so that it is never found in a cache.
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
    """Return the digest of an item and its modality."""
    return hashlib.sha256(modality.encode() + b"\0" + content_digest(item)).digest()


class WeightWatch:
    """Version counter of a model's weights and settings, which grows with every change.

    No version comes again: after an adapter was switched off and on, everything is computed anew.
    Compared are the class, the plain attributes (a LoRA's scaling, training mode), the hooks and a
    forward of its own of every module, and of every parameter and buffer the tensor, its memory and
    its version counter.

    Note: a module that counts in a plain attribute looks changed every time, so nothing cached is
        found; keep counts in an object of their own.
    Note: torch does not count operations on `tensor.data`, nor on tensors made under
        `torch.inference_mode()`; call `reset` after those.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._version = 0
        self._token = object()
        self._state = self._current_state()
        self._glance: _Glance | None = None

    @property
    def token(self) -> object:
        """An object that is the same exactly while nothing has changed."""
        return self._token

    @property
    def version(self) -> int:
        """The version, the same number exactly while nothing has changed."""
        # Asked before every token: first a quick comparison, which may report changes in vain.
        if self._glance is not None and self._glance.is_same():
            return self._version
        state = self._current_state()
        if not _same(state, self._state):
            self.reset()
        self._state = state
        self._glance = _Glance(self._model)
        return self._version

    def release(self) -> None:
        """Keep weak references only, so that replaced weights are freed at once."""
        self._glance = None

    def reset(self) -> None:
        """Begin a new version."""
        # The token first: an interrupt between the two must not pair the old one with a new number.
        self._token = object()
        self._version += 1

    def _current_state(self) -> State:
        """Return the state of all modules, with weak references to the tensors.

        Note: two flat lists, since a tuple for each of thousands of facts would make Python look
            for garbage among all objects of the program every few requests, for a tenth of a
            second.
        """
        facts: list[Any] = []
        tensors: list[weakref.ref[Tensor]] = []
        for path, module in self._model.named_modules():
            inside = vars(module)
            facts += (path, type(module), id(inside.get("forward")))
            for name, value in inside.items():
                if type(value) not in _NO_SETTINGS and isinstance(value, SCALARS):
                    facts += (name, value)
            for kind in _HOOKS:
                facts += (kind, *inside[kind])
            for held in (inside["_parameters"], inside["_buffers"]):
                for name, tensor in held.items():
                    if tensor is not None:
                        facts += (name, tensor.data_ptr(), _version(tensor))
                        tensors.append(weakref.ref(tensor))
        return facts, tensors


class _Glance:
    """State of all modules of a model, compared quickly by loops that run in C.

    It keeps the tensors alive, so it is held only while requests are running.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._insides = [vars(module) for module in self._modules]
        self._plain = _columns(self._insides, _is_plain)
        self._things = _columns(self._insides, lambda value: not isinstance(value, _UNSEEN))
        groups = [inside[kind] for kind in _GROUPS for inside in self._insides]
        self._groups = [group for group in groups if group]
        self._entries = _columns(self._groups, lambda _: True)
        self._values = list(map(getitem, *self._entries))  # tensors, or None
        self._held = [tensor for tensor in self._values if tensor is not None]
        self._counted = [tensor for tensor in self._held if not tensor.is_inference()]
        self._children = [inside["_modules"] for inside in self._insides]
        self._empty = [group for group in groups if not group]
        self._hooks = [inside[kind] for kind in _HOOKS for inside in self._insides]
        self._facts = self._look()

    def is_same(self) -> bool:
        """Return False after every change that counts, and sometimes after none."""
        try:
            if not all(map(is_, map(getitem, *self._entries), self._values)):
                return False
            return self._facts == self._look()
        except KeyError:
            return False

    def _look(self) -> tuple[list[Any], ...]:
        """Return the values that == compares; comparing tensors would give a tensor."""
        return (
            list(map(type, self._modules)),
            list(map(len, self._insides)),
            list(map(len, self._groups)),
            list(map(len, self._empty)),
            list(map(tuple, filter(None, self._hooks))),  # a number for each, which none has again
            list(map(len, self._children)),
            list(chain.from_iterable(map(dict.values, self._children))),
            list(map(getitem, *self._plain)),
            list(map(type, map(getitem, *self._things))),
            list(map(Tensor.data_ptr, self._held)),
            list(map(_VERSION, self._counted)),
        )


_GROUPS = ("_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_UNSEEN = (type(None), dict, set, *SCALARS)  # compared otherwise, or no settings
_VERSION = attrgetter("_version")


def _is_plain(value: Any) -> bool:  # noqa: ANN401 - an attribute of a module
    return value is None or isinstance(value, SCALARS)


def _columns(
    insides: list[dict[str, Any]], chosen: Callable[[Any], bool]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return dictionaries and names of the chosen values, for map(getitem, ...)."""
    owners: list[dict[str, Any]] = []
    names: list[str] = []
    for inside in insides:
        for name, value in inside.items():
            if chosen(value):
                owners.append(inside)
                names.append(name)
    return owners, names


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same(new: State, old: State) -> bool:
    """Return whether both name the same living tensors in the same state, and the same settings."""
    if new[0] != old[0] or len(new[1]) != len(old[1]):
        return False
    return all(a() is b() for a, b in zip(new[1], old[1], strict=True))

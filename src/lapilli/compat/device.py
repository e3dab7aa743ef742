"""Stand-in for a GPU that is not there: "cuda" means the CPU, told once on stderr.

The original's programs write it everywhere: `.cuda()`, `.to("cuda")`, `.to(device="cuda")`,
`torch.zeros(1, device="cuda")`. Only calls that would fail are changed, and only for such a device.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

MAKERS = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "eye", "full", "full_like"),
    *("linspace", "logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like"),
    *("randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
)
METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
IDLE = ("set_device", "synchronize", "reset_peak_memory_stats", "ipc_collect")


def stand_in() -> None:
    """Let the CPU stand in for a GPU that is not there; a second call changes nothing."""
    if torch.cuda.is_available() or hasattr(torch.Tensor.to, "__wrapped__"):
        return
    with torch.device("cpu"):  # torch remembers which functions make tensors: its own, not ours
        torch.zeros(1)
    for kind in (torch.Tensor, torch.nn.Module):
        _replace(kind, "to")
        setattr(kind, "cuda", _idle(lambda self, *_, **__: self))  # noqa: B010  mypy
    for name in METHODS:
        _replace(torch.Tensor, name)
    for name in (*MAKERS, "set_default_device"):
        _replace(torch, name)
    _replace(torch, "load", keyword="map_location")
    for name in IDLE:
        setattr(torch.cuda, name, _idle(lambda *_, **__: None))
    # Torch's own functions are replaced, which no type allows.
    torch.Tensor.pin_memory = _idle(lambda self, *_, **__: self)  # type: ignore[method-assign]
    torch.cuda.current_device = _idle(lambda: 0)
    torch.cuda.device = _idle(lambda *_: contextlib.nullcontext())  # type: ignore[assignment,misc]


def is_absent(device: object) -> bool:
    """Return whether this names a GPU: "cuda", "cuda:1", a torch.device of it, or a number."""
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def present(device_map: Any) -> Any:  # noqa: ANN401
    """Return a device, or the devices of modules, with the CPU for every GPU that is absent."""
    if torch.cuda.is_available():
        return device_map
    if isinstance(device_map, Mapping):
        return {name: present(device) for name, device in device_map.items()}
    if not is_absent(device_map):
        return device_map
    _tell()
    return "cpu"


@functools.cache
def _tell() -> None:
    sys.stderr.write('lapilli.compat: there is no GPU here: "cuda" means the CPU\n')


def _replace(owner: Any, name: str, keyword: str = "device") -> None:  # noqa: ANN401
    """Put a function in place of `owner.name` that never sees a device which is not there."""
    original: Callable[..., Any] = getattr(owner, name)
    # A device may come first where nothing else does: after self, or to set_default_device.
    place = {"to": 1, "set_default_device": 0, "load": 1}.get(name)

    @functools.wraps(original)
    def replaced(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        if is_absent(options.get(keyword)):
            _tell()
            options[keyword] = "cpu"
        if place is not None and len(args) > place and is_absent(args[place]):
            _tell()
            args = (*args[:place], "cpu", *args[place + 1 :])
        return original(*args, **options)

    setattr(owner, name, replaced)


def _idle(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of its own for every name: torch.compile tells them apart by identity."""

    def idle(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        _tell()
        return answer(*args, **options)

    return idle

"""What of a case was equal to the original; collects, so that one run names every difference."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lapilli.errors import LapilliError


class SkipCase(Exception):  # noqa: N818  not an error: something that the case needs is not here
    """The case cannot run here, and why."""


class NotTheSame(Exception):  # noqa: N818  no result at all
    """The case asks for something that this path does not do; it is neither passed nor skipped."""


@dataclass
class Check:
    """The differences of one case.

    `differs` is the number of a quirk of the original (conformance/README.md) that our own API does
    not share here; what is checked then is that our own API does the right thing.
    """

    failures: list[str] = field(default_factory=list)
    compared: int = 0
    worst: float = 0.0
    worst_of_tolerance: float = 0.0
    worst_name: str = ""
    differs: str = ""

    def that(self, ok: bool, message: str) -> bool:
        """Count one comparison; `message` says what was expected and found."""
        self.compared += 1
        if not ok:
            self.failures.append(message)
        return ok

    def equal(self, what: str, found: Any, expected: Any) -> bool:
        """Found must be equal to expected (arrays: shape and every value)."""
        found, expected = plain(found), plain(expected)
        return self.that(found == expected, f"{what}: {first_difference(found, expected)}")

    def close(
        self, what: str, found: Any, expected: Any, *, atol: float, rtol: float = 0.0
    ) -> bool:
        """Every value must be within atol + rtol * |expected|."""
        a, b = as_array(found), as_array(expected)
        if a.shape != b.shape:
            return self.that(False, f"{what}: expected shape {b.shape}, found {a.shape}")
        if not a.size:
            return self.that(True, "")
        both_special = ~np.isfinite(a) & ~np.isfinite(b)
        same_special = both_special & ((a == b) | (np.isnan(a) & np.isnan(b)))
        with np.errstate(invalid="ignore"):  # inf - inf
            difference = np.where(same_special, 0.0, np.abs(a - b))
        difference = np.where(np.isnan(difference), np.inf, difference)
        allowed = atol + rtol * np.abs(np.where(np.isfinite(b), b, 0.0))
        share = float((difference / allowed).max())
        self.note(what, float(difference.max()), share)
        where = np.unravel_index(int((difference / allowed).argmax()), a.shape)
        return self.that(
            share <= 1.0,
            f"{what}: expected {b[where]:.8g}, found {a[where]:.8g} at {tuple(map(int, where))}, "
            f"{share:.3g} times the tolerance",
        )

    def mostly_close(
        self, what: str, found: Any, expected: Any, *, atol: float, outliers: float
    ) -> bool:
        """All but a share of `outliers` of the values must be within atol."""
        a, b = as_array(found), as_array(expected)
        if a.shape != b.shape:
            return self.that(False, f"{what}: expected shape {b.shape}, found {a.shape}")
        difference = np.abs(a - b)
        share = float((difference > atol).mean()) if difference.size else 0.0
        if difference.size:
            typical = float(np.quantile(difference, 1 - outliers))
            self.note(what, typical, typical / atol)
        return self.that(
            share <= outliers, f"{what}: {share:.2%} of the values differ by more than {atol}"
        )

    def note(self, what: str, difference: float, share: float) -> None:
        """Remember the difference that comes nearest to its tolerance."""
        if share >= self.worst_of_tolerance:
            self.worst, self.worst_of_tolerance, self.worst_name = difference, share, what

    def raises(self, expected: str, call: Callable[[], Any]) -> bool:
        """The original raised `expected`: ours must raise too, on purpose or the same type."""
        try:
            result = call()
        except LapilliError:
            return self.that(True, "")
        except Exception as error:  # noqa: BLE001  any other type is reported, not passed over
            ours = type(error).__name__
            names = {base.__name__ for base in type(error).__mro__}
            return self.that(expected in names, f"expected {expected}, raised {ours}: {error}")
        return self.that(False, f"expected {expected}, found an answer: {str(result)[:200]}")


def as_array(value: Any) -> np.ndarray:
    """Numbers of any container, in float64."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    if isinstance(value, str):
        value = float(value)
    if isinstance(value, list):
        value = [as_array(item) for item in value]
    return np.asarray(value, dtype=np.float64)


def plain(value: Any) -> Any:
    """The same without tensors, arrays and tuples, so that == compares everything."""
    if isinstance(value, torch.Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def first_difference(found: Any, expected: Any, where: str = "") -> str:
    """Where two plain values part, for a message of one line."""
    if isinstance(found, list) and isinstance(expected, list):
        for i, (a, b) in enumerate(zip(found, expected, strict=False)):
            if a != b:
                return first_difference(a, b, f"{where}[{i}]")
        return f"{where} expected length {len(expected)}, found {len(found)}"
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in expected:
            if key not in found:
                return f"{where}.{key} is missing"
            if found[key] != expected[key]:
                return first_difference(found[key], expected[key], f"{where}.{key}")
        return f"{where} has too many keys: {sorted(set(found) - set(expected))[:5]}"
    return f"{where} expected {_short(expected)}, found {_short(found)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:80]} ... {text[-60:]}"

"""Comparisons that need a release: of the library whose numbers they are, or whose names."""

from importlib.metadata import version

import pytest


def needs(package: str, release: str, why: str) -> pytest.MarkDecorator:
    """Skip a test with an older release of a package than this one, for a reason."""
    found = version(package)
    is_old = _numbers(found) < _numbers(release)
    return pytest.mark.skipif(is_old, reason=f"{package} {found}, before {release}, {why}")


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:3] if part.isdecimal())

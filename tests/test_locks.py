"""The locks name every package that pyproject.toml asks for, in a version that it allows."""

import re
import tomllib
from functools import cache

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import REPOSITORY

_FILE = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = _FILE["project"]
BUILD_REQUIRES = _FILE["build-system"]["requires"]
LOCKS = ("demo", "test", "oldest")


@cache
def lock(name: str) -> dict[str, Version]:
    """The version of every package in locks/NAME.txt, by its canonical name."""
    pins = {}
    for line in (REPOSITORY / "locks" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text:
            package, equals, version = text.partition("==")
            assert equals, f"locks/{name}.txt does not say one version: {line}"
            assert canonicalize_name(package) not in pins, f"locks/{name}.txt says {package} twice"
            pins[canonicalize_name(package)] = Version(version)
    return pins


def asked(*extras: str) -> list[Requirement]:
    """What the package asks for with these extras, each extra that names others opened."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    queue, seen = list(extras), set(extras)
    while queue:
        for text in PROJECT["optional-dependencies"][queue.pop()]:
            requirement = Requirement(text)
            if requirement.name != PROJECT["name"]:
                found.append(requirement)
                continue
            queue += requirement.extras - seen
            seen |= requirement.extras
    return found


def built_with() -> list[Requirement]:
    lines = (REPOSITORY / "locks" / "build.in").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def outside(requirements: list[Requirement], pins: dict[str, Version]) -> list[str]:
    """Say what is missing in the pins or not in the range that is asked for."""
    faults = []
    for requirement in requirements:
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            faults.append(f"{requirement}: missing")
        elif not requirement.specifier.contains(pin):
            faults.append(f"{requirement}: {pin}")
    return faults


@pytest.mark.parametrize(
    ("name", "extras"), [("demo", ()), ("test", ("dev",)), ("oldest", ("dev",))]
)
def test_lock_fits_the_project(name, extras):
    assert outside(asked(*extras), lock(name)) == [], "run make lock"


@pytest.mark.parametrize("name", ["demo", "test"])
def test_lock_holds_what_the_package_is_built_with(name):
    assert outside(built_with(), lock(name)) == [], "run make lock"
    assert {r.name for r in map(Requirement, BUILD_REQUIRES)} <= {r.name for r in built_with()}


def test_extras_are_all_tested():
    """Every extra is in the lock that the tests are run with."""
    everything = {str(r) for extra in PROJECT["optional-dependencies"] for r in asked(extra)}
    assert everything == {str(r) for r in asked("dev")}


def test_demo_and_tests_run_the_same_versions():
    assert lock("demo").items() <= lock("test").items()


def test_oldest_is_the_lower_bound():
    """What make test-oldest installs is what pyproject.toml says works, torch apart."""
    pins = lock("oldest")
    for requirement in asked("dev"):
        if requirement.name != "torch":
            bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
            assert len(bounds) == 1, f"{requirement} has no lower bound"
            assert pins[canonicalize_name(requirement.name)] == Version(bounds[0]), requirement


def test_locks_follow_the_constraints():
    """No lock takes another torch than constraints.txt, and none names a build for one machine."""
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    held = [Requirement(line) for line in re.findall(r"^\w.*$", text, re.MULTILINE)]
    for name in LOCKS:
        assert outside(held, lock(name)) == []
        assert [p for p in lock(name) if re.match(r"nvidia|cuda|triton|lapilli", p)] == []
        assert [str(v) for v in lock(name).values() if v.local] == []

"""No file, however damaged, ends in anything but an answer or one error of ours."""

import os
import sys

import pytest

from tests.fuzz import run
from tests.fuzz.table import KINDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the honest folders lie."""
    return tmp_path_factory.mktemp("honest")


def told(faults):
    return "\n".join(map(str, faults))


@pytest.mark.slow
def test_some_cases_of_the_kinds_that_are_quickly_made(folder):
    quick = [kind.name for kind in KINDS if kind.name.startswith(("original", "packed"))]
    faults = run.run(quick, cases=150, seed=1, folder=folder)
    assert not faults, told(faults)


# `make stress` runs 20,000, which take about ten minutes.
CASES = int(os.environ.get("LAPILLI_FUZZ_CASES", "200"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_cases_of_every_kind(folder):
    faults = run.run([kind.name for kind in KINDS], cases=CASES, seed=2, folder=folder)
    assert not faults, told(faults)

"""What every test shares: shape checks on, one thread, and where the golden numbers lie."""

import gc
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from jaxtyping import install_import_hook

import tests.checked  # noqa: F401  named below

# Collecting makes half a million objects that live to the end: nothing is gained by searching them
# for garbage, neither now nor in a test (see pytest_collection_finish).
gc.disable()

# Checks every annotated shape at run time; only the tests pay for it.
install_import_hook(["lapilli", "pebble"], "tests.checked.when_called")

# What a person's terminal and shell say must not decide a test: programs that the tests start see
# a terminal with colours of the usual width.
for _name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES"):
    os.environ.pop(_name, None)
os.environ["TERM"] = "xterm-256color"

# A busy machine is no failure. `make quick` tries fewer examples where a test names no number.
hypothesis.settings.register_profile("lapilli", deadline=None)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
hypothesis.settings.load_profile("lapilli")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collectstart() -> None:
    """Import torch in the processes that run tests, and not in the one that hands them out."""
    import torch

    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def conformance() -> Path:
    """The golden numbers of the original; LAPILLI_CONFORMANCE names another directory."""
    named = os.environ.get("LAPILLI_CONFORMANCE")
    places = [Path(named)] if named else []
    places += [
        REPOSITORY.parent / "shared" / "conformance",
        REPOSITORY / "tests" / "golden" / "conformance",
    ]
    for place in places:
        if (place / "cases").is_dir():
            return place
    pytest.skip(f"no golden numbers in {', '.join(map(str, places))}")


@pytest.fixture(scope="session")
def maker(conformance: Path) -> ModuleType:
    """make_checkpoint.py of the golden numbers, which writes their checkpoints."""
    spec = importlib.util.spec_from_file_location("maker", conformance / "make_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

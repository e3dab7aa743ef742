"""Each instruction set that this machine has, in turn."""

from collections.abc import Iterator

import pytest
import torch

from lapilli.errors import ConfigError
from lapilli.kernels.library import Library, open_library

ALL = ("portable", "avx2", "avxvnni", "avx512vnni", "amxint8", "neon", "neondot")


@pytest.fixture(params=ALL)
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The compiled library with one instruction set; the best one again afterwards."""
    try:
        found = open_library(request.param)
    except ConfigError:
        pytest.skip(f"no {request.param} here")
    if found is None:
        pytest.skip("nothing was compiled")
    yield found
    open_library()


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, then two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)

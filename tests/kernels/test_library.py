"""One OpenMP in the process, a switch that works, and nothing that breaks where it is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lapilli.errors import ConfigError
from lapilli.kernels import library
from lapilli.kernels.library import native, open_library

ANSWER = """
import torch, lapilli
from lapilli.kernels.library import native
from lapilli.quant import QuantConfig
from lapilli.quant.quantize import round4
from lapilli.kernels.linear import PackedLinear
torch.manual_seed(0)
layer = PackedLinear(round4(torch.randn(4096, 512), None, QuantConfig()))
print(float(layer(torch.randn(4, 512)).norm()))
print(native() and native().isa)
maps = open("/proc/self/maps").read().splitlines()
print(len({line.split()[-1] for line in maps if "gomp" in line or "iomp" in line}))
"""


def run(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ANSWER],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is loaded")
def test_one_openmp_and_the_same_numbers_without_the_library() -> None:
    with_library = run(LAPILLI_KERNELS="", OMP_NUM_THREADS="2")
    without = run(LAPILLI_KERNELS="0")
    assert with_library[2] == "1"
    assert without[1] == "None"
    assert float(with_library[0]) == pytest.approx(float(without[0]), rel=1e-5)


def test_an_unknown_instruction_set_is_refused() -> None:
    if native() is None:
        pytest.skip("nothing was compiled")
    with pytest.raises(ConfigError, match="LAPILLI_KERNELS=altivec: this CPU or this build"):
        open_library("altivec")


def test_zero_switches_off() -> None:
    assert open_library("0") is None


def test_a_library_of_other_sources_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI", -1)
    assert open_library() is None


def test_no_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_NAMES", ("nothing.so",))
    assert open_library("avx2") is None

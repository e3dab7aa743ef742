"""The compiled kernels checked in C++, without Python: here, and on an emulated Arm CPU.

    driver.cpp        opens a compiled library and compares every operation with float64
    aarch64.cmake     cross-compiles the library for 64-bit Arm

The other tests of this room say more (any shape, through torch); these run where no Python of the
other CPU is at hand.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from lapilli.kernels.library import native
from tests.kernels.conftest import ALL

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CROSS = "aarch64-linux-gnu-g++"
NOT_HERE = 77  # the driver's answer: this library or this CPU has no such instruction set


def build_driver(compiler: str, sources: Path, folder: Path) -> Path:
    """The driver, compiled without warnings."""
    driver = folder / "driver"
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread")
    files = sorted(HERE.glob("*.cpp"))
    subprocess.run(
        [compiler, *flags, f"-I{sources}", *files, "-o", driver, "-ldl"], check=True, timeout=300
    )
    return driver


def emulator() -> str | None:
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.fixture(scope="module")
def sources(repository: Path) -> Path:
    return repository / "src" / "lapilli" / "kernels" / "native"


@pytest.fixture(scope="module")
def driver(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return build_driver(compiler, sources, tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("name", ALL)
def test_every_operation_equals_float64(driver: Path, name: str) -> None:
    found = native()
    if found is None:
        pytest.skip("nothing was compiled")
    command = [driver, found.functions._name, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == NOT_HERE:
        pytest.skip(f"no {name} here")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def arm(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The driver and the library for 64-bit Arm."""
    for tool in (CROSS, "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    if emulator() is None:
        pytest.skip("no qemu-aarch64")
    folder = tmp_path_factory.mktemp("arm")
    build = folder / "build"
    chosen = (f"-DCMAKE_TOOLCHAIN_FILE={HERE / 'aarch64.cmake'}", "-DCMAKE_CXX_FLAGS=-Werror")
    subprocess.run(["cmake", "-S", sources, "-B", build, *chosen], check=True, timeout=60)
    subprocess.run(["cmake", "--build", build, "--parallel", "2"], check=True, timeout=900)
    return build_driver(CROSS, sources, folder), build / "liblapilli_kernels.so"


def emulate(arm: tuple[Path, Path], cpu: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path("/usr") / CROSS.removesuffix("-g++")
    command = [str(emulator()), "-cpu", cpu, "-L", root, *arm, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    ("cpu", "name"),
    [("cortex-a53", "neon"), ("max", "neondot"), ("max", "neon"), ("max", "portable")],
)
def test_every_operation_equals_float64_on_arm(arm: tuple[Path, Path], cpu: str, name: str) -> None:
    done = emulate(arm, cpu, name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("cpu", "name"), [("cortex-a72", "neon"), ("cortex-a76", "neondot")])
def test_an_arm_cpu_gets_the_best_that_it_has(arm: tuple[Path, Path], cpu: str, name: str) -> None:
    assert emulate(arm, cpu).stdout.split() == [name]


def test_an_arm_cpu_without_dot_products_is_not_given_them(arm: tuple[Path, Path]) -> None:
    assert emulate(arm, "cortex-a72", "neondot").returncode == NOT_HERE

"""Where there is no GPU, "cuda" means the CPU, in every spelling that programs have."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lapilli.compat import MAKERS, is_absent, present, stand_in

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

SPELLINGS: dict[str, Callable[[], Any]] = {
    "tensor.cuda": lambda: torch.zeros(1).cuda(),
    "tensor.to": lambda: torch.zeros(1).to("cuda"),
    "tensor.to device object": lambda: torch.zeros(1).to(torch.device("cuda:1")),
    "tensor.to number": lambda: torch.zeros(1).to(0),
    "tensor.to with all": lambda: torch.zeros(1).to(
        device="cuda", dtype=torch.float16, non_blocking=True
    ),
    "tensor.new_zeros": lambda: torch.zeros(1).new_zeros(2, device="cuda"),
    "zeros": lambda: torch.zeros(1, device="cuda"),
    "arange": lambda: torch.arange(3, device=torch.device("cuda")),
    "tensor": lambda: torch.tensor([1], device="cuda:0"),
    "module.to": lambda: nn.Linear(1, 1).to("cuda").weight,
    "module.half.to": lambda: nn.Linear(1, 1).half().to(device="cuda").weight,
    "module.cuda": lambda: nn.Linear(1, 1).cuda().weight,
    "tensor.pin_memory": lambda: torch.zeros(1).pin_memory(),
    "current device": lambda: torch.zeros(1).to(torch.cuda.current_device()),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_cuda_is_the_cpu(name: str) -> None:
    assert SPELLINGS[name]().device.type == "cpu"


def test_what_else_was_asked_for_is_done() -> None:
    found = torch.zeros(1).to(device="cuda", dtype=torch.float16, non_blocking=True)
    assert found.dtype == torch.float16
    assert torch.zeros(1).to(torch.float16).dtype == torch.float16
    assert torch.zeros(1).to("meta").device.type == "meta"
    torch.cuda.synchronize()


def test_a_device_may_be_made_the_current_one() -> None:
    with torch.cuda.device(0):
        assert torch.zeros(1, device="cuda").device.type == "cpu"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cuda:0", "cpu"),
        (1, "cpu"),
        ({"": 0}, {"": "cpu"}),
        ({"model": "cuda:1", "lm_head": "meta"}, {"model": "cpu", "lm_head": "meta"}),
        ("auto", "auto"),
        (None, None),
    ],
)
def test_device_maps_follow(given: Any, expected: Any) -> None:
    assert present(given) == expected


def test_meta_tensors_are_still_made_on_meta() -> None:
    with torch.device("meta"):
        made = [torch.empty(1), torch.arange(2), nn.Linear(1, 1).weight]
    assert {tensor.device.type for tensor in made} == {"meta"}


@pytest.mark.slow
def test_a_compiled_function_follows(tmp_path: Path) -> None:
    program = (
        "import lapilli.compat; lapilli.compat.install(); import torch\n"
        "made = lambda x: torch.ones(2, device='cuda') + x.to('cuda')\n"
        "print(torch.compile(made, backend='eager', fullgraph=True)(torch.ones(2)).tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.stdout == "[2.0, 2.0]\n", run.stderr


def test_files_of_a_gpu_are_read(tmp_path: Path) -> None:
    torch.save(torch.ones(1), tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", map_location="cuda", weights_only=True).item() == 1


def test_a_second_call_changes_nothing() -> None:
    before = [getattr(torch, name) for name in MAKERS]
    stand_in()
    assert before == [getattr(torch, name) for name in MAKERS]


@pytest.mark.parametrize(
    ("device", "absent"),
    [("cuda", True), ("cuda:3", True), (0, True), ("cpu", False), ("mps", False), (True, False)],
)
def test_which_devices_are_absent(device: object, absent: bool) -> None:
    assert is_absent(device) is absent


@pytest.mark.slow
def test_it_is_told_once(tmp_path: Path) -> None:
    program = (
        "import lapilli.compat; lapilli.compat.install(); import torch\n"
        "torch.zeros(1).cuda(); torch.zeros(1).to('cuda'); torch.zeros(1).to('cpu')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.stderr == 'lapilli.compat: there is no GPU here: "cuda" means the CPU\n'

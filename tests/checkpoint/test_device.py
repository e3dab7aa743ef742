"""Default device and dtype, by name and by the memory of the machine."""

import pytest
import torch

from lapilli.checkpoint import device as device_module
from lapilli.checkpoint.device import available_memory, choose_device, choose_dtype
from lapilli.errors import ConfigError

CPU, GPU, OLD_GPU = torch.device("cpu"), torch.device("cuda"), torch.device("cuda:1")


@pytest.mark.parametrize(
    ("free", "chosen"),
    [(None, torch.float32), (5_000, torch.float32), (4_999, torch.bfloat16)],
)
def test_auto_on_a_cpu_is_float32_where_it_fits(monkeypatch, free, chosen):
    monkeypatch.setattr(device_module, "available_memory", lambda: free)
    assert choose_dtype("auto", device=CPU, stored="float16", num_parameters=1_000) is chosen


@pytest.mark.parametrize(
    ("stored", "chosen"), [("bfloat16", torch.bfloat16), (None, torch.float16)]
)
@pytest.mark.parametrize("device", [OLD_GPU, torch.device("mps")], ids=str)
def test_auto_elsewhere_is_the_checkpoints(monkeypatch, device, stored, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert choose_dtype("auto", device=device, stored=stored, num_parameters=1) is chosen


@pytest.mark.parametrize("stored", ["float16", "float32", None])
def test_auto_on_a_gpu_is_bfloat16(monkeypatch, stored):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert choose_dtype("auto", device=GPU, stored=stored, num_parameters=1) is torch.bfloat16


@pytest.mark.parametrize("asked", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_every_name_of_a_dtype_is_read(asked):
    assert choose_dtype(asked, device=CPU, stored=None, num_parameters=1) is torch.bfloat16


def test_dtypes_that_are_not_for_weights_are_refused():
    with pytest.raises(ConfigError, match=r"dtype torch.int8 is not one for weights"):
        choose_dtype(torch.int8, device=CPU, stored=None, num_parameters=1)


def test_device():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused():
    with pytest.raises(ConfigError, match="device 'cuda:1' was asked for, but there is no CUDA"):
        choose_device("cuda:1")


def test_memory_of_the_machine_and_of_the_container(tmp_path):
    assert available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   8 kB\n")
    assert available_memory(tmp_path) == 8192
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 8192
    (group / "memory.max").write_text("3000\n")
    assert available_memory(tmp_path) == 2000

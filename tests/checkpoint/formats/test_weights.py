"""Weight files: views, conversions, memory and the check for values that are not finite."""

import io
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lapilli.checkpoint.formats.weights import (
    PickledShard,
    SafetensorsShard,
    TensorInfo,
    WeightStore,
    check_values,
    find_weight_files,
)
from lapilli.errors import CheckpointError, MissingFileError


def saved(tensors) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


SHAPES = [(3, 5), (7,), (), (0, 4), (2, 3, 4)]


@pytest.fixture(params=["safetensors", "bin", "odd\udcff.safetensors", "odd\udcff.bin"])
def shard(request, tmp_path):
    """The same tensors in either format."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": torch.randn(shape, generator=generator).bfloat16()
        for i, shape in enumerate(SHAPES)
    }
    tensors["ids"] = torch.arange(5)
    path = tmp_path / f"model.{request.param}"
    if path.suffix == ".bin":
        path.write_bytes(saved(tensors))
        return PickledShard(path), tensors
    path.write_bytes(save(tensors))
    return SafetensorsShard(path), tensors


def test_names_shapes_and_dtypes_without_reading(shard):
    opened, tensors = shard
    file = opened.path.name
    expected = {name: TensorInfo(tuple(t.shape), t.dtype, file) for name, t in tensors.items()}
    assert opened.infos == expected


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float16])
def test_tensors_in_any_dtype(shard, dtype):
    opened, tensors = shard
    found = {name: opened.tensor(name, dtype) for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(dtype or tensor.dtype)), name


def test_writing_to_a_view_does_not_change_the_file(shard):
    opened, tensors = shard
    opened.tensor("t0").fill_(7.0)
    assert torch.equal(type(opened)(opened.path).tensor("t0"), tensors["t0"])


def test_a_misaligned_tensor_is_copied(tmp_path):
    path = tmp_path / "model.safetensors"
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x05" + struct.pack("<2f", 1, 2))
    opened = SafetensorsShard(path)
    first = opened.tensor("b")
    opened.tensor("a", torch.float32)
    assert first.tolist() == [1.0, 2.0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_truncated_or_changed_header_is_an_error(tmp_path_factory, data):
    whole = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)})
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    keep = data.draw(st.integers(0, len(whole) - 1))
    place = data.draw(st.integers(0, header - 1))
    changed = bytearray(whole[:keep])
    if place < keep:
        changed[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    path.write_bytes(bytes(changed))
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        SafetensorsShard(path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"x stands in a.safetensors and in b.safetensors"):
        WeightStore.of_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_safetensors_are_preferred_to_pickles(tmp_path):
    assert find_weight_files(tmp_path) == ()
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert [f.name for f in find_weight_files(tmp_path)] == ["pytorch_model.bin"]
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert [f.name for f in find_weight_files(tmp_path)] == ["model.safetensors"]


def test_shards_without_index_are_counted(tmp_path):
    for number in (1, 2):
        save_file(
            {f"x{number}": torch.zeros(1)}, tmp_path / f"model-0000{number}-of-00002.safetensors"
        )
    assert len(find_weight_files(tmp_path)) == 2
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFileError, match="1 of 2 weight files are in"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_among_many_is_found(dtype, value):
    tensor = torch.randn(257, 33).to(dtype)
    check_values("w", tensor)
    tensor[256, 32] = value
    with pytest.raises(CheckpointError, match="w has 1 values of 8481 that are NaN or infinite"):
        check_values("w", tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_values_whose_sum_overflows_are_finite(dtype, monkeypatch):
    monkeypatch.setattr("lapilli.checkpoint.formats.weights.FINITE_BLOCK", 100)
    tensor = torch.full((257, 33), torch.finfo(dtype).max, dtype=dtype)
    assert not tensor.sum().isfinite()
    check_values("w", tensor)
    tensor[3, 4] = float("nan")
    tensor[256, 32] = float("inf")
    with pytest.raises(CheckpointError, match="w has 2 values of 8481 that are NaN or infinite"):
        check_values("w", tensor)


def test_infinities_that_cancel_are_found():
    tensor = torch.tensor([float("inf"), 1.0, float("-inf")])
    with pytest.raises(CheckpointError, match="w has 2 values of 3"):
        check_values("w", tensor)


def test_integers_and_nothing_are_finite():
    check_values("ids", torch.arange(3))
    check_values("empty", torch.empty(0))

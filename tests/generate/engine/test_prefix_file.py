"""Saved prefixes: what was saved comes back, and whatever is not that is one CheckpointError."""

import dataclasses
import json
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lapilli.errors import CheckpointError, MissingFileError
from lapilli.generate.engine import Engine
from lapilli.generate.engine.prefix_file import model_digest, read_prefix
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.conftest import SMALL, build, picture, request_of

PARTS = [3, 4, picture(1), 5, 6, 7, 8, 9]
KINDS = ("auto", "int8", "bfloat16")


def new_engine(kind):
    options = dataclasses.replace(SMALL, kv_dtype=kind)
    return Engine(build(), WordTokenizer(), options=options)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def saved(kind, tmp_path_factory):
    """A file, and the keys of the sequence in it."""
    engine, path = new_engine(kind), tmp_path_factory.mktemp("prefix") / "seen.safetensors"
    handle = engine.submit(request_of(PARTS))
    while engine.step():
        pass
    engine.save_prefix(path, handle.keys)
    return path


def test_a_prefix_replaces_files_and_nothing_else(tmp_path):
    engine = new_engine("auto")
    handle = engine.submit(request_of(PARTS))
    while engine.step():
        pass
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="is no file that a prefix could replace"):
            engine.save_prefix(place, handle.keys)
    (tmp_path / "link").symlink_to("target")
    for _ in range(2):  # the second time over the first
        engine.save_prefix(tmp_path / "link", handle.keys)
        assert (tmp_path / "link").is_symlink()
        (tmp_path / "plain").touch()
        assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def content(path):
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def blocks_of(engine):
    return [tensor.clone() for tensor in engine.pool.store.tensors()]


def refused(path, kind, engine=None, **expected):
    """The error, after which nothing is changed."""
    engine = engine or new_engine(kind)
    before, free = blocks_of(engine), engine.pool.available
    with pytest.raises(CheckpointError, **expected) as told:
        engine.load_prefix(path)
    assert all(map(torch.equal, before, blocks_of(engine)))
    assert (engine.pool.available, engine.pool.num_idle) == (free, 0)
    assert len(str(told.value)) < 600


def test_a_name_that_is_no_utf8_is_read(saved, kind, tmp_path):
    odd = tmp_path / "odd\udcff"
    odd.write_bytes(saved.read_bytes())
    assert new_engine(kind).load_prefix(odd) == new_engine(kind).load_prefix(saved)


@pytest.mark.slow
def test_what_was_saved_is_found_and_answers_are_the_same(saved, kind):
    fresh, loaded = new_engine(kind), new_engine(kind)
    assert loaded.load_prefix(saved) > 12
    request = request_of([*PARTS, 11, 12])
    assert loaded.run([request]) == fresh.run([request])
    assert loaded.prefix_stats.cached_tokens >= len(PARTS)


def first(tensors):
    return tensors["0.keys"]


def changed(tensor, number):
    other = tensor.clone()
    other.view(-1).view(torch.uint8)[number] ^= 1
    return other


CHANGES = {
    "another bit of a key": lambda h, t: t.update({"0.keys": changed(t["0.keys"], 5)}),
    "another bit of a value": lambda h, t: t.update({"1.values": changed(t["1.values"], 9)}),
    "not a number": lambda h, t: first(t).view(-1)[:4].view(torch.uint8).fill_(255),
    "layers exchanged": lambda h, t: t.update({"0.keys": t["1.keys"], "1.keys": t["0.keys"]}),
    "keys and values exchanged": lambda h, t: t.update(
        {"0.keys": t["0.values"], "0.values": t["0.keys"]}
    ),
    "positions turned": lambda h, t: t.update({"0.keys": t["0.keys"].flip(1).contiguous()}),
    "a position less": lambda h, t: t.update({"0.keys": t["0.keys"][:, 1:].contiguous()}),
    "a position less everywhere": lambda h, t: t.update(
        {name: tensor[:, 1:].contiguous() for name, tensor in t.items()}
    ),
    "a head less": lambda h, t: t.update({"0.keys": t["0.keys"][:1].contiguous()}),
    "one head for all": lambda h, t: t.update({"0.keys": t["0.keys"][:1, :, :1].contiguous()}),
    "transposed": lambda h, t: t.update({"0.keys": t["0.keys"].transpose(0, 1).contiguous()}),
    "flat": lambda h, t: t.update({"0.keys": t["0.keys"].flatten()}),
    "of another dtype": lambda h, t: t.update({"0.keys": t["0.keys"].double()}),
    "of integers": lambda h, t: t.update({"0.keys": t["0.keys"].to(torch.int32)}),
    "a tensor is missing": lambda h, t: t.pop("1.keys"),
    "a tensor too many": lambda h, t: t.update({"2.keys": t["1.keys"].clone()}),
    "no tensors": lambda h, t: t.clear(),
    "no header": lambda h, t: h.clear(),
    "no format": lambda h, t: h.pop("format"),
    "another format": lambda h, t: h.update(format="lapilli prefix 9"),
    "no model": lambda h, t: h.pop("model"),
    "another model": lambda h, t: h.update(model="0" * 64),
    "no kind": lambda h, t: h.pop("kind"),
    "another kind": lambda h, t: h.update(kind="float64"),
    "no keys": lambda h, t: h.pop("keys"),
    "no digest": lambda h, t: h.pop("digest"),
    "another digest": lambda h, t: h.update(digest="0" * 64),
    "keys are no JSON": lambda h, t: h.update(keys="[1"),
    "keys are a number": lambda h, t: h.update(keys="7"),
    "keys are numbers": lambda h, t: h.update(keys=json.dumps([1] * len(json.loads(h["keys"])))),
    "keys are words": lambda h, t: h.update(keys=json.dumps(["x"] * len(json.loads(h["keys"])))),
    "keys are nested": lambda h, t: h.update(keys="[" * 100_000),
    "keys are a long number": lambda h, t: h.update(keys="9" * 10_000),
    "no positions": lambda h, t: h.update(keys="[]"),
    "other keys": lambda h, t: h.update(keys=json.dumps(json.loads(h["keys"])[::-1])),
    "one key less": lambda h, t: h.update(keys=json.dumps(json.loads(h["keys"])[:-1])),
    "one key more": lambda h, t: h.update(keys=json.dumps([*json.loads(h["keys"]), "1"])),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_prefix_is_refused(saved, kind, tmp_path, change):
    header, tensors = content(saved)
    change(header, tensors)
    save_file(tensors, tmp_path / "changed", metadata=header or None)
    refused(tmp_path / "changed", kind)


@pytest.mark.slow
def test_a_truncated_prefix_is_refused(saved, kind, tmp_path):
    whole, path, engine = saved.read_bytes(), tmp_path / "cut", new_engine(kind)
    for size in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path, kind, engine, match="not a saved prefix")
    path.write_bytes(whole + b"\0")
    refused(path, kind)


@pytest.mark.slow
def test_a_changed_byte_is_refused_or_does_not_matter(saved, kind, tmp_path):
    whole, draw, path = saved.read_bytes(), random.Random(0), tmp_path / "changed"
    engine = new_engine(kind)
    digest = model_digest(engine.model)
    honest = read_prefix(saved, engine.pool, digest)
    for _ in range(200):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            found = read_prefix(path, engine.pool, digest)
        except CheckpointError:
            continue
        assert found.keys == honest.keys  # a space in the header
        assert all(map(torch.equal, found.tensors, honest.tensors))


def test_a_prefix_of_an_earlier_version_is_refused_by_name(saved, kind, tmp_path):
    header, tensors = content(saved)
    del header["digest"]
    save_file(tensors, tmp_path / "old", metadata={**header, "format": "lapilli prefix 1"})
    refused(tmp_path / "old", kind, match="saved by an earlier version.*save the prefix again")


@pytest.mark.slow
def test_a_path_that_is_no_file_is_refused(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        refused(path, kind, match="it is no file")
    with pytest.raises(MissingFileError, match=r"Chat\.save_prefix writes one"):
        new_engine(kind).load_prefix(tmp_path / "nothing")


@pytest.mark.slow
def test_an_unwritable_path_is_named(saved, kind, tmp_path):
    engine = new_engine(kind)
    handle = engine.submit(request_of(PARTS))
    while engine.step():
        pass
    with pytest.raises(CheckpointError, match="the prefix cannot be saved to"):
        engine.save_prefix(tmp_path / "none" / "seen", handle.keys)


def test_long_messages_of_safetensors_are_cut(kind, tmp_path):
    header = b'{"a": "' + b"x" * 100_000 + b'"}'
    path = tmp_path / "seen.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="not a saved prefix") as told:
        new_engine(kind).load_prefix(path)
    assert len(str(told.value)) < 1000

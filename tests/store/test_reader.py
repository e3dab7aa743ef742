"""Reading: what was written comes back, by id and by key, in every format, or one clear error."""

import json
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.errors import StoreError
from lapilli.store import Store, StoreWriter, compact, text_hash
from lapilli.store.index import keys_of
from tests.store.conftest import vectors_of, write


def test_what_was_written_comes_back(small):
    store = Store.open(small)
    expected = vectors_of(3)
    assert len(store) == 3
    assert store.ids() == ["a", "b", "c"]
    assert torch.equal(store.get(["c", "a", "c"]), expected[[2, 0, 2]])
    assert torch.equal(store["b"], expected[1])
    assert torch.equal(store[["b"]], expected[1:2])
    assert torch.equal(store.read(store.keys(["b", "a"])), expected[[1, 0]])
    assert "a" in store
    assert "d" not in store
    assert (store.width, store.tokens, store.dtype) == (4, 1, "float16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_formats(tmp_path, dtype, shard_bytes):
    vectors = torch.randn(5, 3, 8)
    write(tmp_path / "s", [f"i{n}" for n in range(5)], vectors, dtype=dtype)
    with StoreWriter(tmp_path / "s", encoder="enc-1", shard_bytes=shard_bytes) as writer:
        writer.add(["more"], vectors[:1])
    store = Store.open(tmp_path / "s")
    if dtype == "int8":
        scale = vectors.abs().amax(-1, keepdim=True) / 127
        expected = (vectors / scale).round() * scale
        assert (store.get(store.ids()) - vectors[[0, 1, 2, 3, 4, 0]]).abs().max() <= scale.max()
    else:
        expected = vectors.to(getattr(torch, dtype)).float()
        assert torch.equal(store.get(["i0"], dtype=None), vectors[:1].to(getattr(torch, dtype)))
    found = store.get(["i4", "more", "i1"])
    torch.testing.assert_close(found, expected[[4, 0, 1]], rtol=1e-6, atol=0)
    for one, row in (("i4", 4), ("more", 0)):
        torch.testing.assert_close(store[one], expected[row], rtol=1e-6, atol=0)
    assert store.get(["i1"], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_is_read_is_a_copy(tmp_path):
    write(tmp_path / "s", ["a", "b"], vectors_of(2), dtype="float32")
    store = Store.open(tmp_path / "s")
    for found in (store["a"], store.get(["a", "b"]), store.get(["a"], dtype=None)):
        found.fill_(7)
    assert torch.equal(store["a"], vectors_of(2)[0])


def test_numbers_are_ids(tmp_path):
    write(tmp_path / "s", [1, np.int64(2), "3"], vectors_of(3))
    store = Store.open(tmp_path / "s")
    assert torch.equal(store[1], store["1"])
    assert torch.equal(store.get(torch.tensor([1, 2, 3])), vectors_of(3))
    assert torch.equal(store.get(np.array([3])), vectors_of(3)[2:])
    assert torch.equal(store[np.int32(2)], vectors_of(3)[1])
    assert 3 in store


@given(st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=20), st.data())
def test_any_text_is_an_id(tmp_path_factory, ids, data):
    path = tmp_path_factory.mktemp("ids") / "s"
    vectors = vectors_of(len(ids))
    if any("\ud800" <= letter <= "\udfff" for one in ids for letter in one):
        with pytest.raises(StoreError, match="no text that UTF-8 can say"):
            write(path, ids, vectors)
        return
    write(path, ids, vectors)
    store = Store.open(path)
    wanted = data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=30))
    assert torch.equal(store.get([ids[i] for i in wanted]), vectors[wanted])
    assert all(torch.equal(store[ids[i]], vectors[i]) for i in wanted)
    assert store.ids() == ids


def test_nothing_is_asked_for(small):
    store = Store.open(small)
    assert store.get([]).shape == (0, 1, 4)
    assert store.read(store.keys([])).shape == (0, 1, 4)
    with StoreWriter(small, encoder="enc-1") as writer:
        writer.add(["d"], vectors_of(1))
    assert store.reload()
    assert store.get([]).shape == (0, 1, 4)


def test_an_empty_store(tmp_path):
    with StoreWriter(tmp_path / "s", encoder="e", width=4):
        pass
    store = Store.open(tmp_path / "s", encoder="e")
    assert len(store) == 0
    assert store.ids() == []
    assert "a" not in store
    assert store.needed(["a"], ["t"]) == [0]
    assert store.get([]).shape == (0, 1, 4)
    for read in (lambda: store["a"], lambda: store.get(["a"]), lambda: store.read(store.keys("a"))):
        with pytest.raises(StoreError, match="has no entries: add some"):
            read()


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store["x"],
        lambda store: store.get(["a", "x", "b"]),
        lambda store: store.hashes(["x"]),
    ],
)
def test_unknown_ids_are_named(small, read):
    with pytest.raises(StoreError, match=r"no entry for 'x' \(it has 3 entries\): add them"):
        read(Store.open(small))


def test_many_unknown_ids(small):
    with pytest.raises(StoreError, match="'0', '1', '2', '3', '4' and 95 more"):
        Store.open(small).get(range(100))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda s: s.get([None]), "an id is None: expected a text or a whole number"),
        (lambda s: s.get([True]), "an id is True"),
        (lambda s: s.get([1.5]), "an id is 1.5"),
        (lambda s: s.get(["\ud800"]), "no text that UTF-8"),
        (lambda s: s.get({"a": 1}), "ids are"),
        (lambda s: s.get(b"a"), "ids are b'a': expected a list"),
        (lambda s: s.read(np.array([1])), r"keys are int64 \[1\]: expected uint64"),
        (lambda s: s.get(["a"], dtype=torch.int32), "vectors as torch.int32 are asked for"),
        (lambda s: s.needed(["a"], ["t", "u"]), "1 ids but 2 texts or hashes"),
        (lambda s: s.needed(["a"], hashes=["zz"]), "a hash is no text in hex"),
        (lambda s: s.needed(["a"], hashes=["00"]), "a hash has not 32 digits"),
        (lambda s: s.needed(["a"], ["t"], hashes=["00"]), "texts and hashes were given"),
    ],
)
def test_wrong_questions(small, ask, says):
    with pytest.raises(StoreError, match=says):
        ask(Store.open(small))


def test_codes_are_not_read_without_scales(tmp_path):
    write(tmp_path / "s", ["a"], vectors_of(1), dtype="int8")
    with pytest.raises(StoreError, match="codes of int8 mean nothing"):
        Store.open(tmp_path / "s").get(["a"], dtype=None)


def test_stale_entries_are_refused(small):
    with pytest.raises(StoreError, match="every entry was made by another encoder: expected 'enc-2', found 'enc-1'; encode"):  # fmt: skip # noqa: E501
        Store.open(small, encoder="enc-2")
    with pytest.raises(StoreError, match="another projector: expected 'p', found None"):
        Store.open(small, encoder="enc-1", projector="p")
    write(small, ["b"], vectors_of(1, seed=1), ["text b"], encoder="enc-2")
    store = Store.open(small, encoder="enc-2")
    assert torch.equal(store["b"], vectors_of(1, seed=1)[0])
    for read in (lambda: store["a"], lambda: store.get(["b", "a", "c"])):
        with pytest.raises(StoreError, match=r"id 'a'.*expected 'enc-2', found 'enc-1'"):
            read()
    assert store.needed(["a", "b", "c", "d"], ["text a", "text b", "text c", "d"]) == [0, 2, 3]
    assert len(Store.open(small)[["a", "b"]]) == 2  # any encoder


def test_what_has_to_be_encoded(small):
    store = Store.open(small, encoder="enc-1")
    assert store.needed(["a", "b", "x"], ["text a", "another", "text x"]) == [1, 2]
    assert store.needed(["a", "b"], hashes=[text_hash("text a"), text_hash("no")]) == [1]
    assert store.needed(["a"]) == [0]  # of what was not said, nothing is known
    assert store.hashes(["b", "a"]) == [text_hash("text b"), text_hash("text a")]
    write(small, ["n"], vectors_of(1))
    store.reload()
    assert store.hashes(["n"]) == [None]
    assert store.needed(["n"], [""]) == [0]


def test_readers_keep_what_they_opened(small):
    store = Store.open(small)
    write(small, ["a", "d"], vectors_of(2, seed=1), ["new", "d"])
    compact(small)
    assert store.ids() == ["a", "b", "c"]
    assert torch.equal(store["a"], vectors_of(3)[0])
    assert store.reload()
    assert not store.reload()
    assert torch.equal(store["a"], vectors_of(2, seed=1)[0])
    assert len(store) == 4


def test_a_store_goes_to_another_process(small):
    copy = pickle.loads(pickle.dumps(Store.open(small, encoder="enc-1")))
    assert copy.encoder == "enc-1"
    assert torch.equal(copy["a"], vectors_of(3)[0])


def test_no_store(tmp_path):
    with pytest.raises(StoreError, match="is not there: expected a store"):
        Store.open(tmp_path / "nothing")
    with pytest.raises(StoreError, match=r"is no store: it has no manifest.json"):
        Store.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        Store.open(tmp_path / "file")
    for use in (Store.open, compact, lambda path: StoreWriter(path, encoder="e")):
        with pytest.raises(StoreError, match="a name has no NUL in it"):
            use("a\0b")
    writing = StoreWriter(tmp_path / "s", encoder="e")
    writing.add(["a"], vectors_of(1))
    with pytest.raises(StoreError, match="a store that was never finished"):
        Store.open(tmp_path / "s")
    writing.discard()


def shard_of(path, kind="shard"):
    return next(path.glob(f"{kind}-*"))


@pytest.mark.parametrize("kind", ["shard", "index"])
def test_a_cut_file_is_refused(small, kind):
    file = shard_of(small, kind)
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(StoreError, match=f"{kind}-.* is damaged: it has {len(data) - 1} bytes"):
        Store.open(small)
    file.write_bytes(data)
    file.unlink()
    with pytest.raises(StoreError, match=f"is damaged: .*{kind}-.* is missing"):
        Store.open(small)


@pytest.mark.parametrize("kind", ["shard", "index"])
def test_every_changed_byte_is_found(small, kind):
    file = shard_of(small, kind)
    data = file.read_bytes()
    Store.open(small).verify()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        try:
            store = Store.open(small)
            for one in store.ids():
                assert store[one].shape == (1, 4)
        except (StoreError, UnicodeDecodeError):
            pass
        else:
            with pytest.raises(StoreError, match="is damaged: its SHA-256"):
                store.verify()


def test_an_index_that_names_other_rows(small):
    file = shard_of(small, "index")
    data = bytearray(file.read_bytes())
    data[-16:-8] = (77).to_bytes(8, "little")  # the last place; samples follow
    file.write_bytes(data)
    store = Store.open(small)
    lost = next(one for one in "abc" if store._snapshot.find(store.keys([one]))[0] == 77)
    for read in (lambda: store[lost], lambda: store.get([lost, lost])):
        with pytest.raises(StoreError, match="damaged: an index names row 77 of shard 0"):
            read()


def test_another_version(small):
    file = small / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(StoreError, match="has version 2, expected 1: read it with"):
        Store.open(small)


def test_links_lead_to_the_store(small, tmp_path):
    (tmp_path / "link").symlink_to(small)
    write(tmp_path / "link", ["d"], vectors_of(1))
    assert len(Store.open(tmp_path / "link")) == len(Store.open(small)) == 4


def test_a_moved_store_is_the_same(small, tmp_path):
    shutil.move(small, tmp_path / "elsewhere")
    assert len(Store.open(str(tmp_path / "elsewhere"))) == 3


def test_threads_read_during_compaction(tmp_path):
    path, ids = tmp_path / "s", [f"i{n}" for n in range(50)]
    write(path, ids, vectors_of(50), [f"{n}" for n in ids])
    store, ended, wrong = Store.open(path), threading.Event(), []

    def read():
        while not ended.is_set():
            found = store.get(ids)
            if not (torch.equal(found[:, 0, 1:], vectors_of(50)[:, 0, 1:])):
                wrong.append(found)
            if len(set(found[:, 0, 0].tolist())) != 1 and found[0, 0, 0] in range(10):
                wrong.append(found)
            store.reload()

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for round_ in range(10):
        vectors = vectors_of(50)
        vectors[:, 0, 0] = round_
        write(path, ids, vectors)
        compact(path)
    ended.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.reload() in (True, False)
    assert store.get(ids)[:, 0, 0].tolist() == [9.0] * 50


@given(st.data())
def test_ids_are_compared_at_once_as_one_by_one(tmp_path_factory, data):
    ids = data.draw(st.lists(st.text(min_size=1, max_size=12), min_size=1, unique=True, max_size=8))
    folder = tmp_path_factory.mktemp("ids") / "s"
    with StoreWriter(folder, encoder="e") as writer:
        half = len(ids) // 2
        for part in (ids[:half], ids[half:]):
            if part:
                writer.add(part, torch.zeros(len(part), 2))
                writer.commit()
    snapshot = Store(folder)._snapshot
    asked = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=8))
    encoded = [one.encode() for one in asked]
    places = snapshot.find(keys_of(encoded))
    others = data.draw(st.permutations(encoded))
    assert snapshot.has_ids(places, encoded)
    assert snapshot.has_ids(places, others) == (snapshot.ids_at(places) == others)
    longer = [*encoded[:-1], encoded[-1] + b"x"]
    assert not snapshot.has_ids(places, longer)

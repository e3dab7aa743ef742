"""Writing: what changed and nothing else, one at a time, whole or not at all."""

import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lapilli.errors import StoreError
from lapilli.store import Store, StoreWriter, compact, writer
from lapilli.store.writer import tensor_of
from tests.store.conftest import die_at, vectors_of, write
from tests.train.faults import start


def test_only_what_changed_is_written(small):
    with StoreWriter(small, encoder="enc-1") as writing:
        assert writing.needed(["a", "b"], ["text a", "other"]) == [1]
        changed = writing.add(["a", "b", "d"], vectors_of(3, seed=1), ["text a", "other", "d"])
    assert changed == 2
    store = Store.open(small)
    assert store.ids() == ["a", "c", "b", "d"]
    assert torch.equal(store["a"], vectors_of(3)[0])
    assert torch.equal(store["b"], vectors_of(3, seed=1)[1])
    assert store.info().dead == 1


def test_nothing_new_changes_no_file(small):
    before = {path.name: path.stat().st_mtime_ns for path in small.iterdir()}
    write(small, ["a", "c"], vectors_of(2), ["text a", "text c"])
    assert {path.name: path.stat().st_mtime_ns for path in small.iterdir()} == before


def test_another_encoder_writes_everything(small):
    with StoreWriter(small, encoder="enc-2", projector="p") as writing:
        assert writing.add(["a"], vectors_of(1), ["text a"]) == 1
    stamps = Store.open(small).info().stamps
    assert {(s.encoder, s.projector): n for s, n in stamps.items()} == {
        ("enc-1", None): 3,
        ("enc-2", "p"): 1,
    }


def test_the_last_one_counts_within_a_session(small):
    with StoreWriter(small, encoder="enc-1") as writing:
        writing.add(["a"], vectors_of(1, seed=1), ["new"])
        writing.add(["a"], vectors_of(3)[:1], ["text a"])  # as it was before the session
        writing.add(["x"], vectors_of(1, seed=2), ["x"])
        writing.delete(["x", "b"])
        writing.add(["b"], vectors_of(3)[1:2], ["text b"])
    store = Store.open(small)
    assert sorted(store.ids()) == ["a", "b", "c"]
    assert torch.equal(store.get(["a", "b"]), vectors_of(3)[:2])


def test_the_buffer_of_the_caller_may_be_used_again(tmp_path):
    buffer = vectors_of(2)
    with StoreWriter(tmp_path / "s", encoder="e", dtype="float32") as writing:
        writing.add(["a", "b"], buffer)
        buffer.zero_()
    assert torch.equal(Store.open(tmp_path / "s")[["a", "b"]], vectors_of(2))


def test_arrays_are_vectors_too(tmp_path):
    fixed = np.ones((1, 4), "float32")
    fixed.setflags(write=False)
    with StoreWriter(tmp_path / "s", encoder="e", dtype="float32") as writing:
        writing.add(["a"], fixed)
        writing.add(["b"], torch.ones(1, 4, requires_grad=True))
    assert torch.equal(Store.open(tmp_path / "s")[["a", "b"]], torch.ones(2, 1, 4))


def test_an_error_forgets_what_was_added(small):
    writing = StoreWriter(small, encoder="e", shard_bytes=1)

    def stopped():
        with writing:
            writing.add(["x"], vectors_of(1))
            writing.commit()
            writing.add(["y"], vectors_of(1))
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert sorted(Store.open(small).ids()) == ["a", "b", "c", "x"]
    assert len(list(small.glob("shard-*"))) == 2
    with pytest.raises(StoreError, match=r"this writer of .* has ended"):
        writing.add(["z"], vectors_of(1))


NAN = torch.tensor([[[1.0, float("nan"), 0.0, 0.0]]])


@pytest.mark.parametrize(
    ("ids", "vectors", "texts", "says"),
    [
        (["x"], NAN, None, "the vector of id 'x' has a NaN or an infinite number"),
        (["x"], -1 / torch.zeros(1, 4), None, "the vector of id 'x' has a NaN or an infinite"),
        (["x"], torch.full((1, 4), 1e6), None, "the number 1e[+]06, which is more than float16"),
        (["x"], torch.ones(1, 5), None, r"vectors are \[1, 1, 5\]: .* entries of \[1, 4\]"),
        (["x"], torch.ones(1, 2, 4), None, r"vectors are \[1, 2, 4\]: .* entries of \[1, 4\]"),
        (["x"], torch.ones(4), None, r"vectors are torch.float32 \[4\]: expected floating"),
        (["x"], torch.ones(1, 4).int(), None, "vectors are torch.int32"),
        (["x", "y"], torch.ones(1, 4), None, "2 ids but 1 vectors"),
        (["x", "x"], torch.ones(2, 4), None, "id 'x' comes twice"),
        ([1, "1"], torch.ones(2, 4), None, "id '1' comes twice"),
        ([""], torch.ones(1, 4), None, "an id is empty"),
        (["x"], np.array([[None, 1, 2, 3]]), None, "vectors are array.*: expected numbers"),
        (["x"], torch.ones(1, 4, device="meta"), None, "vectors are on the device meta"),
        (["x"], torch.eye(4)[:1].to_sparse(), None, "in the layout torch.sparse_coo: expected a"),
        (["x"], torch.ones(1, 4), ["t", "u"], "1 ids but 2 texts"),
        (["x"], torch.ones(1, 4), [None], "a text is None: expected a string"),
    ],
)
def test_wrong_entries(small, ids, vectors, texts, says):
    with StoreWriter(small, encoder="e") as writing:
        with pytest.raises(StoreError, match=says):
            writing.add(ids, vectors, texts)
        writing.add(["right"], torch.ones(1, 4))
    assert len(Store.open(small)) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 5}, "has width 4, and 5 was asked for"),
        ({"tokens": 2}, "has tokens 1, and 2 was asked for"),
        ({"dtype": "int8"}, "has dtype float16, and 'int8' was asked for"),
        ({"dtype": "float8"}, "number format 'float8': expected one of float16"),
        ({"encoder": ""}, "encoder is '': expected a fingerprint"),
    ],
)
def test_wrong_options(small, options, says):
    with pytest.raises(StoreError, match=says):
        StoreWriter(small, **{"encoder": "e", **options})
    write(small, ["d"], vectors_of(1))  # the lock was let go of


@pytest.mark.parametrize("wrong", [[[1.0], [2.0, 3.0]], ["abc"], None])
def test_what_is_no_vector_at_all(wrong):
    with pytest.raises(StoreError, match=r"vectors are .*: expected numbers \("):
        tensor_of(wrong)


def test_a_new_store_needs_a_width(tmp_path):
    with pytest.raises(StoreError, match="would be empty: add vectors, or say their width"):  # noqa: SIM117
        with StoreWriter(tmp_path / "s", encoder="e"):
            pass
    with pytest.raises(StoreError, match="width is 0: expected a whole number"):  # noqa: SIM117
        with StoreWriter(tmp_path / "t", encoder="e", width=0):
            pass
    with pytest.raises(StoreError, match="tokens is 0: expected a whole number from 1 on"):
        StoreWriter(tmp_path / "t", encoder="e", width=3, tokens=0)


@pytest.mark.parametrize("pattern", ["shard-*", "index-*"])
def test_a_damaged_store_keeps_its_other_files(small, pattern):
    """Whoever tries to write to a store with one file cut may still restore that file."""
    write(small, ["d"], vectors_of(1))
    whole = {path.name: path.read_bytes() for path in small.iterdir()}
    name = next(small.glob(pattern)).name
    (small / name).write_bytes(whole[name][:50])
    with pytest.raises(StoreError, match=f"{name} is damaged: it has 50 bytes"):
        StoreWriter(small, encoder="e")
    (small / name).write_bytes(whole[name])
    assert {path.name: path.read_bytes() for path in small.iterdir()} == whole
    assert sorted(Store.open(small)) == ["a", "b", "c", "d"]


def test_deleted_ids_are_gone(small):
    with StoreWriter(small, encoder="enc-1") as writing:
        writing.delete("b")
        with pytest.raises(StoreError, match=r"has no entry for \['x'\]: nothing was deleted"):
            writing.delete(["a", "x"])
    store = Store.open(small)
    assert store.ids() == ["a", "c"]
    assert "b" not in store
    write(small, ["b"], vectors_of(1), ["text b"])
    store.reload()
    assert store.ids() == ["a", "c", "b"]


def test_one_writer_at_a_time(small):
    with StoreWriter(small, encoder="e") as writing:
        with pytest.raises(StoreError, match="is being written by another process"):
            StoreWriter(small, encoder="e")
        with pytest.raises(StoreError, match="is being written by another process"):
            compact(small)
        writing.add(["x"], vectors_of(1))
    assert len(Store.open(small)) == 4


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match=r"is no store, and holds 'letter.txt'"):
        StoreWriter(tmp_path, encoder="e")
    with pytest.raises(StoreError, match="is a file: a store is a folder"):
        StoreWriter(tmp_path / "letter.txt", encoder="e")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("committed", [True, False])
def test_two_ids_of_one_key_are_refused(tmp_path, monkeypatch, committed):
    def colliding(ids):
        return np.array([len(one) for one in ids], "<u8")

    monkeypatch.setattr(writer, "keys_of", colliding)
    with StoreWriter(tmp_path / "s", encoder="e") as writing:
        writing.add(["one"], vectors_of(1))
        if committed:
            writing.commit()
            with pytest.raises(StoreError, match="'one' and 'two' have the same 64-bit key"):
                writing.add(["two"], vectors_of(1))
        else:
            writing.add(["two"], vectors_of(1))
            with pytest.raises(StoreError, match="'one' and 'two' have the same 64-bit key"):
                writing.commit()
            writing.discard()


def test_many_commits_stay_quick_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_MOST_SHARDS", 8)
    with StoreWriter(tmp_path / "s", encoder="e") as writing:
        for number in range(60):
            writing.add([number], vectors_of(1, seed=number), [str(number)])
            assert writing.commit() == number + 1
            assert len(list(tmp_path.glob("s/shard-*"))) <= 8
            assert len(list(tmp_path.glob("s/index-*"))) <= 7
    store = Store.open(tmp_path / "s")
    assert store.ids() == [str(number) for number in range(60)]
    expected = torch.cat([vectors_of(1, seed=number) for number in range(60)])
    assert torch.equal(store.get(range(60)), expected)


class StoreAgainstDict(RuleBasedStateMachine):
    """A store does what a dict does, whatever order things come in."""

    @initialize(dtype=st.sampled_from(["float16", "float32"]), tokens=st.integers(1, 2))
    def begin(self, dtype, tokens):
        import tempfile
        from pathlib import Path

        self.path = Path(tempfile.mkdtemp()) / "s"
        self.tokens = tokens
        self.expected, self.pending, self.seed = {}, {}, 0
        self.writing = StoreWriter(
            self.path, encoder="e", width=2, tokens=tokens, dtype=dtype, shard_bytes=40
        )
        self.writing.commit()
        self.store = Store.open(self.path)
        self.opened = {}

    @rule(ids=st.lists(st.integers(0, 30), unique=True, max_size=8), with_texts=st.booleans())
    def add(self, ids, with_texts):
        self.seed += 1
        vectors = vectors_of(len(ids), self.tokens, 2, self.seed)
        texts = [f"{one} {self.seed}" for one in ids] if with_texts else None
        assert self.writing.add(ids, vectors, texts) == len(ids)
        self.pending.update(zip(map(str, ids), vectors, strict=True))

    @rule(data=st.data())
    def delete(self, data):
        if self.pending:
            ids = data.draw(st.lists(st.sampled_from(sorted(self.pending)), max_size=4))
            self.writing.delete(ids)
            for one in ids:
                self.pending.pop(one, None)

    @rule()
    def commit(self):
        assert self.writing.commit() == len(self.pending)
        self.expected = dict(self.pending)

    @rule(commits=st.booleans())
    def close(self, commits):
        if commits:
            self.commit()
        self.writing.discard()
        self.pending = dict(self.expected)
        compact(self.path, shard_bytes=64)
        self.writing = StoreWriter(self.path, encoder="e", shard_bytes=40)

    @rule()
    def reload(self):
        self.store.reload()
        self.opened = dict(self.expected)

    @invariant()
    def is_the_dict(self):
        if not hasattr(self, "store"):
            return
        for store, expected in ((self.store, self.opened), (Store(self.path), self.expected)):
            assert len(store) == len(expected)
            assert sorted(store.ids()) == sorted(expected)
            if expected:
                ids = list(expected)
                assert torch.equal(store.get(ids), torch.stack([expected[one] for one in ids]))
                assert torch.equal(store[ids[0]], expected[ids[0]])

    def teardown(self):
        if hasattr(self, "writing"):
            self.writing.discard()


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def busy_writer(path: str, rounds: int) -> None:
    """Commit again and again: round r says r in every vector, and deletes one id."""
    for round_ in range(rounds):
        with StoreWriter(path, encoder="e", shard_bytes=64) as writing:
            ids = [f"i{n}" for n in range(round_ % 3, 10)]
            writing.add(ids, torch.full((len(ids), 4), float(round_)))
            if round_ % 3 == 0:
                writing.delete(["i0"])
        if round_ % 2:
            compact(path, shard_bytes=64)


def check_whole(path, before: int = 0) -> None:
    """Open a store that a kill has left: a state between two commits, and it can go on."""
    try:
        store = Store.open(path)
    except StoreError as error:
        said = str(error)
        assert before == 0
        assert "never finished" in said or "is not there" in said
    else:
        store.verify()
        found = store.get(store.ids())
        assert len(found) == len(store) >= 9
        assert found[-1].unique().numel() == 1
        newest = found.max()
        assert (found[:, 0, 0] == newest).sum() >= 8
    write(path, ["after"], torch.ones(1, 4))
    store = Store.open(path)
    assert "after" in store
    files = {path.name for path in path.iterdir()} - {"manifest.json", "lock"}
    assert files == store._snapshot.manifest.files


@pytest.mark.parametrize("step", [0, 3, 7, 12, *(pytest.param(s, marks=pytest.mark.slow) for s in range(40) if s not in (0, 3, 7, 12))])  # fmt: skip # noqa: E501
def test_killed_at_every_step(tmp_path, step):
    child = start(die_at, step, busy_writer, str(tmp_path / "s"), 4)
    child.join(120)
    assert child.exitcode in (-signal.SIGKILL, 0)
    assert child.exitcode == -signal.SIGKILL or step > 30
    check_whole(tmp_path / "s")


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 12))]
)
def test_killed_at_any_moment(tmp_path, seed):
    write(tmp_path / "s", [f"i{n}" for n in range(10)], torch.zeros(10, 4), encoder="e")
    child = start(busy_writer, str(tmp_path / "s"), 100_000)
    time.sleep(0.5 + random.Random(seed).random())
    os.kill(child.pid, signal.SIGKILL)
    child.join(120)
    check_whole(tmp_path / "s", before=1)


def fill_disk(path: str, limit: int) -> None:
    """Write with a limit on the size of files, and report by exit codes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        with StoreWriter(path, encoder="e") as writing:
            writing.add([f"x{n}" for n in range(100)], torch.ones(100, 4))
    except StoreError as error:
        said = str(error)
        os._exit(7 if "Raise the limit on the size of a file" in said else 8)


@pytest.mark.parametrize("limit", [0, 100, 3000])
def test_a_full_disk_changes_nothing(small, limit):
    before = sorted(path.name for path in small.iterdir())
    child = start(fill_disk, str(small), limit)
    child.join(120)
    assert child.exitcode == 7
    assert sorted(path.name for path in small.iterdir()) == before
    store = Store.open(small)
    store.verify()
    assert store.ids() == ["a", "b", "c"]

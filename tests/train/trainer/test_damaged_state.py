"""Damaged states of runs: each is one TrainingError, and nothing of a damaged file is used."""

import json
import os
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch

from lapilli.train.trainer.loop import train
from lapilli.train.trainer.metrics import RunLog
from lapilli.train.trainer.state import load_best, load_state, newest_pieces, save_best, save_state
from lapilli.train.trainer.task import Best, TrainingError
from tests.train.faults import new_noisy, noisy_recipe
from tests.train.trainer.test_state import everything, in_pieces, new_state

MOMENTS = ("optimizer", "state", 0)


def at(content, *keys):
    for key in keys:
        content = content[key]
    return content


def put(*keys):
    """Change the value under the last key."""

    def change(content, value):
        at(content, *keys[:-1])[keys[-1]] = value

    return change


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def shared(depth):
    value = [0]
    for _ in range(depth):
        value = [value, value]
    return value


def edited(tensor, index, value):
    changed = tensor.clone()
    changed.view(-1)[index] = value
    return changed


NAN, INF = float("nan"), float("inf")
CHANGES = {
    "no step": lambda c: c.pop("step"),
    "step is text": lambda c: c.update(step="3"),
    "step is true": lambda c: c.update(step=True),
    "step below zero": lambda c: c.update(step=-3),
    "step is a fraction": lambda c: c.update(step=2.5),
    "step is not a number": lambda c: c.update(step=NAN),
    "step of a thousand digits": lambda c: c.update(step=10**1000),
    "step is a tensor": lambda c: c.update(step=torch.tensor(3)),
    "skipped below zero": lambda c: c.update(skipped=-1),
    "best is a number": lambda c: c.update(best=1),
    "best is too long": lambda c: c.update(best=(1, 0.5, 2)),
    "best is not a number": lambda c: c.update(best=(1, NAN)),
    "best is of later": lambda c: c.update(best=(9, 0.5)),
    "identity is a list": lambda c: c.update(identity=["run.seed"]),
    "identity is nested": lambda c: c.update(identity={"a": {"b": 1}}),
    "no model": lambda c: c.pop("model"),
    "model is a list": lambda c: c.update(model=[1]),
    "weight is missing": lambda c: c["model"].pop("0.bias"),
    "weight is text": lambda c: c["model"].update({"0.bias": "x"}),
    "weight of another name": lambda c: c["model"].update({1: c["model"].pop("0.bias")}),
    "weight of another shape": lambda c: c["model"].update({"0.bias": torch.zeros(7)}),
    "weight of integers": lambda c: c["model"].update({"0.bias": torch.zeros(8, dtype=torch.int8)}),
    "complex weight": lambda c: c["model"].update({"0.bias": torch.zeros(8, dtype=torch.cfloat)}),
    "sparse weight": lambda c: c["model"].update({"0.bias": torch.zeros(8).to_sparse()}),
    "weight without memory": lambda c: c["model"].update({"0.bias": torch.empty(8, device="meta")}),
    "weight is not a number": lambda c: c["model"]["0.bias"].fill_(NAN),
    "weight is infinite": lambda c: c["model"]["0.weight"].view(-1)[3:4].fill_(INF),
    "average is infinite": lambda c: c["average"]["0.bias"].fill_(-INF),
    "average is short": lambda c: c["average"].pop("0.bias"),
    "average is a list": lambda c: c.update(average=[1]),
    "no optimizer": lambda c: c.pop("optimizer"),
    "optimizer is a tensor": lambda c: c.update(optimizer=torch.zeros(3)),
    "no groups": lambda c: c["optimizer"].pop("param_groups"),
    "groups without parameters": lambda c: c["optimizer"]["param_groups"][0].pop("params"),
    "parameters of groups are text": lambda c: put("optimizer", "param_groups", 0, "params")(
        c, "a"
    ),
    "groups are exchanged": lambda c: c["optimizer"]["param_groups"].reverse(),
    "moments are a list": lambda c: put("optimizer", "state")(c, []),
    "moments of nobody": lambda c: put("optimizer", "state", 99)(c, {}),
    "moments by name": lambda c: put("optimizer", "state", "0")(c, {}),
    "moments of one are a list": lambda c: put(*MOMENTS)(c, [1]),
    "moment of another shape": lambda c: put(*MOMENTS, "exp_avg")(c, torch.zeros(10_000)),
    "moment of one number": lambda c: put(*MOMENTS, "exp_avg_sq")(c, torch.zeros(())),
    "moment is transposed": lambda c: put(*MOMENTS, "exp_avg")(c, torch.zeros(4, 8)),
    "moment is text": lambda c: put(*MOMENTS, "exp_avg")(c, "x"),
    "moment is nothing": lambda c: put(*MOMENTS, "exp_avg")(c, None),
    "moment of integers": lambda c: put(*MOMENTS, "exp_avg")(c, torch.zeros(8, 4, dtype=torch.int)),
    "moment is not a number": lambda c: at(c, *MOMENTS, "exp_avg").fill_(NAN),
    "squares below zero": lambda c: at(c, *MOMENTS, "exp_avg_sq").fill_(-1.0),
    "count below zero": lambda c: at(c, *MOMENTS, "step").fill_(-5.0),
    "count is a list": lambda c: put(*MOMENTS, "step")(c, torch.ones(3)),
    "nested": lambda c: c.update(identity=nested(100)),
    "one list many times": lambda c: c.update(identity=shared(60)),
    "a tensor stretched": lambda c: c.update(skipped=torch.zeros(1).expand(10**12)),
    "keys of two kinds": lambda c: c.update({3: 1, None: [], (1, 2): {}}) or c.update(step=None),
}
SILENT = {
    "a weight is another": lambda c: c["model"]["0.bias"].add_(1e-3),
    "no moments": lambda c: put("optimizer", "state")(c, {}),
    "moments of one are missing": lambda c: at(c, "optimizer", "state").pop(1),
    "moments are exchanged": lambda c: at(c, *MOMENTS).update(
        exp_avg=at(c, *MOMENTS, "exp_avg_sq"), exp_avg_sq=at(c, *MOMENTS, "exp_avg").abs()
    ),
    "an average is another": lambda c: c["average"]["0.bias"].mul_(2),
    "no average": lambda c: c.pop("average"),
    "another step": lambda c: c.update(step=2),
    "another best": lambda c: c.update(best=(1, 0.25)),
    "no identity": lambda c: c.update(identity=None),
    "weights in float16": lambda c: c.update(model={k: v.half() for k, v in c["model"].items()}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    state = new_state()
    state.best, state.fingerprint = Best(2, 0.5), {"run.seed": 1}
    save_state(state, folder)
    save_best(state, folder)
    return folder


def refused(folder, **expected):
    """The error, after which nothing is changed."""
    state = new_state(steps=1)
    state.fingerprint = {"run.seed": 1}
    before = {name: value.clone() for name, value in everything(state).items()}
    with pytest.raises(TrainingError, **expected) as told:
        load_state(state, folder)
    after = everything(state)
    assert (state.step, state.best) == (1, None)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(str(told.value)) < 1000
    return str(told.value)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_impossible_content_is_refused_also_without_a_digest(saved, tmp_path, change):
    content = torch.load(saved / "state.pt", weights_only=True)
    del content["digest"]
    change(content)
    torch.save(content, tmp_path / "state.pt")
    refused(tmp_path)


@pytest.mark.parametrize("change", SILENT.values(), ids=SILENT.keys())
def test_changed_content_is_refused_by_its_digest(saved, tmp_path, change):
    content = torch.load(saved / "state.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "state.pt")
    refused(tmp_path, match="its content is not what was saved")


def test_a_state_of_an_earlier_version_still_loads(saved, tmp_path):
    content = torch.load(saved / "state.pt", weights_only=True)
    for name in ("digest", "identity", "skipped"):
        del content[name]
    torch.save(content, tmp_path / "state.pt")
    state = new_state(steps=0)
    assert load_state(state, tmp_path)
    assert (state.step, state.skipped, state.best) == (3, 0, Best(2, 0.5))


def test_a_file_that_is_cut_off_anywhere_is_refused(saved, tmp_path):
    whole = (saved / "state.pt").read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        (tmp_path / "state.pt").write_bytes(whole[:size])
        refused(tmp_path, match=r"state.pt is damaged")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_changed_byte_is_refused_or_does_not_matter(saved, tmp_path, seed):
    whole, draw = (saved / "state.pt").read_bytes(), random.Random(seed)
    honest = new_state(steps=0)
    load_state(honest, saved)
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        (tmp_path / "state.pt").write_bytes(changed)
        state = new_state(steps=0)
        try:
            load_state(state, tmp_path)
        except TrainingError:
            continue
        ours, theirs = everything(honest), everything(state)  # padding, or a time in the directory
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_file_that_is_no_state_is_refused(saved, tmp_path):
    path = tmp_path / "state.pt"
    whole = (saved / "state.pt").read_bytes()
    for content in (
        b"",
        b"PK\x05\x06" + bytes(18),
        b"text",
        whole + bytes(99_999),
        pickle.dumps({}),
    ):
        path.write_bytes(content)
        refused(tmp_path, match="is damaged or no state")
    with (
        zipfile.ZipFile(saved / "state.pt") as old,
        zipfile.ZipFile(path, "w") as new,
    ):
        for entry in old.infolist():
            deep = b"\x80\x02" + b"]" * 90_000 + b"a" * 89_999 + b"."
            is_pickle = entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, deep if is_pickle else old.read(entry))
    refused(tmp_path, match="is damaged or no state")
    for value in (None, 3, "text", [1, 2], torch.zeros(3), {}, OrderedDict(a=1), {"step": 3}):
        torch.save(value, path)
        refused(tmp_path)
    path.unlink()
    path.mkdir()
    refused(tmp_path, match="it is no file")
    path.rmdir()
    os.mkfifo(path)
    refused(tmp_path, match="it is no file")


class Runs:
    def __reduce__(self):
        return os.system, ("touch /tmp/was-run",)


def test_a_state_that_would_run_code_is_refused(saved, tmp_path):
    content = torch.load(saved / "state.pt", weights_only=True)
    torch.save({**content, "identity": Runs()}, tmp_path / "state.pt")
    assert "\n" not in refused(tmp_path, match="is damaged")


def test_a_compressed_state_is_refused_before_it_is_unpacked(saved, tmp_path):
    with (
        zipfile.ZipFile(saved / "state.pt") as old,
        zipfile.ZipFile(tmp_path / "state.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    refused(tmp_path, match="compressed entries")


@pytest.mark.parametrize("name", ["no model", "weight of another shape", "weight is not a number"])
def test_damaged_best_weights_are_refused_and_the_model_stays(saved, tmp_path, name):
    content = torch.load(saved / "best.pt", weights_only=True)
    del content["digest"]
    CHANGES[name](content)
    torch.save(content, tmp_path / "best.pt")
    state = new_state()
    before = {key: value.clone() for key, value in state.trained.items()}
    with pytest.raises(TrainingError, match=r"best.pt"):
        load_best(state, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in state.trained.items())


def test_best_weights_that_cannot_be_used_are_told_before_the_first_step(tmp_path):
    train(new_noisy(), noisy_recipe(steps=6), tmp_path)
    whole = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "best.pt").write_bytes(whole[:-200])
    task = new_noisy()

    def no_step(batch):
        raise AssertionError

    task.loss = no_step
    with pytest.raises(TrainingError, match=r"best.pt is damaged"):
        train(task, noisy_recipe(steps=9), tmp_path)


@pytest.fixture
def pieces(tmp_path):
    in_pieces(new_state(), tmp_path)
    return newest_pieces(tmp_path)[1]


def change_values(change):
    def damage(path):
        values = json.loads((path / "values.json").read_text())
        change(values)
        (path / "values.json").write_text(json.dumps(values))

    return damage


def change_directory(change, *, is_told=False):
    """Of pieces; `is_told`: as an earlier version wrote it, without a digest of it."""

    def damage(path):
        directory = pickle.loads((path / ".metadata").read_bytes())
        change(directory)
        (path / ".metadata").write_bytes(pickle.dumps(directory))
        if not is_told:
            change_values(lambda values: values.pop("directory"))(path)

    return damage


def resized(name, size):
    def change(directory):
        directory.state_dict_metadata[name].size = torch.Size(size)

    return change


def moved(**fields):
    def change(directory):
        for place in directory.storage_data.values():
            for name, value in fields.items():
                object.__setattr__(place, name, value)

    return change


def rewrite(name, content):
    return lambda path: (path / name).write_bytes(content)


def flip(path):
    piece = next(path.glob("*.distcp"))
    changed = bytearray(piece.read_bytes())
    at = changed.index(torch.load(piece.parent.parent.parent / "moment.pt").numpy().tobytes())
    changed[at] ^= 1
    piece.write_bytes(changed)


def replaced(make):
    def damage(path):
        name = next(path.glob("*.distcp"))
        name.unlink()
        make(name)

    return damage


MOMENT = "optimizer.0.weight.exp_avg"
DAMAGES = {
    "values are gone": lambda path: (path / "values.json").unlink(),
    "values are empty": rewrite("values.json", b""),
    "values are a list": rewrite("values.json", b"[1]"),
    "values are nested too deeply": rewrite("values.json", b"[" * 100_000),
    "values have a long number": rewrite("values.json", b'{"step": ' + b"9" * 5000 + b"}"),
    "values are larger than any memory": lambda path: os.truncate(path / "values.json", 10**12),
    "values are not text": rewrite("values.json", b"\xff\xfe{}"),
    "step is text": change_values(lambda values: values.update(step="3")),
    "step is another": change_values(lambda values: values.update(step=4)),
    "best is text": change_values(lambda values: values.update(best="x")),
    "directory is gone": lambda path: (path / ".metadata").unlink(),
    "directory is empty": change_directory(lambda directory: None) and rewrite(".metadata", b""),
    "directory would run code": lambda path: (
        rewrite(".metadata", pickle.dumps(Runs()))(path),
        change_values(lambda values: values.pop("directory"))(path),
    ),
    "directory is a list": lambda path: (
        rewrite(".metadata", pickle.dumps([1]))(path),
        change_values(lambda values: values.pop("directory"))(path),
    ),
    "directory lacks moments": change_directory(
        lambda directory: [
            directory.state_dict_metadata.pop(name)
            for name in list(directory.state_dict_metadata)
            if name.startswith("optimizer.")
        ],
        is_told=True,
    ),
    "directory names another": change_directory(
        lambda directory: directory.state_dict_metadata.update(
            {"other.x": directory.state_dict_metadata[MOMENT]}
        )
    ),
    "directory has a moment of nobody": change_directory(
        lambda directory: directory.state_dict_metadata.update(
            {"optimizer.x.exp_avg": directory.state_dict_metadata[MOMENT]}
        )
    ),
    "directory has text": change_directory(
        lambda directory: directory.state_dict_metadata.update({MOMENT: "x"})
    ),
    "weight of another shape": change_directory(resized("model.0.weight", (9, 4))),
    "moment of another shape": change_directory(resized(MOMENT, (80, 40))),
    "moment of many numbers": change_directory(resized(MOMENT, (10**6, 10**6))),
    "piece lies behind the end": change_directory(moved(offset=10**9)),
    "piece lies before the start": change_directory(moved(offset=-1)),
    "piece lies elsewhere": change_directory(moved(relative_path="../../moment.pt")),
    "piece is a device": change_directory(moved(relative_path="/dev/zero")),
    "piece is gone": replaced(lambda name: None),
    "piece is a folder": replaced(lambda name: name.mkdir()),
    "piece is a pipe": replaced(os.mkfifo),
    "piece is empty": replaced(lambda name: name.touch()),
    "piece is zeros": replaced(lambda name: name.write_bytes(bytes(10**6))),
    "piece has another bit": flip,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_pieces_are_refused(pieces, damage):
    kept = new_state().optimizer.state_dict()["state"][0]["exp_avg"]
    torch.save(kept, pieces.parent.parent / "moment.pt")
    damage(pieces)
    with pytest.raises(TrainingError) as told:
        load_state(new_state(steps=0), pieces.parent.parent)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 600


def test_pieces_of_an_earlier_version_still_load(pieces):
    change_values(lambda values: (values.pop("directory"), values.pop("skipped", 0)))(pieces)
    state = new_state(steps=0)
    assert load_state(state, pieces.parent.parent)
    assert state.step == 3


def test_a_folder_with_an_odd_name_is_no_state(pieces):
    for name in ("²", "12a", "-3"):
        shutil.copytree(pieces, pieces.with_name(name))
    assert newest_pieces(pieces.parent.parent)[0] == 3


@pytest.mark.parametrize(
    "line", ["[1]", "3", "{}", '{"step": "x"}', "[" * 90_000, '{"step": ' + "9" * 5000 + "}", "{"]
)
def test_a_damaged_line_of_the_log_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(TrainingError, match=r"log.jsonl:2 is damaged") as told:
        RunLog(tmp_path).rewind(1)
    assert "\n" not in str(told.value)

import json
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lapilli.errors import LapilliError
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.recipe import OptimRecipe
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.metrics import RunLog
from lapilli.train.trainer.optim import Average, build_optimizer
from lapilli.train.trainer.state import (
    load_best,
    load_pieces,
    load_state,
    newest_pieces,
    save_best,
    save_pieces,
    save_state,
    values_of,
)
from lapilli.train.trainer.state_file import check_fingerprint, write_whole
from lapilli.train.trainer.task import Best, RunState, TrainingError
from tests.train.conftest import new_recipe, new_regression
from tests.train.faults import flat, new_noisy, noisy_recipe, start


def new_state(width=8, *, steps=3, name="adamw", bias=True, **optim):
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1, bias=bias))
    optimizer = build_optimizer(model, OptimRecipe(lr=0.1, name=name, weight_decay=0.1, **optim))
    state = RunState(model, optimizer, Average(model, 0.9))
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        state.average.update(state.step)
    return state


def everything(state):
    return flat([state.trained, state.optimizer.state_dict()["state"], state.average.tensors])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_what_is_saved_comes_back(tmp_path, name):
    saved, loaded = new_state(name=name), new_state(name=name, steps=0)
    saved.best = Best(2, 0.5)
    save_state(saved, tmp_path)
    assert load_state(loaded, tmp_path)
    assert (loaded.step, loaded.best) == (3, Best(2, 0.5))
    ours, theirs = everything(saved), everything(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_nothing_is_loaded_from_an_empty_folder(tmp_path):
    state = new_state()
    before = {k: v.clone() for k, v in everything(state).items()}
    assert not load_state(state, tmp_path)
    assert state.step == 3
    assert all(torch.equal(before[key], value) for key, value in everything(state).items())


def test_the_recipe_rules_over_the_file(tmp_path):
    save_state(new_state(), tmp_path)
    other = new_state(steps=0, betas=(0.5, 0.6))
    other.optimizer.param_groups[0]["base_lr"] = 7.0
    load_state(other, tmp_path)
    assert other.optimizer.param_groups[0]["base_lr"] == 7.0
    assert other.optimizer.param_groups[0]["betas"] == (0.5, 0.6)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    save_state(new_state(8), tmp_path)
    with pytest.raises(TrainingError, match=r"\(8,\) for 0.bias, and this recipe trains \(16,\)"):
        load_state(new_state(16), tmp_path)
    frozen = new_state(8)
    frozen.model[0].weight.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"0.weight.*trains nothing \(it is frozen"):
        load_state(frozen, tmp_path)
    grouped = new_state(8)
    del grouped.optimizer.param_groups[1:]
    with pytest.raises(TrainingError, match="other parameter groups"):
        load_state(grouped, tmp_path)


def in_a_file(state, folder):
    save_state(state, folder)


def in_pieces(state, folder):
    """As several processes save it, by one of them."""
    values = {"best": None, "identity": state.fingerprint and dict(state.fingerprint)}
    save_pieces(state, folder, SINGLE_PROCESS, {"step": state.step, **values})


IDENTITIES = st.dictionaries(
    st.sampled_from(["run.seed", "data.group", "data.held_out", "data.pack"]),
    st.one_of(st.integers(0, 2), st.sampled_from(["none", "length"]), st.sampled_from([0.1, 0.5])),
)


@pytest.mark.slow
@pytest.mark.parametrize("save", [in_a_file, in_pieces])
@given(IDENTITIES, IDENTITIES)
@settings(max_examples=12, deadline=None)
def test_a_state_of_other_batches_is_refused_and_every_difference_named(save, theirs, ours):
    saved, state = new_state(steps=1), new_state(steps=0)
    saved.fingerprint, state.fingerprint = theirs, ours
    before = {name: value.clone() for name, value in everything(state).items()}
    differ = {name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)}
    with TemporaryDirectory() as name:
        save(saved, Path(name))
        if not differ:
            assert load_state(state, Path(name))
            return
        with pytest.raises(TrainingError, match="the recipe that began the run, or train") as told:
            load_state(state, Path(name))
    named = re.findall(r"([a-z._]+): the state says (\S+), the recipe (\S+?)[;)]", str(told.value))
    assert {key: (found, expected) for key, found, expected in named} == {
        key: tuple(repr(side[key]) if key in side else "nothing" for side in (theirs, ours))
        for key in differ
    }
    after = everything(state)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("save", [in_a_file, in_pieces])
@pytest.mark.parametrize(("theirs", "ours"), [(None, {"run.seed": 1}), ({"run.seed": 1}, None)])
def test_a_state_or_a_task_that_does_not_say_is_believed(tmp_path, save, theirs, ours):
    saved, state = new_state(), new_state(steps=0)
    saved.fingerprint, state.fingerprint = theirs, ours
    save(saved, tmp_path)
    assert load_state(state, tmp_path)
    assert state.step == 3


def test_a_state_of_an_earlier_version_loads_and_says_what_it_is_from_then_on(tmp_path):
    save_state(new_state(), tmp_path)
    old = torch.load(tmp_path / "state.pt", weights_only=True)
    del old["identity"], old["digest"]
    torch.save(old, tmp_path / "state.pt")
    state = new_state(steps=0)
    state.fingerprint = {"run.seed": 1}
    assert load_state(state, tmp_path)
    assert save_state(state, tmp_path) == tmp_path / "state.pt"
    state.fingerprint = {"run.seed": 2}
    with pytest.raises(TrainingError, match=r"run.seed: the state says 1, the recipe 2\)"):
        load_state(state, tmp_path)


def test_the_best_weights_are_the_averages_of_their_step(tmp_path):
    state = new_state()
    state.best = Best(3, 0.25)
    averages = {name: value.clone() for name, value in state.average.tensors.items()}
    save_best(state, tmp_path)
    kept = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (kept["step"], kept["eval_loss"]) == (3, 0.25)
    load_best(state, tmp_path)
    assert all(torch.equal(state.trained[name], averages[name]) for name in averages)
    (tmp_path / "best.pt").unlink()
    with pytest.raises(TrainingError, match=r"best.pt is missing, .* best step was 3"):
        load_best(state, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 3 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(small_disk):
    save_state(new_state(1000, steps=1), small_disk)
    (small_disk / "filler").write_bytes(b"x" * 2_900_000)
    with pytest.raises(TrainingError, match=r"state.pt cannot be written .*No space left") as told:
        save_state(new_state(2000, steps=2), small_disk)
    assert "about 192,0" in str(told.value)  # weights, two moments, averages: 12,001 numbers each
    assert f"{os.statvfs(small_disk).f_bavail * 4096:,} are free" in str(told.value)
    assert "the earlier state.pt is whole" in str(told.value)
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "state.pt"]
    state = new_state(1000, steps=0)
    assert load_state(state, small_disk)
    assert state.step == 1


def test_a_disk_that_became_read_only_is_not_told_to_make_room(small_disk):
    save_state(new_state(100, steps=1), small_disk)
    log = RunLog(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        for write in (
            lambda: save_state(new_state(100, steps=2), small_disk),
            lambda: log.write({"step": 2}),
        ):
            with pytest.raises(TrainingError, match="Mount that file system writable") as told:
                write()
            assert "Make room" not in str(told.value)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


@pytest.mark.slow
def test_a_run_on_a_full_disk_stops_and_goes_on_when_there_is_room(small_disk, tmp_path):
    folder, whole = small_disk / "run", tmp_path / "whole"
    recipe = noisy_recipe(save_every=4, evaluate_every=0, keep_best=False)
    filler, task = small_disk / "filler", new_noisy()
    draw = task.batch

    def fill(step, micro):
        if step == 6:
            filler.write_bytes(b"x" * 1_500_000)
        return draw(step, micro)

    task.batch = fill
    with pytest.raises(TrainingError, match="cannot be written"):
        train(task, recipe, folder)
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 4
    filler.unlink()
    resumed, undisturbed = new_noisy(), new_noisy()
    train(resumed, recipe, folder)
    train(undisturbed, recipe, whole)
    for ours, theirs in zip(
        resumed.model.parameters(), undisturbed.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def save_within(folder, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_state(new_state(2000, steps=2), folder)
    except TrainingError as error:
        (folder / "told").write_text(str(error))


@pytest.mark.slow
def test_a_quota_is_a_full_disk(tmp_path):
    save_state(new_state(1000, steps=1), tmp_path)
    child = start(save_within, tmp_path, 50_000)
    child.join(60)
    assert child.exitcode == 0
    assert "File too large" in (tmp_path / "told").read_text()
    state = new_state(1000, steps=0)
    assert load_state(state, tmp_path)
    assert state.step == 1


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        write_whole({"a": (i for i in range(2))}, tmp_path / "state.pt")


def test_a_folder_that_is_gone_is_told(tmp_path, regression):
    with pytest.raises(TrainingError, match=r"there is no state.pt yet"):
        write_whole({}, tmp_path / "none" / "state.pt")
    train(new_regression(), new_recipe(steps=2), tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "state.pt").exists()


def test_a_state_of_before_the_keys_were_renamed_goes_on(tmp_path):
    ours = {"run.seed": 0, "run.gradient_accumulation_steps": 4}
    check_fingerprint(ours, {"run.seed": 0, "run.accumulate": 4}, tmp_path)
    with pytest.raises(TrainingError, match="accumulation_steps: the state says 8"):
        check_fingerprint(ours, {"run.seed": 0, "run.accumulate": 8}, tmp_path)


def small(width=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))
    model[0].bias.requires_grad_(False)
    return model


def taught(model):
    """An optimizer after two steps, with one group for each kind of parameter."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[1:]}, {"params": trained[:1], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(2):
        model(torch.ones(3, model[0].in_features)).sum().backward()
        optimizer.step()
    return optimizer


def saved(folder, step=3, model=None):
    model = model or small()
    optimizer = taught(model)
    state = state_around(model, optimizer, {"0.weight": torch.full((8, 4), 0.5)}, step)
    save_pieces(state, folder, SINGLE_PROCESS, {"best": [2, 0.25], "step": step})
    return model, optimizer


def state_around(model, optimizer, tensors=None, step=0):
    average = None if tensors is None else Average(model, 0.5)
    if average is not None:
        average.tensors = tensors
    return RunState(model, optimizer, average, step)


def load(path, model, optimizer, average=None):
    load_pieces(state_around(model, optimizer, average), path, SINGLE_PROCESS)


def test_everything_comes_back_whatever_the_order_of_the_groups(tmp_path):
    model, optimizer = saved(tmp_path)
    other = small()
    trained = [p for p in other.parameters() if p.requires_grad]
    fresh = torch.optim.AdamW(trained, lr=0.5)
    average = {"0.weight": torch.zeros(8, 4), "2.weight": torch.zeros(1, 8)}
    path = newest_pieces(tmp_path)[1]
    load(path, other, fresh, average)
    values = values_of(path)
    assert values.pop("directory").startswith("sha256:")
    assert values == {"best": [2, 0.25], "step": 3}
    for (name, ours), theirs in zip(
        other.named_parameters(), dict(model.named_parameters()).values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0, msg=name)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state[theirs].items():
            torch.testing.assert_close(fresh.state[mine][key], value, atol=0, rtol=0)
    assert fresh.param_groups[0]["lr"] == 0.5
    assert average["0.weight"].unique().tolist() == [0.5]
    torch.testing.assert_close(average["2.weight"], model[2].weight.detach())  # it kept none


def test_a_half_written_state_is_not_seen_and_the_earlier_one_stays(tmp_path):
    saved(tmp_path, step=3)
    shutil.copytree(tmp_path / "state" / "000003", tmp_path / "state" / "000009.part")
    assert newest_pieces(tmp_path)[0] == 3
    saved(tmp_path, step=12)
    assert newest_pieces(tmp_path)[0] == 12
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["000012"]


def test_a_run_without_pieces_has_none(tmp_path):
    assert newest_pieces(tmp_path) is None


def test_a_state_of_another_recipe_is_refused(tmp_path):
    saved(tmp_path)
    other = small(width=5)
    with pytest.raises(LapilliError, match=r"has \(8, 4\) for 0.weight.*trains \(8, 5\)"):
        load(newest_pieces(tmp_path)[1], other, taught(other))
    frozen = small()
    frozen[2].requires_grad_(False)
    with pytest.raises(LapilliError, match=r"for 2.bias, and this recipe trains nothing"):
        load(newest_pieces(tmp_path)[1], frozen, taught(frozen))


def test_a_missing_piece_is_named(tmp_path):
    saved(tmp_path)
    path = newest_pieces(tmp_path)[1]
    for piece in path.glob("*.distcp"):
        piece.unlink()
    with pytest.raises(LapilliError, match=r"is damaged.*there is no file __0_0.distcp"):
        load(path, small(), taught(small()))
    (path / "values.json").write_text("{")
    with pytest.raises(LapilliError, match=r"values.json is damaged.*not valid JSON"):
        values_of(path)


def test_a_disk_that_takes_nothing_leaves_the_earlier_state(tmp_path, monkeypatch):
    saved(tmp_path)

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", full)
    with pytest.raises(LapilliError, match=r"000004 cannot be written.*No space.*Make room"):
        saved(tmp_path, step=4)
    assert newest_pieces(tmp_path)[0] == 3
    assert json.loads((newest_pieces(tmp_path)[1] / "values.json").read_text())["step"] == 3

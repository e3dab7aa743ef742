import json
import shutil

import pytest
import torch
from torch import nn

from lapilli.errors import LapilliError
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.trainer.contract import RunState
from lapilli.train.trainer.optim import Average
from lapilli.train.trainer.sharded_state import load_pieces, newest_pieces, save_pieces, values_of


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
    state = new_state(model, optimizer, {"0.weight": torch.full((8, 4), 0.5)}, step)
    save_pieces(state, folder, SINGLE_PROCESS, {"best": [2, 0.25], "step": step})
    return model, optimizer


def new_state(model, optimizer, tensors=None, step=0):
    average = None if tensors is None else Average(model, 0.5)
    if average is not None:
        average.tensors = tensors
    return RunState(model, optimizer, average, step)


def load(path, model, optimizer, average=None):
    load_pieces(new_state(model, optimizer, average), path, SINGLE_PROCESS)


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
    with pytest.raises(LapilliError, match=r"000004 cannot be written.*No space left"):
        saved(tmp_path, step=4)
    assert newest_pieces(tmp_path)[0] == 3
    assert json.loads((newest_pieces(tmp_path)[1] / "values.json").read_text())["step"] == 3

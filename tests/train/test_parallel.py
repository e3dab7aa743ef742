import pytest
import torch

from lapilli.train.loop import train
from tests.train import cluster
from tests.train.conftest import new_recipe, new_regression

RUN = {"accumulate": 4, "steps": 12, "save_every": 100}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and weights of the same run in one process."""
    folder, task = tmp_path_factory.mktemp("alone"), new_regression()
    train(task, new_recipe(**RUN), folder / "run")
    return cluster.losses(folder), dict(task.model.named_parameters())


@pytest.mark.cluster
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_several_processes_take_the_steps_of_one(tmp_path, alone, size, sharding):
    answers = cluster.together(cluster.run_regression, size, tmp_path, sharding, RUN)
    losses, weights = alone
    assert cluster.losses(tmp_path) == pytest.approx(losses, abs=1e-5)
    for answer in answers:
        assert not isinstance(answer, Exception), answer
        for name, weight in weights.items():
            torch.testing.assert_close(answer[name], weight.detach(), atol=1e-5, rtol=0)

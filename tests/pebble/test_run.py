"""How a stage of pebble begins in one process of several."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from lapilli.pipeline import load
from lapilli.train.distributed import ParallelContext
from pebble import run
from pebble.run import RECIPES, STAGES, Workshop
from pebble.tower import whitening_filters
from tests.train.conftest import new_recipe, new_regression, steps_of

FROM_NOTHING = RECIPES / "from_nothing"


class Lent(Workshop):
    """A workshop whose stage is a regression that starts from whitening filters."""

    def task(self, stage):
        images = torch.randn(32, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        self.start = whitening_filters(images, 16, 256).flatten()
        task = new_regression()
        with torch.no_grad():
            task.model[0].weight.copy_(self.start[:32].view(8, 4))
        return task


@pytest.fixture
def threads():
    """Sets the number of threads; the test's end gives the earlier one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def shop_in(folder):
    shop = Lent(FROM_NOTHING, folder)
    shop.recipes = {"1_tower": new_recipe(steps=2, threads=1)}
    return shop


def test_a_run_begins_with_the_same_bits_whatever_the_machine_gives_it(tmp_path, threads):
    starts = []
    for number in (1, 2, 3):
        threads(number)
        shop = shop_in(tmp_path / str(number))
        shop.train("1_tower", rank=0, size=1)
        starts.append(shop.start)
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])
    losses = [
        [record["loss"] for record in steps_of(tmp_path / str(number) / "1_tower")]
        for number in (1, 2, 3)
    ]
    assert losses[0] == losses[1] == losses[2]


def test_all_processes_start_from_the_leads_weights(tmp_path, threads, monkeypatch):
    class Shared(ParallelContext):
        """A process to which the lead sends ones."""

        def wrap(self, model, **_options):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(1.0)

    monkeypatch.setattr(run, "joined", lambda place, device: nullcontext(Shared()))
    shop = shop_in(tmp_path)
    shop.recipes = {"1_tower": replace(shop.recipes["1_tower"], optim=slow())}
    shop.train("1_tower", rank=1, size=2)
    trained = shop.state("1_tower")["model"]
    assert all(((value - 1).abs() < 1e-6).all() for value in trained.values())


def slow():
    """So slow that weights stay what they were."""
    return replace(new_recipe().optim, lr=1e-9, weight_decay=0.0)


def test_the_warm_recipes_go_on_from_the_embedded_pebble(tmp_path):
    shop = Workshop(RECIPES / "warm", tmp_path)
    assert shop.stages == ("1_tower", "4_instruct")
    earlier = load("pebble", device="cpu", dtype="float32").model
    reader = shop.reader("4_instruct")
    for part, mine in (
        (earlier.language_model, reader.language_model),
        (earlier.modality("image").projector, reader.projector),
    ):
        expected = part.state_dict()
        assert expected.keys() == mine.state_dict().keys()
        assert all(torch.equal(value, expected[name]) for name, value in mine.state_dict().items())
    assert shop.vision == earlier.modality("image").vision
    tower, instruct = (shop.recipes[stage].data.num_pictures for stage in shop.stages)
    assert instruct <= tower, "only these have features"


def test_from_nothing_every_stage_runs(tmp_path):
    shop = Workshop(FROM_NOTHING, tmp_path)
    assert shop.start is None
    assert shop.stages == STAGES
    assert shop.text.hidden_size == shop.projector.hidden_size


@pytest.mark.slow
def test_it_is_a_program_of_the_repositorys_root(repository, tmp_path):
    """As `make pebble` and `Workshop.train_together` start it."""
    command = [sys.executable, "-m", "pebble", "--work", str(tmp_path)]
    command += ["--stage", "3_align", "--processes", "1"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert "state.pt is missing: run stage 2_language first" in done.stderr
    assert not any(tmp_path.glob("*/state.pt"))


def test_no_more_processes_than_micro_batches_of_a_step(tmp_path, monkeypatch):
    started = []

    class Child:
        def __init__(self, command):
            started.append(command)

        def wait(self):
            return 0

    monkeypatch.setattr("pebble.run.subprocess.Popen", Child)
    Workshop(RECIPES / "larger", tmp_path).train_together("4_instruct", 2)
    assert [command[-4:] for command in started] == [["--processes", "1", "--rank", "0"]]

"""Pretraining of an encoder of events."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng

from lapilli.config.modalities import CategoricalFeature, EventsConfig, VectorConfig
from lapilli.errors import ConfigError, MediaError
from lapilli.modality import build_modality
from lapilli.modality.events import EventsModality
from lapilli.train.data.sampler import batches_of_similar_length
from lapilli.train.next_event import NextEventTask
from lapilli.train.recipe import OptimRecipe, RunRecipe, TrainerRecipe
from lapilli.train.trainer.loop import Task, TrainingError, train
from tests.train.conftest import steps_of


def modality(**changes) -> EventsModality:
    torch.manual_seed(0)
    config = EventsConfig(
        categorical=(
            CategoricalFeature(name="film", size=12, width=8),
            CategoricalFeature(name="genre", size=4, width=4, most=2),
        ),
        **{"hidden_size": 16, "num_heads": 2, "max_events": 6, "projector": "linear", **changes},
    )
    return build_modality("user", config, hidden_size=10)


def histories(count: int, seed: int = 0) -> list[dict]:
    """A film is followed by the next but one."""
    rng = default_rng(seed)
    made = []
    for length in rng.integers(2, 16, count):
        films = [int(rng.integers(1, 12))]
        while len(films) < length:
            films.append((films[-1] + 1) % 11 + 1)
        made.append({"film": films, "genre": [[1 + film % 3, 1] for film in films]})
    return made


def recipe(**run) -> TrainerRecipe:
    given = {"steps": 60, "batch_size": 8, "log_every": 1, "plot": False, **run}
    return TrainerRecipe(stage="events", optim=OptimRecipe(lr=0.01), run=RunRecipe(**given))


@pytest.mark.slow
def test_what_follows_is_learned(tmp_path):
    asked = recipe(gradient_accumulation_steps=2)
    task = NextEventTask(modality(dropout=0.1), histories(60), asked.run, histories(8, seed=1))
    assert isinstance(task, Task)
    before = task.evaluate()
    resting = [p.clone() for p in task.modality.projector.parameters()]
    train(task, asked, tmp_path)
    after = task.evaluate()
    assert before["eval_loss"] == pytest.approx(before["eval_film"] + before["eval_genre"])
    assert after["eval_film"] < 0.1 * before["eval_film"]
    assert all(map(torch.equal, task.modality.projector.parameters(), resting))
    known = task.modality.eval().prepare({"film": [2, 4], "genre": [[3, 1], [2, 1]]})
    state = task.modality.states([known])[0][-1:]
    assert int(task.modality.encoder.scores(state, 0).argmax()) == 6


def test_the_loss_of_a_step_is_that_of_all_its_events():
    task = NextEventTask(modality().eval(), histories(20), recipe(batch_size=5).run)
    batch, count = task.batch(3, 0)
    loss = task.loss(batch)
    assert count == sum(len(item.categories) - 1 for item in batch)
    torch.testing.assert_close(loss.total / count, task.modality.next_event_loss(batch))
    assert set(loss.parts) == {"film", "genre"}


def test_micro_batches_of_a_step_are_different_ones():
    task = NextEventTask(
        modality(), histories(30), recipe(batch_size=4, gradient_accumulation_steps=3).run
    )
    per_epoch = task.num_samples // 4
    places = [(step, micro) for step in range(per_epoch) for micro in range(3)][:per_epoch]
    seen = [id(item) for place in places for item in task.batch(*place)[0]]
    assert len(set(seen)) == len(seen) == per_epoch * 4


@pytest.mark.slow
def test_a_run_in_two_parts_makes_the_same_bits(tmp_path):
    def new() -> NextEventTask:
        return NextEventTask(modality(dropout=0.3), histories(20), recipe().run)

    whole, stopped, again = new(), new(), new()
    asked = recipe(steps=8, save_every=3)
    train(whole, asked, tmp_path / "whole")
    draw = stopped.batch
    stopped.batch = lambda step, micro: draw(step, micro) if step < 5 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(stopped, asked, tmp_path / "parts")
    train(again, asked, tmp_path / "parts")
    assert [one["step"] for one in steps_of(tmp_path / "parts")] == list(range(1, 9))
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))


def test_a_state_of_other_histories_is_refused(tmp_path):
    train(NextEventTask(modality(), histories(20), recipe().run), recipe(steps=1), tmp_path)
    other = NextEventTask(modality(), histories(21), recipe().run)
    with pytest.raises(TrainingError, match="histories"):
        train(other, recipe(steps=2), tmp_path)


@given(st.lists(st.integers(2, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=50)
def test_batches_have_similar_lengths(lengths, size, seed):
    size = min(size, len(lengths))
    batches = batches_of_similar_length(lengths, size, default_rng(seed))
    assert batches.shape == (len(lengths) // size, size)
    assert len(set(batches.flatten().tolist())) == batches.size
    if len(lengths) <= 50 * size:  # all are sorted together: no two batches overlap
        spans = sorted((min(row), max(row)) for row in ([lengths[i] for i in b] for b in batches))
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


@pytest.mark.parametrize(
    ("changes", "given_histories", "match"),
    [
        ({}, [{"film": [1]}], "none of 1 histories has a second event"),
        ({}, [], "none of 0 histories has a second event"),
        ({"max_events": 1}, [{"film": [1, 2]}], "user: max_events is 1"),
    ],
)
def test_nothing_to_predict(changes, given_histories, match):
    with pytest.raises(ConfigError, match=match):
        NextEventTask(modality(**changes), given_histories, recipe().run)


def test_what_is_no_history_or_no_encoder_of_events():
    with pytest.raises(MediaError, match="film is 99"):
        NextEventTask(modality(), [{"film": [1, 99]}], recipe().run)
    with pytest.raises(ConfigError, match="kind events, and 'item' is a VectorMod"):
        NextEventTask(
            build_modality("item", VectorConfig(width=2), hidden_size=4), histories(2), recipe().run
        )

"""User-LLM measured on generated films, at toy sizes: the same program as on MovieLens."""

import json
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch

from comparison import user_models
from comparison.baselines import SequenceOptions, next_item_ranks
from comparison.evaluation import Results, of_users, ranks_of
from comparison.film_tasks import EventStretches, draw_windows
from comparison.movies import generated_movies
from comparison.next_film import USER, Sizes, events_of
from comparison.user_models import (
    FUSIONS,
    LEARNS,
    Course,
    Options,
    encoder_scores,
    form_scores,
    learn_form,
    learn_parts,
    run_recipe,
)
from comparison.userllm import (
    compare,
    measure_encoder,
    measure_form,
    measure_popularity,
    measure_text,
)
from comparison.userllm_report import (
    PAGE,
    RESULT,
    SEQUENCE,
    TEXT,
    differences,
    page,
    table,
    targets,
)
from comparison.workers import Workers
from lapilli.config.modalities import modality_config
from lapilli.modality.events import EventsModality
from lapilli.rank.metrics import hit_rate, ndcg

SIZES = Sizes(width=16, inner=32, layers=2, heads=2, events=8, tokens=2, dropout=0.0)
TOY = Options(
    sizes=SIZES,
    sequence=SequenceOptions(width=16, layers=1, length=8, epochs=1),
    encoder_epochs=1.0,
    text_steps=2,
    fresh=Course(steps=2, lr=1e-3, batch=8, check=1),
    gentle=Course(steps=2, lr=1e-3, batch=8, check=1),
    item_steps=1,
)


@pytest.fixture(scope="module")
def movies():
    return generated_movies(30, 20)


@pytest.fixture(scope="module")
def parts(movies):
    return learn_parts(movies, TOY)


@pytest.mark.slow
def test_the_whole_program_writes_every_row(movies, tmp_path):
    path = tmp_path / "result.json"
    for _ in range(2):  # the second time finds everything done
        pool = Workers(0, tmp_path / "kept")
        results = Results(path, movies, (SEQUENCE, TEXT), name="toy", window=8, options=TOY.said())
        compare(results, pool, movies, TOY, seeds=2, requests=1)
        found = json.loads(path.read_text())
        written = {one: one.stat().st_mtime_ns for one in (tmp_path / "kept").iterdir()}
    assert written == {one: one.stat().st_mtime_ns for one in (tmp_path / "kept").iterdir()}
    forms = {f"user: {fusion}" for fusion in FUSIONS}
    assert {"popularity", TEXT, SEQUENCE, "HLLM", *forms} <= set(found["rows"])
    row = found["rows"]["user: tokens"]
    assert row["seeds"] == 2
    assert row["cost"]["positions"] == 2 + SIZES.tokens
    assert found["rows"]["user: cross-attention"]["cost"]["positions"] == 2
    assert row["cost"]["flops"] < found["rows"][TEXT]["cost"]["flops"]
    written = page(found)
    for name in found["rows"]:
        assert f"| {name} | {found['rows'][name]['test']['hit'][0]:.3f}" in table(found)
    assert table(found) in written
    assert differences(found, SEQUENCE) in written
    assert "| above popularity | " in targets(found)
    for one in found["rows"].values():
        one["test"] = {"hit": [0.5, 0.4, 0.6], "ndcg": [0.5, 0.4, 0.6]}
    assert [line.split("|")[4].strip() for line in targets(found).splitlines()[2:6]] == [
        *("no", "no", "no", "yes")
    ]


@pytest.mark.slow
def test_a_user_says_what_comes_next():
    """Nine of ten films are followed by the next but two, which popularity cannot know."""
    movies = generated_movies(80, 20, seed=1)
    course = Course(steps=80, lr=3e-3)
    gentle = Course(steps=20, lr=1e-4)
    options = replace(
        TOY, encoder_epochs=40.0, text_steps=200, text_check=50, fresh=course, gentle=gentle
    )
    parts = learn_parts(movies, options)
    found = {"text": measure_text(parts), "encoder": measure_encoder(parts)}
    found |= {fusion: measure_form(parts, fusion=fusion) for fusion in FUSIONS}
    popular = (measure_popularity(movies).test == 0).mean()
    for name, one in found.items():
        assert (one.test == 0).mean() > 3 * popular, name


@pytest.mark.parametrize("learns", LEARNS)
def test_what_rests_stays_as_it_was(parts, learns, monkeypatch):
    better = count(1.0)  # so that what is learned is kept
    monkeypatch.setattr(user_models, "validation_ndcg", lambda *_: next(better))
    before = parts.with_user("tokens", seed=0).model.state_dict()
    after = learn_form(parts, fusion="tokens", learns=learns).model
    moved = {
        "lora" if "lora_" in name else ".".join(name.split(".")[:3])
        for name, value in after.state_dict().items()
        if name not in before or not torch.equal(value, before[name])
    }
    expected = {"modalities.user.projector"}
    expected |= set() if learns == "projector" else {"modalities.user.encoder"}
    language = {name for name in moved if name.startswith("language_model")}
    assert moved - language - {"lora"} == expected
    assert bool(language) is (learns == "full")
    assert ("lora" in moved) is (learns == "lora")


def test_a_form_begins_as_its_encoder(parts, movies):
    loaded = parts.with_user("tokens", seed=3)
    known, events = movies.split.train, SIZES.events
    alone = encoder_scores(events_of(loaded.model), movies, events)(known)
    together = form_scores(loaded, movies, events)(known)
    np.testing.assert_array_equal(alone.argsort(axis=1), together.argsort(axis=1))


def test_a_form_that_learns_nothing_better_stays_as_it_began(parts, monkeypatch):
    said = iter([0.5, 0.4, 0.3, 0.4])  # before, after each of two steps, and what was kept
    monkeypatch.setattr(user_models, "validation_ndcg", lambda *_: next(said))
    before = parts.with_user("tokens", seed=0).model.state_dict()
    after = learn_form(parts, fusion="tokens").model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_epoch_holds_every_event_and_only_ties_change_places(movies):
    late = replace(movies.split.train, times=np.floor(movies.split.train.times / 2))
    movies = replace(movies, split=replace(movies.split, train=late))
    settings = SIZES.user(movies, projector="linear", attended=False)
    users = EventsModality(modality_config(USER, settings), name=USER, hidden_size=16)
    run = run_recipe(4, 1, 0)
    drawn = EventStretches(users, movies, run, SIZES.events)
    times = [
        dict(zip((late.history(n) + 1).tolist(), late.times[late.of_user(n)], strict=True))
        for n in range(len(late.user_ids))
    ]
    orders = set()
    for step in range(3 * drawn.steps_per_epoch):
        batch = drawn.batch(step)
        for window, watched in zip(batch.windows, batch.watched, strict=True):
            films = [*watched.tolist(), *window.categories[:, 0].tolist()]
            theirs = [[of[film] for film in films] for of in times if of.keys() >= set(films)]
            assert any(one == sorted(one) for one in theirs)
            orders.add(tuple(films[:4]))
        excluded = batch.excluded(movies.num_films + 1)
        lengths = [len(window.categories) - 1 for window in batch.windows]
        for rows, window, watched in zip(
            excluded.split(lengths), batch.windows, batch.watched, strict=True
        ):
            for at, row in enumerate(rows):
                seen = {*watched.tolist(), *window.categories[: at + 1, 0].tolist()}
                assert set(row.nonzero()[:, 0].tolist()) == seen
    assert len(orders) > len(late.user_ids)  # one a user without another order


def test_ranks_are_those_of_single_users_and_of_the_metrics(movies):
    split = movies.split
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(len(split.test.user_ids), movies.num_films))
    found = ranks_of(scores, split.before_test, split.test)
    rows = iter(scores)
    singly = next_item_ranks(lambda _: next(rows), split.before_test, split.test)
    np.testing.assert_array_equal(found, singly)
    for user, rank in enumerate(found):
        seen = split.before_test.history(user)
        left = np.setdiff1d(np.arange(movies.num_films), seen)
        relevance = (left == split.test.history(user)[0]).astype(float)
        figures = of_users(np.array([rank]))
        assert figures["hit"][0] == hit_rate(relevance, scores[user, left], 10)
        assert figures["ndcg"][0] == pytest.approx(ndcg(relevance, scores[user, left], 10))


def test_every_event_but_the_first_is_predicted_as_often():
    train = generated_movies(1, 80, seed=3).split.train
    rng, history = np.random.default_rng(0), train.history(0).tolist()
    counts = np.zeros(len(history))
    for window in draw_windows(train, 4000, 5, rng):
        start = history.index(window.films[0])
        assert history[start : start + len(window.films)] == window.films.tolist()
        counts[start + 1 : start + len(window.films)] += 1
    assert counts[0] == 0
    assert counts[1:].min() > 0.8 * counts[1:].max()


def test_the_page_is_that_of_the_result():
    assert PAGE.read_text("utf-8") == page(json.loads(RESULT.read_text("utf-8")))

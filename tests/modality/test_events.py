"""Histories of events as a modality."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.config.modalities import CategoricalFeature, EventsConfig
from lapilli.errors import ConfigError, MediaError
from lapilli.modality import Modality, build_modality
from lapilli.modality.events import EventsModality


def _modality(**changes) -> EventsModality:
    torch.manual_seed(0)
    options = {
        "categorical": (
            CategoricalFeature(name="film", size=20, width=6),
            CategoricalFeature(name="keys", size=4, width=2),  # a name that torch's dicts have
        ),
        "numeric": ("rating",),
        "hidden_size": 16,
        "num_heads": 2,
        "max_events": 5,
        "projector": "linear",
        **changes,
    }
    return build_modality("user", EventsConfig(**options), hidden_size=10).eval()


def _history(length: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "film": rng.integers(0, 20, length),
        "keys": rng.integers(0, 4, length).tolist(),
        "rating": rng.normal(size=length),
    }


def test_both_forms_are_the_same_history():
    modality = _modality()
    columns = modality.prepare({"film": [1, 2], "rating": [0.5, 3]})
    rows = modality.prepare([{"film": 1, "rating": 0.5}, {"film": 2, "rating": 3}])
    assert columns.categories.tolist() == rows.categories.tolist() == [[1, 0], [2, 0]]
    assert columns.numbers.tolist() == rows.numbers.tolist() == [[0.5], [3.0]]


def test_the_last_events_are_kept():
    item = _modality().prepare({"film": list(range(9))})
    assert item.categories[:, 0].tolist() == [4, 5, 6, 7, 8]


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from(["linear", "resampler3"])
)
def test_items_together_equal_items_alone(lengths, projector):
    modality = _modality(projector=projector)
    items = [modality.prepare(_history(n, seed)) for seed, n in enumerate(lengths)]
    together = modality.embed(items)
    for item, features in zip(items, together, strict=True):
        assert features.shape == (modality.num_tokens(item), 10)
        torch.testing.assert_close(features, modality.embed([item])[0], rtol=1e-4, atol=1e-5)


@given(st.integers(2, 5), st.integers(1, 4))
@settings(max_examples=20)
def test_no_event_looks_ahead(length, kept):
    modality, whole = _modality(), _history(length)
    kept = min(kept, length - 1)
    before = modality.prepare({name: values[:kept] for name, values in whole.items()})
    [first], [second] = modality.embed([before]), modality.embed([modality.prepare(whole)])
    torch.testing.assert_close(first, second[:kept], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(second[0], second[-1])


def test_the_next_event_is_learned():
    modality = _modality().train()
    items = [modality.prepare({"film": [1 + (s + i) % 6 for i in range(5)]}) for s in range(6)]
    optimizer = torch.optim.Adam(modality.encoder.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = modality.next_event_loss(items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    states = modality.states([modality.prepare({"film": [2, 3, 4]})])[0]
    assert int(modality.encoder.scores(states[-1:], 0).argmax()) == 5
    with pytest.raises(MediaError, match="no history has a second event"):
        modality.next_event_loss([modality.blank()])


def test_an_unknown_value_is_not_predicted():
    modality = _modality()
    known = modality.prepare({"film": [1, 2], "keys": [1, 0]})
    states = modality.states([known])[0]
    scores = modality.encoder.scores(states[:1], 0)
    alone = torch.nn.functional.cross_entropy(scores, torch.tensor([2]))
    torch.testing.assert_close(modality.next_event_loss([known]), alone)


def test_gradients_reach_tables_and_projector():
    modality = _modality()
    modality.embed([modality.prepare(_history(3))])[0].sum().backward()
    missing = [n for n, p in modality.named_parameters() if p.grad is None]
    assert all(name.startswith("encoder.heads.") for name in missing)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ("abc", r"user: expected \{feature: values\} or a list of events, got 'abc'"),
        ([], "user: the history has no event"),
        ({}, "user: the history has no event"),
        ({"film": []}, "user: the history has no event"),
        ({"movie": [1]}, "user: no feature is called 'movie', there are film, keys, rating"),
        ([{"film": 1, "year": 3}], "no feature is called 'year'"),
        ({"film": [1], "rating": [1, 2]}, "different lengths: film 1, rating 2"),
        ({"film": 3}, "'film' must be a list with a value for each event, got 3"),
        ({"film": [20]}, r"film is 20, expected a number from 0 \(unknown\) to 19"),
        ({"film": [-1]}, "film is -1"),
        ({"film": [1.5]}, "film is 1.5"),
        ({"film": [True]}, "film is True"),
        ({"film": ["x"]}, "film is 'x'"),
        ({"rating": ["x"]}, "rating is 'x', expected a number"),
        ({"rating": [10**400]}, "rating is 10000.*, expected a number"),
        ({"rating": [float("nan")]}, "rating is nan, expected a finite number"),
    ],
)
def test_refusals(raw, match):
    with pytest.raises(MediaError, match=match):
        _modality().prepare(raw)


def test_follows_the_protocol():
    assert isinstance(_modality(), Modality)


GENRES = CategoricalFeature(name="genres", size=6, width=3, most=3)


def test_several_values_of_an_event_are_read_as_their_mean():
    modality = _modality(categorical=(GENRES,), numeric=())
    encoder = modality.encoder
    item = modality.prepare({"genres": [[1, 4], 2, [], None, (5, 1, 3)]})
    assert item.categories.tolist() == [[1, 4, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0], [5, 1, 3]]
    read = []
    encoder.input_proj.register_forward_hook(lambda _m, given, _out: read.append(given[0][0]))
    modality.states([item])
    table = encoder.tables[0].weight
    means = [table[rows].mean(0) for rows in ([1, 4], [2], [0], [0], [5, 1, 3])]
    torch.testing.assert_close(read[0], torch.stack(means))
    order = (
        modality.prepare({"genres": [[4, 1]]}),
        modality.prepare({"genres": [torch.tensor([1, 4])]}),
    )
    torch.testing.assert_close(*(modality.embed([one])[0] for one in order))


def test_several_values_of_the_next_event_are_predicted_alike():
    modality = _modality(categorical=(GENRES,), numeric=())
    item = modality.prepare({"genres": [1, [2, 5], []]})
    logs = modality.encoder.scores(modality.states([item])[0], 0).log_softmax(-1)
    expected = -(logs[0, 2] + logs[0, 5]) / 2
    [found], count = modality.next_event_losses([item])
    assert count == 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ({"genres": [[1, 2, 3, 4]]}, "genres has 4 values in one event, and the model reads 3"),
        ({"genres": [[1, 6]]}, "genres is 6, expected a number from 0"),
        ({"genres": [[[1]]]}, r"genres is \[1\], expected a number"),
    ],
)
def test_values_of_an_event_that_are_none(raw, match):
    with pytest.raises(MediaError, match=match):
        _modality(categorical=(GENRES,), numeric=()).prepare(raw)


def test_a_feature_of_one_value_takes_no_list():
    with pytest.raises(MediaError, match=r"film is \[1\], expected a number"):
        _modality().prepare({"film": [[1]]})


@given(st.integers(1, 23))
@settings(max_examples=20)
def test_pieces_of_a_history_predict_every_event_once(length):
    modality = _modality()
    films = [1 + i % 19 for i in range(length)]
    pieces = modality.windows({"film": films})
    assert all(2 <= len(piece.categories) <= 5 for piece in pieces)
    assert [film for piece in pieces for film in piece.categories[1:, 0].tolist()] == films[1:]
    assert [piece.categories[0, 0].item() for piece in pieces] == films[:-1:4]


def test_dropout_is_of_training_alone():
    modality, plain = _modality(dropout=0.5), _modality()
    items = [modality.prepare(_history(4))]
    torch.testing.assert_close(modality.states(items)[0], plain.states(items)[0])
    modality.train()
    assert not torch.equal(modality.states(items)[0], modality.states(items)[0])
    assert torch.equal(plain.train().states(items)[0], plain.states(items)[0])


@pytest.mark.parametrize("length", [1, 2, 4])
def test_the_last_states_alone_are_handed_on(length):
    whole, last = _modality(), _modality(tokens=2)
    item = whole.prepare(_history(length))
    expected = whole.embed([item])[0][-2:]
    [found] = last.embed([item])
    torch.testing.assert_close(found, expected)
    assert last.num_tokens(item) == len(found) == min(2, length)


def test_more_last_states_than_events_are_read_are_refused():
    with pytest.raises(ConfigError, match="tokens is 6, expected 0 to 5"):
        _modality(tokens=6)


@pytest.mark.parametrize("projector", ["linear", "resampler3"])
def test_the_first_states_of_a_history_are_a_shorter_one(projector):
    modality = _modality(projector=projector, tokens=2)
    history = _history(5)
    [states] = modality.states([modality.prepare(history)])
    found = modality.project([states[:3], states, states[:1], states[:3]])
    for features, length in zip(found, (3, 5, 1, 3), strict=True):
        shorter = {name: values[:length] for name, values in history.items()}
        torch.testing.assert_close(features, modality.embed([modality.prepare(shorter)])[0])


def test_what_cannot_follow_is_left_out_of_the_loss():
    modality = _modality()
    item = modality.prepare({"film": [1, 2], "keys": [1, 0]})
    state, following = modality.states([item])[0][:1], torch.tensor([[2]])
    excluded = torch.zeros(1, modality.encoder.tables[0].num_embeddings, dtype=torch.bool)
    excluded[0, [0, 1]] = True
    left = modality.encoder.scores(state, 0)[:, 2:]
    expected = torch.nn.functional.cross_entropy(left, torch.tensor([0]))
    torch.testing.assert_close(
        modality.encoder.loss(state, following, 0, excluded=excluded), expected
    )

"""The whole comparison at toy sizes: every form learns, is asked, and stands on the page."""

import json
from dataclasses import replace

import pytest

from comparison import fusion
from comparison.albef import AlbefConfig
from comparison.forms import FormConfig
from comparison.fusion import FORMS, TOY, Measurement, SceneTask, build_model, make_splits
from comparison.fusion_report import page


@pytest.fixture(scope="module")
def splits():
    return make_splits(TOY)


@pytest.fixture
def small(monkeypatch):
    forms = {name: replace(config, width=32, heads=2, inner=48) for name, config in FORMS.items()}
    monkeypatch.setattr(fusion, "FORMS", forms)
    return forms


@pytest.mark.slow
def test_everything_is_measured_and_written(splits, small, tmp_path):
    result = tmp_path / "fusion.json"
    found = Measurement(TOY, splits, result, 1).measure([0, 1])
    assert json.loads(result.read_text()) == json.loads(json.dumps(found))
    assert set(found["rates"]) == set(FORMS)
    runs = found["runs"]
    assert len(runs) == 2 * len(FORMS)
    for run in runs.values():
        assert run["test"]["all"][1] == TOY.test * TOY.questions
        assert 0 <= run["retrieval"]["recall@1"] <= 1
    costs = found["requests"]["forms"]
    assert costs["tokens"]["positions"] == pytest.approx(costs["ALBEF"]["positions"] + 16)
    assert costs["soft prompt"]["positions"] == pytest.approx(costs["ALBEF"]["positions"] + 4)
    assert costs["ALBEF"]["flops, retrieval"] < costs["tokens"]["flops, retrieval"]
    text = page(found, {"rows": {"user: tokens": {"test": {"hit": [0.2, 0.1, 0.3]}}}})
    for name in FORMS:
        assert f"| {name} |" in text
    assert "user: tokens" in text


def test_rates_are_chosen_by_validation_and_nothing_is_run_twice(splits, tmp_path, monkeypatch):
    asked = []

    def pretend(name, _splits, _plan, seed, lr):
        asked.append((name, seed, lr))
        right = 9 if (lr == 1e-3) == (name == "tokens") else 1
        # The test split says the opposite, and must not be asked.
        return {
            "validation": {"all": [right, 10]},
            "test": {"all": [10 - right, 10]},
            "seconds": {},
        }

    monkeypatch.setattr(fusion, "run_once", pretend)
    monkeypatch.setattr(fusion, "request_costs", lambda *_: {})
    result = tmp_path / "fusion.json"
    found = Measurement(TOY, splits, result, 1, (1e-3, 2e-3)).measure([0, 1])
    assert found["rates"] == {name: 1e-3 if name == "tokens" else 2e-3 for name in FORMS}
    assert len(asked) == len(set(asked)) == 3 * len(FORMS)
    assert ("tokens", 1, 1e-3) in asked
    Measurement(TOY, splits, result, 1, (1e-3, 2e-3)).measure([0, 1])
    assert len(asked) == 3 * len(FORMS)
    Measurement(replace(TOY, batch=3), splits, result, 1, (1e-3,)).measure([0])
    assert len(asked) == 4 * len(FORMS)


def test_an_epoch_shows_every_scene_once_in_an_order_of_its_own(splits, small):
    task = SceneTask(build_model("tokens", splits, 0), splits, "captions", 4, seed=5)
    seen = [task.batch(step, 0)[0].features for step in range(8)]
    sums = [round(float(one.sum()), 3) for batch in seen for one in batch]
    assert sorted(sums[:16]) == sorted(sums[16:])
    assert sums[:16] != sums[16:]


def test_forms_have_nearly_the_same_number_of_parameters(splits):
    counts = [fusion.num_learned(build_model(name, splits, 0)) for name in FORMS]
    assert max(counts) / min(counts) < 1.1
    assert {type(config) for config in FORMS.values()} == {FormConfig, AlbefConfig}

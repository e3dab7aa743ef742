"""Rankers learn the same in several processes as in one."""

import pytest
import torch

from lapilli.train.build import add_modalities
from tests.modality.declared import DECLARED, tiny_language_model
from tests.train import cluster
from tests.train.conftest import steps_of


@pytest.mark.cluster
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["mixlm", "next item"])
def test_several_processes_learn_the_same(tmp_path, kind, sharding):
    plain = tiny_language_model(tmp_path / "plain")
    item = {"item": {**DECLARED["item"], "tokens": 1}}
    add_modalities(str(plain), tmp_path / "model", item)
    given = (str(tmp_path / "model"), kind)
    alone = cluster.run_ranking(None, tmp_path / "alone", "ddp", *given)
    answers = cluster.together(cluster.run_ranking, 2, tmp_path / "two", sharding, *given)
    for answer in answers:
        assert isinstance(answer, dict), answer
    expected, found = (
        [record["loss"] for record in steps_of(tmp_path / name / "run")]
        for name in ("alone", "two")
    )
    assert len(found) == 2
    assert found == pytest.approx(expected, abs=1e-5)
    for name, weight in alone.items():
        torch.testing.assert_close(answers[0][name], weight, atol=1e-4, rtol=0, msg=name)

import pytest

from lapilli.errors import DataError
from lapilli.prompt.template import TEMPLATES
from lapilli.train.data import SampleEncoder, open_dataset, to_sample
from lapilli.train.data.check import ImageChecker
from lapilli.train.data.show import rendered, tokenized
from lapilli.train.recipe import SourceRecipe
from tests.train.data.conftest import turns


def test_rendered_spans_are_the_turns_of_the_template(folder):
    dataset = open_dataset([SourceRecipe(path=str(folder / "data.json"))])
    spans = rendered(dataset.sample(2), TEMPLATES["vicuna_v1"])
    assert [s.text for s in spans if s.supervised] == [" The first.</s>", " Blue.</s>"]
    assert [s.text for s in spans if s.is_media] == ["<image>", "<image>"]


def test_tokenized_spans_are_the_tokens_of_the_model(folder, tokenizer, model):
    dataset = open_dataset([SourceRecipe(path=str(folder / "data.json"))])
    encoder = SampleEncoder(tokenizer, TEMPLATES["vicuna_v1"], model)
    spans = tokenized(dataset.sample(0), encoder, ImageChecker())
    assert [s.text for s in spans if s.is_media] == ["<image: 4 positions>"]
    learned = [s.text for s in spans if s.supervised]
    assert learned == [" A red square.</s>", " Yes.</s>"]
    assert spans[0].text.startswith("<s>")


def test_a_sample_that_cannot_be_shown_is_named(tmp_path, tokenizer, model):
    encoder = SampleEncoder(tokenizer, TEMPLATES["vicuna_v1"], model)
    lost = to_sample(
        {"id": "x", "image": str(tmp_path / "gone.png"), "conversations": turns("<image>", "A")},
        where="d.json:1",
    )
    with pytest.raises(DataError, match=r"d.json:1 \(id 'x'\): .*gone.png does not exist"):
        tokenized(lost, encoder, ImageChecker())
    twice = to_sample({"id": "y", "messages": [{"role": "user", "content": "Q"}] * 2}, where="w")
    with pytest.raises(DataError, match=r"w \(id 'y'\): message 1 is from user"):
        rendered(twice, TEMPLATES["vicuna_v1"])

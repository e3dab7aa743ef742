"""The modality of CONTRIBUTING.md: one file that is asked, batched and trained."""

import pytest
import torch

import lapilli
from lapilli.config.generation import SamplingParams
from lapilli.modality import Modality
from lapilli.prompt.message import MediaPart, Message, TextPart
from lapilli.train.data.encoder import SampleEncoder
from lapilli.train.data.sample import Sample
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import collate
from tests.checkpoint.published import make_llava
from tests.contributing import sample


@pytest.fixture
def sound(tmp_path):
    """The module of the page."""
    return sample("Add a modality", tmp_path)


def waveform(slices: int) -> list[float]:
    """A tone that is that many slices long."""
    return torch.sin(torch.arange(64 * slices) / 3).tolist()


def question(*waveforms: list[float]) -> Message:
    """A question about sounds."""
    media = [MediaPart(one, modality="sound") for one in waveforms]
    return Message("user", (*media, TextPart("What do you hear?")))


def test_it_follows_the_protocol_and_keeps_its_promise(sound):
    torch.manual_seed(0)
    modality = sound.Sound(6)
    assert isinstance(modality, Modality)
    items = [modality.prepare(waveform(n)) for n in (3, 1)]
    features = modality.embed(items)
    assert [len(one) for one in features] == [modality.num_tokens(item) for item in items] == [3, 1]
    for item, expected in zip(items, features, strict=True):
        torch.testing.assert_close(modality.embed([item])[0], expected)


def test_it_is_asked_and_trained_beside_pictures(sound, tmp_path):
    make_llava(tmp_path / "llava")
    chat = lapilli.load(str(tmp_path / "llava"), device="cpu", dtype="float32")
    model = chat.model
    model.modalities["sound"] = sound.Sound(model.language_model.config.hidden_size)
    params = SamplingParams(max_new_tokens=3)
    conversations = [[question(waveform(2))], [question(waveform(1), waveform(3))]]
    together = chat.batch(conversations, params)
    assert [one.text for one in together] == [chat.answer(c, params).text for c in conversations]
    template = chat.template
    encoder = SampleEncoder(chat.tokenizer, template, model)
    row = encoder.encode(Sample("0", (question(waveform(2)), Message.assistant("A tone.")), "here"))
    assert [span.modality for span in row.prompt.spans] == ["sound"]
    TrainedModel(model).train()(collate([row])).total.backward()
    weight = model.modalities["sound"].projector[0].weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0

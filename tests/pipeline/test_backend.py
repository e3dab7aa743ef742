"""The plain loop of a Chat: what it keeps between answers, and what it must not keep."""

import numpy as np
import pytest
import torch

import lapilli
from lapilli import Message, SamplingParams
from lapilli.pipeline import Chat

PICTURE = np.full((60, 60, 3), 200, dtype=np.uint8)
BEAMS = {"num_beams": 2, "max_new_tokens": 3}
FEW = {"max_new_tokens": 3}


@pytest.fixture
def chat() -> Chat:
    chat = lapilli.load("pebble", device="cpu", dtype="float32")
    chat._backend._without_media = ""  # questions without a picture go to the model
    return chat


def watch(monkeypatch: pytest.MonkeyPatch, module: torch.nn.Module, at: int) -> list[int]:
    """A list that grows by a size of the first argument of every pass."""
    seen: list[int] = []
    forward = module.forward

    def watched(x: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(x.shape[at])
        return forward(x, **options)

    monkeypatch.setattr(module, "forward", watched)
    return seen


def test_beams_encode_a_picture_once_per_version_of_the_weights(chat, monkeypatch):
    modality = chat.model.modalities["image"]
    tower = watch(monkeypatch, modality.vision_tower, 0)
    chat.ask("What is this?", PICTURE, **BEAMS)
    chat.ask("Where?", **BEAMS)
    chat.batch([[Message.user("Who?", PICTURE)]], SamplingParams(**BEAMS))
    assert len(tower) == 1
    with torch.no_grad():
        for parameter in modality.projector.parameters():
            parameter.mul_(1.5)
    chat.ask("Why?", **BEAMS)
    assert len(tower) == 2, "features of other weights were taken"
    fresh = chat.answer(chat.history[:-1], SamplingParams(**BEAMS))
    assert fresh.token_ids == chat.last.token_ids


@pytest.fixture
def plain(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """A chat whose language model reads rows of one length only, as those of other libraries."""
    monkeypatch.setattr(chat.model.language_model, "supports_varlen", False)
    return chat


def test_the_plain_loop_reads_only_the_new_turn(plain, monkeypatch):
    read = watch(monkeypatch, plain.model.language_model, 1)
    plain.ask("What is this?", **FEW)
    first, start = plain.last.prompt_len, len(read)
    assert read[0] == first
    plain.ask("Where?", **FEW)
    assert read[start] <= plain.last.prompt_len - first
    plain.reset()
    plain.ask("What is this?", **FEW)
    assert plain.last == plain.answer([Message.user("What is this?")], SamplingParams(**FEW))


def test_the_plain_loop_forgets_when_the_weights_change(plain, monkeypatch):
    plain.ask("What is this?", **FEW)
    with torch.no_grad():
        for parameter in plain.model.language_model.parameters():
            parameter.mul_(1.01)
    read = watch(monkeypatch, plain.model.language_model, 1)
    plain.ask("Where?", **FEW)
    assert read[0] == plain.last.prompt_len
    fresh = plain.answer(plain.history[:-1], SamplingParams(**FEW))
    assert fresh.token_ids == plain.last.token_ids


def test_a_cache_that_was_torn_by_an_interrupt_is_not_kept(plain, monkeypatch):
    pieces = plain.stream("What is this?", max_new_tokens=30)
    next(pieces)

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plain.model.language_model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
    assert plain.last.finish_reason == "cancelled"
    read = watch(monkeypatch, plain.model.language_model, 1)
    plain.ask("Go on", **FEW)
    assert read[0] == plain.last.prompt_len


def test_pictures_in_the_plain_loop(plain):
    plain.ask("What is this?", PICTURE, **FEW)
    plain.ask("Where?", **FEW)
    fresh = plain.answer(plain.history[:-1], SamplingParams(**FEW))
    assert fresh.token_ids == plain.last.token_ids

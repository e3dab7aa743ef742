"""The plain loop of a Chat: conversations, and the features that it keeps between answers."""

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


def test_a_conversation_without_the_engine(plain):
    plain.ask("What is this?", PICTURE, **FEW)
    plain.ask("Where?", **FEW)
    fresh = plain.answer(plain.history[:-1], SamplingParams(**FEW))
    assert fresh.token_ids == plain.last.token_ids

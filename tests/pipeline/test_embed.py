"""Embeddings: the mean of last states, each as if its input were the only one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lapilli
from lapilli import Chat, Message
from lapilli.errors import ContextTooLongError, MediaError, PromptError
from lapilli.pipeline.embed import Embedder

EXAMPLE = Path(__file__).parents[2] / "examples" / "picture.png"
PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return lapilli.load("pebble", device="cpu", dtype="float32")


@torch.inference_mode()
def mean_of_text(chat: Chat, text: str) -> torch.Tensor:
    ids = chat.tokenizer.encode(text)
    embeds = chat.model.language_model.embed(torch.tensor([ids]))
    places = torch.arange(len(ids))[None]
    hidden = chat.model.language_model(embeds, position_ids=places)[
        0, 1:
    ]  # without the first token of all texts
    return hidden.mean(dim=0) / hidden.mean(dim=0).norm()


def test_a_text_is_the_mean_of_its_states(chat):
    texts = ["a red boat", "two blue circles and a ring", "a"]
    found = chat.embed(texts)
    assert found.dtype == torch.float32
    assert found.shape == (3, 256)
    for vector, text in zip(found, texts, strict=True):
        torch.testing.assert_close(vector, mean_of_text(chat, text), atol=1e-5, rtol=0)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["a boat", "red", "</s>", "x" * 40]) | st.just(0), min_size=1),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 400),
)
def test_every_vector_is_that_of_its_input_alone(chat, drawn, max_tokens):
    inputs = [[PICTURE if one == 0 else one for one in some[:3]] for some in drawn]
    found = Embedder(chat, max_tokens=max_tokens).embed(inputs)
    for vector, one in zip(found, inputs, strict=True):
        torch.testing.assert_close(vector, chat.embed([one])[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(inputs)))


def test_pictures_are_seen(chat):
    said = "What is in this picture?"
    alone, picture, other, message = chat.embed(
        [said, [EXAMPLE, said], [PICTURE, said], [Message.user(said, str(EXAMPLE))]]
    )
    assert (alone - picture).abs().max() > 1e-3
    assert (other - picture).abs().max() > 1e-3
    assert (message - picture).abs().max() > 1e-3
    bare = chat.embed([EXAMPLE, PICTURE])
    assert (bare[0] - bare[1]).abs().max() > 1e-3


def test_no_inputs_are_no_vectors(chat):
    assert chat.embed([]).shape == (0, 256)


def test_what_cannot_be_embedded_is_refused(chat):
    for given_ in (["a", " "], [[]], [[1, 2]]):
        with pytest.raises(PromptError, match=r"input \d is"):
            chat.embed(given_)
    with pytest.raises(PromptError, match="inputs must be a list"):
        chat.embed("a text")
    with pytest.raises(ContextTooLongError, match="input 0 has"):
        chat.embed(["red " * 3000])
    with pytest.raises(MediaError):
        chat.embed([Path("nowhere.png")])

"""Texts as the last states of a language model of their own."""

from dataclasses import replace

import pytest
import torch

from lapilli.config.modalities import TextEncoderConfig
from lapilli.config.model import DecoderConfig
from lapilli.errors import ConfigError, MediaError
from lapilli.lm.decoder import Decoder
from lapilli.modality import Modality, build_modality
from lapilli.modality.text import PreparedText, TextModality, last_states, mean_states
from lapilli.store.encode import fingerprint

ENCODER = DecoderConfig(
    vocab_size=64,
    hidden_size=12,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=6,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
)


class Letters:
    """A tokenizer: BOS, and a token for every character."""

    def encode(self, text: str, literal=()) -> list[int]:
        assert literal == [(0, len(text))]
        return [1, *(ord(letter) % 62 + 2 for letter in text)]


def _modality(**changes) -> TextModality:
    torch.manual_seed(0)
    config = TextEncoderConfig(
        text_config=ENCODER, **{"tokens": 2, "projector": "linear", **changes}
    )
    modality = build_modality("item", config, hidden_size=10).eval()
    modality.tokenizer = Letters()
    return modality


def test_an_item_is_the_last_states_of_its_text():
    modality = _modality()
    item = modality.prepare("a thing")
    assert modality.num_tokens(item) == 2
    ids = item.ids[None]
    encoder = Decoder(replace(ENCODER, tie_embeddings=True))
    encoder.load_state_dict(modality.encoder.state_dict())
    states = encoder(encoder.embed(ids), position_ids=torch.arange(ids.shape[1])[None])
    expected = modality.projector(states[0, -2:])
    torch.testing.assert_close(modality.embed([item])[0], expected)


def test_items_together_equal_items_alone():
    modality = _modality()
    items = [modality.prepare(text) for text in ("short", "a much longer text", "mid one")]
    for item, features in zip(items, modality.embed(items), strict=True):
        assert features.shape == (2, 10)
        torch.testing.assert_close(features, modality.embed([item])[0], rtol=1e-4, atol=1e-5)
    assert modality.embed([]) == []


def test_more_than_the_encoder_has_positions_for_is_cut():
    assert len(_modality().prepare("x" * 500).ids) == ENCODER.max_positions


def test_last_states_are_those_of_every_text_alone():
    encoder = _modality().encoder
    texts = [PreparedText(torch.randint(2, 60, (length,))) for length in (2, 7, 3)]
    together = last_states(encoder, texts, 2)
    assert together.shape == (3, 2, ENCODER.hidden_size)
    for text, states in zip(texts, together, strict=True):
        positions = torch.arange(len(text.ids))[None]
        alone = encoder(encoder.embed(text.ids[None]), position_ids=positions)[0, -2:]
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)


def test_means_are_those_of_every_text_alone_and_leave_the_first_state_out():
    encoder = _modality().encoder
    texts = [PreparedText(torch.randint(2, 60, (length,))) for length in (2, 8, 3)]
    together = mean_states(encoder, texts, 2)
    assert together.shape == (3, 2, ENCODER.hidden_size)
    stretches = [[(0, 1), (1, 2)], [(1, 5), (5, 8)], [(1, 2), (2, 3)]]
    for text, means, bounds in zip(texts, together, stretches, strict=True):
        positions = torch.arange(len(text.ids))[None]
        states = encoder(encoder.embed(text.ids[None]), position_ids=positions)[0]
        alone = torch.stack([states[start:end].mean(0) for start, end in bounds])
        torch.testing.assert_close(means, alone, rtol=1e-4, atol=1e-5)


def test_a_modality_pools_as_its_setting_says_and_says_so_in_its_fingerprint():
    last, mean = _modality(), _modality(pool="mean")
    item = last.prepare("a long thing")
    expected = mean.projector(mean_states(mean.encoder, [item], 2))[0]
    torch.testing.assert_close(mean.embed([item])[0], expected)
    assert not torch.allclose(last.embed([item])[0], expected)
    assert fingerprint(last) != fingerprint(mean)
    with pytest.raises(ConfigError, match="pool is 'middle', expected last or mean"):
        _modality(pool="middle")


def test_the_encoder_has_no_output_layer():
    names = [name for name, _ in _modality().named_parameters()]
    assert not [name for name in names if "lm_head" in name]
    assert "encoder.model.embed_tokens.weight" in names


def test_a_long_text_is_cut_on_the_right():
    assert len(_modality(max_length=4).prepare("a much longer text").ids) == 4


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (3, "item: expected a text, got 3"),
        ("  ", "item: expected a text"),
        ("half \ud800", r"item: the text has '\\ud800' in it, which is no character"),
    ],
)
def test_refusals(raw, match):
    with pytest.raises(MediaError, match=match):
        _modality().prepare(raw)


def test_a_text_shorter_than_its_positions():
    with pytest.raises(MediaError, match="the text has 2 tokens, and the last 3 states are taken"):
        _modality(tokens=3).prepare("a")


def test_without_a_tokenizer():
    modality = _modality()
    modality.tokenizer = None
    with pytest.raises(MediaError, match="item: there is no tokenizer"):
        modality.prepare("a text")


def test_a_tokenizer_of_a_larger_vocabulary():
    modality = _modality()
    modality.tokenizer.encode = lambda text, literal: [70]
    with pytest.raises(MediaError, match="the token 70 has no row among the encoder's 64"):
        modality.prepare("a text")


def test_follows_the_protocol():
    assert isinstance(_modality(), Modality)

"""The table of language-model families: names, keys there and back, families from outside."""

from dataclasses import replace

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

import lapilli
from lapilli.config import families
from lapilli.config.families import (
    family_by_class,
    family_named,
    find_family,
    original_types,
    register,
    text_types,
)
from lapilli.config.families.decoder import DecoderFamily
from lapilli.config.huggingface import parse_config
from lapilli.config.model import DecoderConfig, RopeScaling
from lapilli.config.reader import KeyReader
from lapilli.errors import ConfigError, UnsupportedModelError
from tests.contributing import sample
from tests.integration.oracle import make_tokenizer

DECODERS = [name for name in text_types() if isinstance(find_family(name), DecoderFamily)]


@pytest.fixture
def table(monkeypatch):
    """The families, to be changed by a test."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))


def read(family: str, **keys: object) -> DecoderConfig:
    text = family_named(family).parse(KeyReader(keys, "config.json"))
    assert isinstance(text, DecoderConfig)
    return text


def test_every_name_belongs_to_one_family():
    assert len(original_types()) == len(text_types())
    for name in text_types():
        family = family_named(name)
        assert find_family(name) is find_family(family.original[0]) is family
        assert family_by_class(f"['{family.original[1]}']") is family


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("LlavaLlamaForCausalLM", "llama"),
        ("", "llama"),
        ("LlavaMistralForCausalLM", "mistral"),
        ("LlavaMPTForCausalLM", "mpt"),
        ("LlavaQwenForCausalLM", "qwen2"),
        ("LlavaQwen3ForCausalLM", "qwen3"),
        ("LlavaGemma3ForCausalLM", "gemma3_text"),
    ],
)
def test_old_files_tell_by_the_class(architecture, family):
    assert family_by_class(architecture).model_type == family


def test_an_unknown_family_is_named():
    with pytest.raises(UnsupportedModelError, match=r"type 'phi' is not supported, choose from g"):
        family_named("phi")
    with pytest.raises(UnsupportedModelError, match=r"type \['a'\] is not supported"):
        family_named(["a"])


@pytest.mark.parametrize("name", text_types())
def test_keys_come_back(name):
    family = family_named(name)
    text = family.parse(KeyReader({}, "config.json"))
    assert family.parse(KeyReader(family.write(text), "config.json")) == text


@pytest.mark.parametrize("name", DECODERS)
def test_what_a_family_has_no_key_for_is_not_lost(name):
    text = read(name)
    with pytest.raises(UnsupportedModelError, match=rf"{name} model has no key for qk_norm "):
        family_named(name).write(replace(text, qk_norm=not text.qk_norm))
    mpt = family_named("mpt").parse(KeyReader({}, "config.json"))
    with pytest.raises(UnsupportedModelError, match="a MptConfig is no"):
        family_named(name).write(mpt)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_layer_types_come_first(name):
    keys = {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    }
    text = read(name, **keys)
    assert [text.window(layer) for layer in range(3)] == [None, 8, None]
    with pytest.raises(ConfigError, match="layer_types must be a list of 4 names, one for every l"):
        read(name, **{**keys, "num_hidden_layers": 4})
    with pytest.raises(UnsupportedModelError, match="layer_types with 'chunked' is not supported"):
        read(name, **{**keys, "layer_types": ["full_attention", "chunked", "full_attention"]})


def test_gemmas_layers_alternate():
    assert read("gemma2", num_hidden_layers=4).full_layers == (1, 3)
    assert read("gemma3_text", num_hidden_layers=13).full_layers == (5, 11)
    assert read("gemma3_text", num_hidden_layers=4, sliding_window_pattern=2).full_layers == (1, 3)
    assert read("gemma2", sliding_window=None).window(0) is None
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention true"):
        read("gemma3_text", use_bidirectional_attention=True)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (1e6, None, 1e4)),
        ({"rope_theta": 5.0, "rope_local_base_freq": 6.0}, (5.0, None, 6.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, (1e6, "linear", 1e4)),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 7.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
                }
            },
            (7.0, "linear", 3.0),
        ),
    ],
)
def test_gemma3_has_positions_of_two_kinds(keys, expected):
    text = read("gemma3_text", **keys)
    scaling = None if text.rope_scaling is None else text.rope_scaling.kind
    assert (text.rope_theta, scaling, text.local_rope_theta) == expected


def test_scaled_local_positions_are_refused():
    local = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="sliding_attention with rope_type 'linear'"):
        read("gemma3_text", rope_parameters={"sliding_attention": local})


def test_null_switches_a_cap_off():
    text = read("gemma2", attn_logit_softcapping=None)
    assert (text.attention_softcap, text.logit_softcap) == (None, 30.0)


def test_both_spellings_of_a_scaling_are_read():
    """lapilli writes both, and strict_config refused the second."""
    scaling = RopeScaling(kind="linear", factor=2.0)
    written = family_named("llama").write(replace(read("llama"), rope_scaling=scaling))
    _, report = parse_config({"model_type": "llama", **written})
    assert report.unknown == ()


def test_the_family_of_contributing(table, tmp_path):
    """One file is all that it takes: to load, to write, to be named in both layouts."""
    del table
    family = register(sample("Add a language-model family", tmp_path).FAMILY)
    assert "gemma" in text_types()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
    oracle = GemmaForCausalLM(GemmaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2)).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    oracle.save_pretrained(tmp_path / "saved")
    make_tokenizer().save_pretrained(tmp_path / "saved")
    chat = lapilli.load(str(tmp_path / "saved"), device="cpu", dtype="float32", strict_config=True)
    model = chat.model.language_model
    ids = torch.arange(4, 24)[None]
    with torch.inference_mode():
        hidden = model(model.embed(ids), position_ids=torch.arange(20)[None])
        torch.testing.assert_close(model.logits(hidden), oracle(ids).logits, atol=1e-4, rtol=0)
    assert family.parse(KeyReader(family.write(model.config), "config.json")) == model.config
    assert original_types()["llava_gemma"] == "gemma"

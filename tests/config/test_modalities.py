"""What a config.json may declare, and what of it is refused."""

import json
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.config import modalities as table
from lapilli.config.generation import SamplingParams
from lapilli.config.huggingface import parse_config
from lapilli.config.modalities import (
    TextEncoderConfig,
    VectorConfig,
    modality_config,
    parse_modalities,
    register_kind,
    settings_of,
    write_modalities,
)
from lapilli.config.model import ModalityConfig
from lapilli.config.reader import KeyReader
from lapilli.errors import ConfigError, UnsupportedModelError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
EVENTS = {"kind": "events", "categorical": [{"name": "film", "size": 9, "width": 4}]}
VECTOR = {"kind": "vector", "width": 4}
TEXT = {"kind": "text", "text_config": LLAMA}


def parse(section):
    return parse_modalities(KeyReader({"lapilli_modalities": section}, "config.json"))


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setattr(table, "_KINDS", dict(table._KINDS))


projectors = st.sampled_from(["linear", "mlp1x_gelu", "mlp3x_gelu", "resampler4", "resampler2x2"])
vectors = st.fixed_dictionaries(
    {"kind": st.just("vector"), "width": st.integers(1, 99), "projector": projectors},
    optional={"tokens": st.just(1)},
)
feature = st.fixed_dictionaries(
    {
        "name": st.sampled_from("abcdef"),
        "size": st.integers(1, 99),
        "width": st.integers(1, 9),
        "most": st.integers(1, 6),
    }
)
events = st.fixed_dictionaries(
    {
        "kind": st.just("events"),
        "categorical": st.lists(feature, min_size=1, unique_by=lambda one: one["name"]),
    },
    optional={
        "numeric": st.sampled_from([[], ["rating"], ["rating", "age"]]),
        "hidden_size": st.sampled_from([8, 32]),
        "num_heads": st.sampled_from([1, 2, 4]),
        "max_events": st.integers(1, 50),
        "projector": projectors,
        "dropout": st.sampled_from([0.0, 0.25]),
    },
)


@given(st.dictionaries(st.sampled_from(["user", "item", "sound"]), vectors | events))
def test_what_is_written_is_read_back(section):
    declared = parse(section)
    assert [name for name, _ in declared] == list(section)
    for name, config in declared:
        written = settings_of(config)
        assert {key: written[key] for key in section[name]} == section[name]
    again = json.loads(json.dumps(write_modalities(declared)))
    assert parse(again.get("lapilli_modalities")) == declared


def test_an_encoder_of_texts_is_read_by_its_family():
    config = modality_config("item", {**TEXT, "tokens": 3})
    assert isinstance(config, TextEncoderConfig)
    assert (config.text_config.family, config.text_config.hidden_size) == ("llama", 16)
    assert modality_config("item", settings_of(config)) == config


def test_nothing_is_declared_without_the_key():
    config, keys = parse_config(LLAMA)
    assert config.modalities == ()
    assert "lapilli_modalities" not in keys.unknown
    assert write_modalities(()) == {}


def test_every_layout_declares():
    config, keys = parse_config({**LLAMA, "lapilli_modalities": {"user": VECTOR}})
    assert config.modalities == (("user", VectorConfig(width=4)),)
    assert not keys.unknown
    config, keys = parse_config(
        {**LLAMA, "model_type": "llava_llama", "lapilli_modalities": {"user": VECTOR}}
    )
    assert config.modalities == (("user", VectorConfig(width=4)),)
    assert not keys.unknown


@pytest.mark.parametrize(
    ("section", "match"),
    [
        (3, "lapilli_modalities must be an object, got 3"),
        ({"user": 3}, "lapilli_modalities.user must be an object, got 3"),
        ({"user": {}}, "lapilli_modalities.user.kind is missing, expected one of vector, events"),
        (
            {"user": {"kind": "vector"}},
            "lapilli_modalities.user.width is missing, expected a",
        ),
        (
            {"user": {**VECTOR, "wide": 1}},
            "lapilli_modalities.user has a key 'wide', which",
        ),
        (
            {"user": {**VECTOR, "width": "4"}},
            "lapilli_modalities.user.width must be a whole number",
        ),
        ({"user": {**VECTOR, "width": 0}}, "lapilli_modalities.user: width is 0, expected 1 to"),
        ({"user": {**VECTOR, "tokens": True}}, "user.tokens must be a whole number, got True"),
        ({"user": {**VECTOR, "projector": "wide"}}, "user: projector 'wide' is unknown: expected"),
        ({"user": {**VECTOR, "projector": "pool2x2_mlp2x_gelu"}}, "projector 'pool2x2_mlp2x_gelu'"),
        (
            {"user": {**VECTOR, "projector": "resampler4", "tokens": 2}},
            "tokens 2 needs a linear or mlpNx_gelu projector, found 'resampler4'",
        ),
        ({"user": {**EVENTS, "categorical": []}}, "user: categorical is empty"),
        ({"user": {**EVENTS, "categorical": 7}}, "user.categorical must be a list, got 7"),
        (
            {"user": {**EVENTS, "categorical": [{"name": "film", "size": 9}]}},
            r"user.categorical\[0\].width is missing",
        ),
        ({"user": {**EVENTS, "numeric": ["film"]}}, "the feature 'film' comes twice"),
        ({"user": {**EVENTS, "numeric": ["a b"]}}, "a feature is called 'a b'"),
        (
            {"user": {**EVENTS, "categorical": [{**EVENTS["categorical"][0], "most": 0}]}},
            "most of the feature 'film' is 0, expected 1 to 1024",
        ),
        ({"user": {**EVENTS, "dropout": 1.0}}, "dropout is 1.0, expected at least 0 and below 1"),
        ({"user": {**EVENTS, "num_heads": 3}}, "hidden_size 128 must be a multiple of twice"),
        ({"user": {**TEXT, "projector": "resampler2"}}, "sets the number of positions"),
        ({"user": {**TEXT, "max_length": 1, "tokens": 2}}, "max_length 1 is below tokens 2"),
        ({"a b": VECTOR}, "a modality is called 'a b': expected a word"),
        ({"_user": VECTOR}, "a modality is called '_user'"),
        ({"from": VECTOR}, "a modality is called 'from'"),
        ({"image": VECTOR}, "called 'image', which is the name of"),
        ({"text": VECTOR}, "called 'text', which is the name of"),
        ({"question": VECTOR}, "called 'question', which is the name of"),
    ],
)
def test_one_clear_error(section, match):
    with pytest.raises(ConfigError, match=match) as caught:
        parse_config({**LLAMA, "lapilli_modalities": section})
    assert str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_no_modality_is_called_like_a_sampling_option(name):
    with pytest.raises(ConfigError, match="the name of a sampling option"):
        parse({name: VECTOR})


def test_a_kind_that_nobody_registered():
    with pytest.raises(UnsupportedModelError, match="import the file that registers it") as caught:
        parse({"user": {"kind": "sound"}})
    assert "the kind 'sound' of a modality is unknown, there are events, text, vector" in str(
        caught.value
    )


@dataclass(frozen=True, kw_only=True)
class SoundConfig(ModalityConfig):
    kind: ClassVar[str] = "sound"
    window: int
    loud: bool = False
    gain: float = 1.0
    note: str | None = None


def test_a_kind_of_ones_own(kinds):
    register_kind(SoundConfig, lambda config, **_: None)
    found = modality_config("sound", {"kind": "sound", "window": 64, "gain": 2})
    assert found == SoundConfig(window=64, gain=2.0)
    assert settings_of(found) == {"kind": "sound", "window": 64, "loud": False, "gain": 2.0}
    with pytest.raises(ConfigError, match=r"sound\.loud must be true or false, got 1"):
        modality_config("sound", {"kind": "sound", "window": 64, "loud": 1})


@dataclass(frozen=True, kw_only=True)
class Mine(VectorConfig):
    kind: ClassVar[str] = "vector"


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (Mine, "the kind 'vector' is one of lapilli's own"),
        (dict, "describes no kind"),
        (ModalityConfig, "ModalityConfig names no kind"),
    ],
)
def test_what_is_no_kind(kinds, config, match):
    with pytest.raises(ConfigError, match=match):
        register_kind(config, lambda config, **_: None)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.floats()
    | st.sampled_from(["vector", "events", "text", "linear", "mlp0x_gelu", "llama", "x"])
)
KEYS = (
    *("kind", "width", "projector", "tokens", "categorical", "numeric", "hidden_size"),
    *("num_heads", "name", "size", "text_config", "model_type", "max_length", "max_events"),
)
keys = st.sampled_from(KEYS)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=12,
)
STARTS = (VECTOR, EVENTS, TEXT)


@given(
    st.sampled_from(STARTS), st.dictionaries(keys, anything, max_size=3), st.lists(keys, max_size=2)
)
def test_whatever_is_declared_is_read_or_refused_in_one_line(start, changes, missing):
    settings = {key: value for key, value in (start | changes).items() if key not in missing}
    refusal = ""
    try:
        [(_, config)] = parse({"user": settings})
    except ConfigError as error:
        refusal = str(error)
    else:
        assert modality_config("user", settings_of(config)) == config
    assert not refusal or refusal.startswith("config.json: ")
    assert "\n" not in refusal
    assert len(refusal) < 600

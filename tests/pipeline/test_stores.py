"""Stores of modalities: an id is its entry, and everything that does not fit is one error."""

import numpy as np
import pytest
import torch

import lapilli
from lapilli import Message
from lapilli.errors import ConfigError, MediaError, StoreError
from lapilli.prompt.message import MediaPart
from lapilli.rank import Ranker
from lapilli.store import Store, StoreWriter
from lapilli.store.encode import TextEncoder, build_store, encode_texts, fingerprint
from lapilli.train.build import add_modalities
from tests.modality.declared import DECLARED, tiny_language_model

TEXTS = ["a red square and more", "two blue circles", "three </s> lines"]
IDS = ["shoe", "hat", "7"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    plain = tiny_language_model(folder / "plain")
    trained = {"kind": "vector", "width": 3, "encoder": "e-1", "projector": "linear"}
    add_modalities(plain, folder / "model", {**DECLARED, "trained": trained})
    return folder / "model"


@pytest.fixture
def chat(checkpoint):
    return lapilli.load(str(checkpoint), device="cpu", dtype="float32")


def write(path, vectors, encoder="e-1", ids=IDS):
    with StoreWriter(path, encoder=encoder, dtype="float32") as writer:
        writer.add(ids, vectors)
    return path


def prompt(chat, **media):
    return chat.encode([Message.user("What next?", **media)])


def test_an_id_is_the_vectors_of_its_entry(chat, tmp_path):
    vectors = torch.randn(3, 2, 3)
    chat.stores["vec"] = write(tmp_path / "s", vectors)
    for one, entry in (("shoe", vectors[0]), (7, vectors[2]), (np.int64(7), vectors[2])):
        found, expected = prompt(chat, vec=one), prompt(chat, vec=entry)
        assert found.encoded == expected.encoded
        assert torch.equal(found.media[0].values, expected.media[0].values)
    several = prompt(chat, vec=["hat", "shoe"])
    assert torch.equal(several.media[0].values, torch.cat([vectors[1], vectors[0]]))
    mixed = prompt(chat, vec=[7, "shoe"])
    assert torch.equal(mixed.media[0].values, torch.cat([vectors[2], vectors[0]]))
    given = prompt(chat, vec=[1.0, 0.0, 2.0]).media[0].values
    assert torch.equal(given, torch.tensor([[1.0, 0, 2]]))
    with pytest.raises(StoreError, match=r"vec: .* has no entry for '1'"):
        prompt(chat, vec=[1, 0, 2])
    sampling = {"temperature": 0.0, "max_new_tokens": 4}
    assert chat.ask("What next?", vec="hat", **sampling) == chat.ask(
        "What next?", vec=vectors[1], **sampling
    )
    del chat.stores["vec"]
    with pytest.raises(MediaError, match="vec: 'hat' is no vector, and as an id it needs a store"):
        prompt(chat, vec="hat")


def test_stores_are_given_while_loading(checkpoint, tmp_path):
    path = write(tmp_path / "s", torch.randn(3, 3))
    chat = lapilli.load(str(checkpoint), device="cpu", stores={"vec": path, "trained": str(path)})
    assert sorted(chat.stores) == ["trained", "vec"]
    assert len(prompt(chat, vec="shoe", trained=7).media) == 2


def test_items_of_a_ranking_are_ids(chat, tmp_path):
    vectors = torch.randn(3, 3)
    chat.stores["vec"] = write(tmp_path / "s", vectors)
    ranker = Ranker(chat, template="{query} yes or no? {item}")
    by_id = ranker.score("a boat", [MediaPart(one, "vec") for one in IDS])
    by_vector = ranker.score("a boat", [MediaPart(vector, "vec") for vector in vectors])
    assert torch.equal(by_id, by_vector)
    mixed = ranker.score("a boat", [["it is", MediaPart("hat", "vec")], "a text"])
    assert len(mixed) == 2


def test_caches_follow_an_entry_that_changed(chat, tmp_path):
    path = write(tmp_path / "s", torch.randn(3, 2, 48), fingerprint(chat.model.modality("item")))
    chat.stores["item"] = path
    ranker = Ranker(chat, template="{query} yes or no? {item}")
    query = [Message("user", (MediaPart("hat", "item"),))]
    question = [Message.user("What next? " * 20, item="hat")]
    before = ranker.score(query, ["a boat"]), chat.answer(question)
    kept = ranker.prefixes.stats.hits
    assert torch.equal(ranker.score(query, ["a boat"]), before[0])
    assert ranker.prefixes.stats.hits == kept + 1
    fresh = torch.randn(1, 2, 48) * 9
    write(path, fresh, fingerprint(chat.model.modality("item")), ids=["hat"])
    assert torch.equal(ranker.score(query, ["a boat"]), before[0])  # as it was opened
    assert chat.stores["item"].reload()
    given = [Message("user", (MediaPart(fresh[0], "item"),))]
    del chat.stores["item"]
    with pytest.raises(MediaError, match="item: expected a text"):
        chat.encode(given)  # a modality of texts reads no vectors
    chat.stores["item"] = path
    after = ranker.score(query, ["a boat"])
    assert not torch.allclose(after, before[0])
    assert ranker.prefixes.stats.hits == kept + 2  # the second score of the old entry
    chat.engine.reset_cache()
    alone = Ranker(chat, template="{query} yes or no? {item}").score(query, ["a boat"])
    assert torch.equal(after, alone)
    [features] = chat.encode(question).media
    torch.testing.assert_close(features, fresh[0])


def test_an_answer_follows_an_entry_that_changed(chat, tmp_path):
    path = write(tmp_path / "s", torch.randn(3, 3))
    chat.stores["vec"] = path
    question = [Message.user("What next? " * 20, vec="hat")]
    first = chat.answer(question)
    write(path, torch.full((1, 3), 30.0), ids=["hat"])
    assert chat.stores["vec"].reload()
    warm = chat.answer(question)
    chat.engine.reset_cache()
    assert warm.token_ids == chat.answer(question).token_ids
    assert warm.token_ids != first.token_ids


def test_a_text_modality_and_its_store_stand_for_the_same(chat, tmp_path):
    encoder = TextEncoder(chat.model, chat.tokenizer, modality="item")
    items = list(zip(IDS, TEXTS, strict=True))
    assert build_store(tmp_path / "s", items, encoder, dtype="float32") == 3
    assert build_store(tmp_path / "s", items, encoder) == 0
    modality = chat.model.modality("item")
    store = Store.open(tmp_path / "s", encoder=fingerprint(modality))
    assert (store.tokens, store.width) == (2, 48)
    prepared = [modality.prepare(text) for text in TEXTS]
    with torch.inference_mode():
        expected = torch.stack(modality.embed(prepared))
    torch.testing.assert_close(store.get(IDS), expected, rtol=1e-5, atol=1e-5)
    ranker = Ranker(chat, template="{query} yes or no? {item}")
    by_text = ranker.score("a boat", [MediaPart(text, "item") for text in TEXTS])
    chat.stores["item"] = store
    by_id = ranker.score("a boat", [MediaPart(one, "item") for one in IDS])
    torch.testing.assert_close(by_id, by_text, rtol=1e-5, atol=1e-5)
    with pytest.raises(StoreError, match=r"item: .* has no entry for 'two blue circles'"):
        prompt(chat, item="two blue circles")


def test_states_of_an_encoder_are_the_same_in_both_places(chat):
    """One function: a language model's states, and those of a modality that is this model."""
    from lapilli.config.modalities import TextEncoderConfig
    from lapilli.modality.text import TextModality

    config = TextEncoderConfig(text_config=chat.config.text, tokens=2)
    modality = TextModality(config, name="item", hidden_size=48).eval()
    weights = chat.model.language_model.state_dict()
    modality.encoder.load_state_dict({k: v for k, v in weights.items() if "lm_head" not in k})
    modality.tokenizer = chat.tokenizer
    expected = encode_texts(chat.model, chat.tokenizer, TEXTS, tokens=2)
    with torch.inference_mode():
        found = torch.stack(modality.embed([modality.prepare(text) for text in TEXTS]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "shape", "encoder", "says"),
    [
        ("nobody", (3, 3), "e-1", "a store is given for 'nobody': expected a modality that"),
        ("image", (3, 3), "e-1", "a store is given for 'image': expected a modality that"),
        ("vec", (3, 4), "e-1", "has entries of 1 x 4, and the modality 'vec' takes any number of"),
        ("user", (3, 3), "e-1", "has entries of 1 x 3, and the modality 'user' takes any .* x 48"),
        ("item", (3, 48), "e-1", "has entries of 1 x 48, and the modality 'item' takes 2 x 48"),
        (
            "trained",
            (3, 3),
            "e-2",
            "every entry was made by another encoder: expected 'e-1', found 'e-2'",
        ),
        ("item", (3, 2, 48), "e-1", "made by another encoder: expected 'sha256:.*', found 'e-1'"),
    ],
)
def test_stores_that_do_not_fit(chat, tmp_path, name, shape, encoder, says):
    path = write(tmp_path / "s", torch.randn(shape), encoder)
    with pytest.raises((ConfigError, StoreError), match=says):
        chat.stores[name] = Store.open(path)
    assert name not in chat.stores


def test_what_is_no_store(chat, tmp_path):
    with pytest.raises(ConfigError, match="the store of 'vec' is 3: expected a Store or a path"):
        chat.stores["vec"] = 3
    with pytest.raises(StoreError, match="is not there: expected a store"):
        chat.stores["vec"] = tmp_path / "nothing"


def test_ids_that_cannot_be_looked_up(chat, tmp_path):
    path = write(tmp_path / "s", torch.randn(3, 3))
    write(path, torch.randn(1, 3), "e-2", ids=["old"])
    chat.stores["trained"] = Store.open(path)
    with pytest.raises(StoreError, match=r"trained: .* has no entry for 'boot' \(it has 4 entries"):
        prompt(chat, trained="boot")
    with pytest.raises(StoreError, match=r"trained: .* id 'old' was made by another encoder: exp"):
        prompt(chat, trained="old")
    with pytest.raises(StoreError, match=r"trained: .* has no entry for 'boot'"):
        prompt(chat, trained=["shoe", "boot"])
    with pytest.raises(MediaError, match=r"trained: expected \[n, 3\]"):
        prompt(chat, trained=[])
    with pytest.raises(MediaError, match="trained"):
        prompt(chat, trained=True)
    [(number, error)] = chat.as_completed([[Message.user("?", trained="boot")]])
    assert number == 0
    assert isinstance(error, StoreError)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modality": "vec"}, "modality 'vec' reads no texts: expected one of kind 'text'"),
        ({"modality": "item", "tokens": 1}, "tokens is 1, and modality 'item' has 2: leave it out"),
        ({"modality": "item", "max_length": 9}, "max_length is 9, and modality 'item' has 2048"),
        ({"modality": "nobody"}, "the model has no modality 'nobody'; it has: "),
    ],
)
def test_encoders_that_do_not_fit(chat, options, says):
    with pytest.raises(ConfigError, match=says):
        TextEncoder(chat.model, chat.tokenizer, **options)


def test_a_short_text_is_named_by_its_id(chat, tmp_path):
    for name, options in (("a", {"modality": "item"}), ("b", {"tokens": 9})):
        encoder = TextEncoder(chat.model, chat.tokenizer, **options)
        chat.model.modality("item").tokenizer = _One()
        with pytest.raises(lapilli.PromptError, match=r"item 'x' \('a'\)"):
            build_store(tmp_path / name, [("x", "a")], encoder)


class _One:
    def encode(self, text, literal=()):
        return [1]

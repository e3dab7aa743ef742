"""Questions with media of declared modalities: named, in any order, alone and in batches."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lapilli
from lapilli import Message, SamplingParams
from lapilli.errors import (
    GenerationError,
    MediaCountMismatchError,
    MediaError,
    PromptError,
    UnsupportedModelError,
)
from lapilli.pipeline import Chat
from lapilli.prompt.jinja import JinjaTemplate
from lapilli.prompt.message import MediaPart, TextPart
from lapilli.prompt.template import MediaSlot
from lapilli.train.build import add_modalities
from tests.modality.declared import DECLARED, tiny_language_model

PICTURE = np.full((60, 60, 3), 200, dtype=np.uint8)
HISTORY = {"film": [1, 2, 3], "genre": [1, 1, 2], "rating": [1, 0.5, 2]}
OTHER = {"film": [9, 8], "rating": [0, 0]}
VECTOR = [0.1, -0.2, 0.3]
MEDIA = {"image": PICTURE, "user": HISTORY, "item": "A film about a boat.", "vec": VECTOR}
FEW = SamplingParams(max_new_tokens=4)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Chat:
    folder = tmp_path_factory.mktemp("mixed") / "llava"
    add_modalities("pebble", folder, DECLARED)
    return lapilli.load(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Chat:
    """A language model that sees no picture."""
    root = tmp_path_factory.mktemp("plain")
    add_modalities(str(tiny_language_model(root / "base")), root / "declared", DECLARED)
    return lapilli.load(str(root / "declared"), device="cpu", dtype="float32")


def question(names: list[str]) -> list[Message]:
    parts = [MediaPart(MEDIA[name], name) for name in names]
    return [Message("user", (*parts, TextPart("What is it?")))]


def test_a_medium_is_named_like_its_modality(chat):
    given = chat.ask("What is it?", PICTURE, user=HISTORY, vec=VECTOR, max_new_tokens=4)
    asked = chat.history[0]
    assert [part.modality for part in asked.media] == ["image", "user", "vec"]
    assert asked == Message.user("What is it?", PICTURE, user=HISTORY, vec=VECTOR)
    said = chat.answer([asked], FEW)
    assert said.text.strip() == given


def test_a_question_without_media_follows_the_one_before(plain):
    plain.ask("What is it?", user=HISTORY, max_new_tokens=3)
    plain.ask("And now?", max_new_tokens=3)
    assert len(plain.history) == 4
    plain.ask("Another?", vec=VECTOR, max_new_tokens=3)
    assert len(plain.history) == 2
    plain.ask("Both?", vec=VECTOR, keep=True, max_new_tokens=3)
    assert len(plain.history) == 4


orders = st.lists(st.sampled_from(list(MEDIA)), max_size=3)


@settings(max_examples=12)
@given(st.lists(orders, min_size=1, max_size=3))
def test_mixed_prompts_alone_in_batches_and_in_the_engine(chat, rows):
    conversations = [question(names) for names in rows]
    together = [answer.token_ids for answer in chat.batch(conversations, FEW)]
    alone = [chat.answer(conversation, FEW).token_ids for conversation in conversations]
    assert together == alone
    prompts = [chat.encode(conversation) for conversation in conversations]
    reference = chat._backend._generate_plain(
        [chat._backend._request(prompt, chat._params(FEW)) for prompt in prompts]
    )
    fixed = [chat._backend._fixed(prompt, FEW) for prompt in prompts]
    for answer, expected, known in zip(together, reference, fixed, strict=True):
        assert answer == (expected.token_ids if known is None else known.token_ids)


@settings(max_examples=10)
@given(orders)
def test_spans_are_as_long_as_their_features(chat, names):
    prompt = chat.encode(question(names))
    assert [span.modality for span in prompt.encoded.spans] == names
    lengths = {"image": 64, "user": 3, "item": 2, "vec": 2}
    assert [span.length for span in prompt.encoded.spans] == [lengths[name] for name in names]


def test_two_users_with_the_same_text_share_no_block(plain):
    """What is cached is found again by the content that was injected, not by the ids alone."""
    one, other = (
        [Message.user("What next? " * 20, user={"film": films, "rating": [0, 0, 1]})]
        for films in ([1, 2, 3], [4, 5, 6])
    )
    alone = {}
    for asked, name in ((one, "one"), (other, "other")):
        plain.engine.reset_cache()
        alone[name] = plain.answer(asked, FEW)
    plain.engine.reset_cache()
    first = plain.answer(one, FEW)
    before = plain.engine.prefix_stats.cached_tokens
    second = plain.answer(other, FEW)
    span = plain.encode(other).encoded.spans[0]
    assert plain.encode(one).encoded.input_ids == plain.encode(other).encoded.input_ids
    # Nothing behind the beginning of the medium is found again.
    assert plain.engine.prefix_stats.cached_tokens - before <= span.start
    assert (first.token_ids, second.token_ids) == (alone["one"].token_ids, alone["other"].token_ids)
    plain.answer(other, FEW)
    assert plain.engine.prefix_stats.cached_tokens - before > span.start + span.length


def test_many_threads_ask_with_their_own_user(plain):
    histories = [{"film": [i, i + 1], "rating": [i, 0]} for i in range(8)]
    asked = [[Message.user("What next?", user=one)] for one in histories]
    alone = [plain.answer(one, FEW).token_ids for one in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: plain.answer(one, FEW).token_ids, asked * 2))
    assert together == alone * 2
    assert len(set(alone)) > 1


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packed_it_answers(plain, quantize):
    packed = lapilli.load(str(plain._loaded.path), device="cpu", quantize=quantize)
    media = {"user": HISTORY, "item": MEDIA["item"], "vec": VECTOR}
    alone = packed.answer([Message.user("What?", **media)], FEW)
    [again, _] = packed.batch([[Message.user("What?", **media)], [Message.user("Hi")]], FEW)
    assert again.token_ids == alone.token_ids
    features = packed.model.modality("vec").embed([packed.model.modality("vec").prepare(VECTOR)])
    expected = plain.model.modality("vec").embed([plain.model.modality("vec").prepare(VECTOR)])
    torch.testing.assert_close(features[0].float(), expected[0], rtol=0.02, atol=0.02)


PARTS = """{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}{% if p['type'] == \
'text' %}{{ p['text'] }}{% elif p['type'] == 'image' %}<image>{% endif %}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"""
STRING = """{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}\
{% if add_generation_prompt %}<bot>{% endif %}"""


@pytest.mark.parametrize("source", [PARTS, STRING], ids=["parts", "string"])
def test_chat_templates_of_language_models_keep_the_place(source):
    template = JinjaTemplate(source)
    segments = template.render([Message.user("Well?", "picture", user=HISTORY, vec=VECTOR)])
    slots = [segment.modality for segment in segments if isinstance(segment, MediaSlot)]
    assert slots == ["image", "user", "vec"]
    text = "".join(getattr(segment, "text", "|") for segment in segments)
    assert text.replace("\n", "") == "<user>|||Well?<bot>"


def test_a_chat_template_that_loses_a_medium():
    lossy = "{% for m in messages %}{{ m['content'].split(']')[-1] }}{% endfor %}"
    with pytest.raises(PromptError, match="writes the medium 'user' 0 times instead of once"):
        JinjaTemplate(lossy).render([Message("user", (MediaPart(HISTORY, "user"),))])


def test_several_placeholders_in_a_text():
    message = Message.from_placeholders(
        "user",
        "<user>\nSaw <item> and <item>. <image>?",
        ["p"],
        media={"user": [1], "item": [2, 3]},
    )
    assert [(part.modality, part.source) for part in message.media] == [
        ("user", 1),
        ("item", 2),
        ("item", 3),
        ("image", "p"),
    ]
    assert message.written == ("", "\nSaw ", " and ", ". ", "?")
    assert message.text == "Saw  and . ?"


@pytest.mark.parametrize(
    ("text", "media", "match"),
    [
        ("<user>", {"user": []}, "the text has 1 <user> but 0 sources"),
        ("none", {"user": [1]}, "the text has 0 <user> but 1 sources"),
        ("<item> <item>", {"item": [1]}, "the text has 2 <item> but 1 sources"),
    ],
)
def test_placeholders_and_sources_differ(text, media, match):
    with pytest.raises(MediaCountMismatchError, match=match):
        Message.from_placeholders("user", text, [], media=media)


def test_a_placeholder_of_no_given_modality_stays_text():
    assert Message.from_placeholders("user", "<user>?", []).text == "<user>?"


@pytest.mark.parametrize(
    ("media", "error", "match"),
    [
        ({"vec": [1.0, 2.0]}, MediaError, r"vec: expected \[n, 3\] or \[3\] numbers"),
        ({"vec": [1.0, float("nan"), 2.0]}, MediaError, "vec: the vectors contain NaN or infinity"),
        ({"vec": [1.0, float("inf"), 2.0]}, MediaError, "vec: the vectors contain NaN or infinity"),
        ({"vec": "a.png"}, MediaError, "vec: 'a.png' is no vector, and as an id it needs a store"),
        ({"user": {"movie": [1]}}, MediaError, "user: no feature is called 'movie'"),
        ({"item": 7}, MediaError, "item: expected a text, got 7"),
        ({"uzer": HISTORY}, GenerationError, "unknown sampling option uzer"),
    ],
)
def test_one_clear_error(plain, media, error, match):
    with pytest.raises(error, match=match):
        plain.ask("What?", max_new_tokens=2, **media)


def test_a_modality_that_the_model_does_not_have(plain):
    with pytest.raises(UnsupportedModelError, match="cannot take the medium sound, it reads"):
        plain.answer([Message.user("What?", sound=[1.0])], FEW)
    with pytest.raises(UnsupportedModelError, match="cannot take an image, it reads user, item"):
        plain.ask("What?", PICTURE)


def test_questions_may_be_messages(plain):
    message = Message.user("What?", vec=VECTOR)
    first, second = plain.ask_many(["Hi", message], max_new_tokens=3)
    assert second == plain.answer([message], SamplingParams(max_new_tokens=3)).text.strip()
    assert isinstance(first, str)

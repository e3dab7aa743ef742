"""Media beside the sequence on every way: plain loop, beams, engine, ranking, training."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.config.generation import SamplingParams
from lapilli.config.model import ProjectorConfig
from lapilli.errors import FusionError, PromptError, RequestError, UnsupportedModelError
from lapilli.generate.engine import Engine, Request
from lapilli.generate.engine.sequence import position_keys
from lapilli.generate.reference import generate
from lapilli.lm.decoder import Decoder
from lapilli.modality.vector import PreparedVectors, VectorModality
from lapilli.model import VisionLanguageModel
from lapilli.pipeline import ProcessedPrompt
from lapilli.pipeline.scorer import SuffixScorer
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import collate, collate_packed
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import CONFIG, SMALL, VOCABULARY, WIDTH, alone, picture

LAYERS = replace(CONFIG, num_layers=4)


def build(every: int | None = 2) -> VisionLanguageModel:
    torch.manual_seed(5)
    language_model = Decoder(LAYERS)
    if every is not None:
        language_model.add_cross_attention(every)
    config = ProjectorConfig(kind="linear", vision_size=3, hidden_size=WIDTH)
    modalities = {name: VectorModality(config, name=name) for name in ("user", "vector")}
    model = VisionLanguageModel(language_model, modalities, attended=["user"] if every else [])
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
        elif name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 0.8)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return build()


class User(PreparedVectors):
    """A medium that stands beside the sequence."""


def user(number: int, length: int = 2) -> User:
    return User(picture(number, length).values)


def prompt_of(parts) -> ProcessedPrompt:
    ids: list[int] = []
    spans, media = [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        name, length = ("user", 0) if isinstance(part, User) else ("vector", len(part.values))
        spans.append(Span(0, len(ids), length, name))
        media.append(part)
        ids += [PLACEHOLDER] * length
    return ProcessedPrompt(EncodedPrompt(ids, [False] * len(ids), tuple(spans)), tuple(media))


def request_of(parts, **options) -> Request:
    prompt = prompt_of(parts)
    params = SamplingParams.from_options(**{"max_new_tokens": 6, **options})
    return Request(prompt.encoded, prompt.media, params)


def engine_of(model: VisionLanguageModel, **options) -> Engine:
    return Engine(model, WordTokenizer(), eos_ids=(), options=replace(SMALL, **options))


PARTS = st.lists(
    st.integers(1, VOCABULARY - 1)
    | st.builds(user, st.integers(0, 3), st.integers(1, 3))
    | st.builds(picture, st.integers(0, 3), st.integers(1, 3)),
    min_size=1,
    max_size=20,
).filter(lambda parts: any(not isinstance(part, User) for part in parts))


def test_rows_of_a_batch_are_what_they_are_alone(model):
    rows = [[3, user(1), 4, 5], [7, 8, 9, 10, 11, 12], [user(2, 3), 5, picture(1), user(1), 6]]
    prompts = [prompt_of(parts) for parts in rows]
    params = SamplingParams(max_new_tokens=6)
    with torch.inference_mode():
        batch = model.embed_prompts([p.encoded for p in prompts], [p.media for p in prompts])
        hidden = model(batch)
        for row, prompt in enumerate(prompts):
            one = model(model.embed_prompts([prompt.encoded], [prompt.media]))
            torch.testing.assert_close(
                hidden[row : row + 1, -one.shape[1] :], one, atol=2e-5, rtol=1e-4
            )
    answers = generate(model, batch, params, tokenizer=WordTokenizer(), eos_ids=())
    for parts, answer in zip(rows, answers, strict=True):
        request = request_of(parts)
        assert answer.token_ids == alone(model, request).token_ids


def test_a_row_without_media_is_the_language_model(model):
    plain = build(every=None)
    plain.load_state_dict(model.state_dict(), strict=False)
    prompt = prompt_of([3, 4, picture(1), 5, 6])
    both = [one(one.embed_prompts([prompt.encoded], [prompt.media])) for one in (model, plain)]
    assert torch.equal(*both)
    beside = prompt_of([user(1), 3])
    batch = model.embed_prompts([prompt.encoded, beside.encoded], [prompt.media, beside.media])
    torch.testing.assert_close(model(batch)[:1], both[1], atol=2e-5, rtol=1e-4)


def test_beams_take_their_memory_along(model):
    rows = [[3, user(1), 4], [9, 8, user(3), 2, 1]]
    prompts = [prompt_of(parts) for parts in rows]
    params = SamplingParams(max_new_tokens=5, num_beams=3)
    with torch.inference_mode():
        batch = model.embed_prompts([p.encoded for p in prompts], [p.media for p in prompts])
    answers = generate(model, batch, params, tokenizer=WordTokenizer(), eos_ids=())
    for parts, answer in zip(rows, answers, strict=True):
        assert (
            answer.token_ids
            == alone(model, request_of(parts, num_beams=3, max_new_tokens=5)).token_ids
        )


def test_the_engine_mixes_all_kinds_of_requests(model):
    asked = [
        [3, user(1), 4, 5, 6],
        [7, 8, 9],
        [user(2, 3), *range(10, 20), picture(1), user(1), 21],
        [4, picture(2), 27, picture(3), picture(1), 47, user(3)],  # only the answer sees it
    ]
    requests = [request_of(parts) for parts in asked]
    found = engine_of(model).run(requests)
    for request, answer in zip(requests, found, strict=True):
        assert_same(answer, alone(model, request), model, request)


@pytest.mark.slow
@settings(deadline=None, max_examples=8)
@given(asked=st.lists(PARTS, min_size=1, max_size=5))
def test_the_engine_answers_as_the_plain_loop(asked):
    model = build()
    requests = [request_of(parts) for parts in asked]
    engine = engine_of(model)
    for _ in range(2):  # the second time from the prefix cache
        for request, answer in zip(requests, engine.run(requests), strict=True):
            assert_same(answer, alone(model, request), model, request)


def test_the_same_text_of_another_user_shares_what_stands_before_it_alone(model):
    before, behind = [5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 17]
    requests = [request_of([*before, user(number), *behind]) for number in (1, 2, 1)]
    keys = [
        position_keys(one.prompt, [bytes([number]) * 32])
        for one, number in zip(requests, (1, 2, 1), strict=True)
    ]
    assert keys[0] == keys[2]
    assert [a == b for a, b in zip(keys[0], keys[1], strict=True)] == [
        *[True] * 5,
        False,
        *[True] * 7,
    ]
    engine = engine_of(model)
    for request, shared in zip(requests, (0, 5, 12), strict=True):
        cached = engine.pool.stats.cached_tokens
        [answer] = engine.run([request])
        assert_same(answer, alone(model, request), model, request)
        assert engine.pool.stats.cached_tokens - cached == shared
    answers = [alone(model, request).token_ids for request in requests]
    assert answers[0] == answers[2] != answers[1]


def test_a_medium_behind_the_prompt_is_seen_by_the_answer_and_shared_with_nobody(model):
    requests = [request_of([*range(3, 12), user(number)]) for number in (1, 2, 1)]
    found = [alone(model, request).token_ids for request in requests]
    assert found[0] != found[1]
    engine = engine_of(model)
    for request in requests:
        [answer] = engine.run([request])
        assert_same(answer, alone(model, request), model, request)


def test_speculation_changes_nothing(model):
    requests = [request_of([3, user(1), *[4, 5, 6] * 3], max_new_tokens=12)]
    engine = engine_of(model, speculate="on")
    for request, answer in zip(requests, engine.run(requests), strict=True):
        assert_same(answer, alone(model, request), model, request)


def test_the_engine_refuses_spans_of_the_other_way(model):
    one = request_of([3, user(1), 4])
    inside = replace(one, prompt=EncodedPrompt([3, 0, 0, 4], [False] * 4, (Span(0, 1, 2, "user"),)))
    beside = replace(one, prompt=EncodedPrompt([3, 4], [False] * 2, (Span(0, 1, 0, "vector"),)))
    wide = replace(one, media=(torch.zeros(2, WIDTH + 1),))
    behind = replace(one, prompt=EncodedPrompt([3], [False], (Span(0, 2, 0, "user"),)))
    engine = engine_of(model)
    for request, error, text in (
        (inside, FusionError, "has 2 positions, and .* stand beside the sequence"),
        (beside, FusionError, "has 0 positions, and .* stand in the sequence"),
        (wide, FusionError, r"features are \[2, 33\]"),
        (behind, RequestError, "spans are 1 positions of the prompt or fewer"),
    ):
        with pytest.raises(error, match=text):
            engine.submit(request)


def test_a_model_without_blocks_refuses_a_medium_beside(model):
    plain = build(every=None)
    prompt = prompt_of([3, user(1), 4])
    with pytest.raises(UnsupportedModelError, match="no gated cross-attention, and media"):
        plain(plain.embed_prompts([prompt.encoded], [prompt.media]))


def test_a_ranking_of_items_after_a_user_is_that_of_every_item_alone(model):
    scorer = SuffixScorer(model, max_tokens=7)
    prefix = prompt_of([3, user(1, 3), 4, picture(2), user(2)])
    suffixes = [prompt_of([5, 6, 7]), prompt_of([picture(1, 2), 8]), prompt_of([9])] * 2
    with torch.inference_mode():
        for _ in range(2):  # the second time with keys and values that were kept
            found = list(scorer.logits(prefix, suffixes, [1, 2, 3]))
            for suffix, logits in zip(suffixes, found, strict=True):
                whole = prompt_of([3, user(1, 3), 4, picture(2), user(2), *_parts(suffix)])
                hidden = model(model.embed_prompts([whole.encoded], [whole.media]))
                torch.testing.assert_close(
                    logits, model.logits(hidden)[0, -1, [1, 2, 3]], atol=2e-5, rtol=1e-4
                )


def _parts(prompt: ProcessedPrompt) -> list:
    media = list(prompt.media)
    starts = {span.start: span for span in prompt.encoded.spans}
    covered = {s.start + i for s in prompt.encoded.spans for i in range(1, s.length)}
    return [
        media.pop(0) if at in starts else token
        for at, token in enumerate(prompt.encoded.input_ids)
        if at not in covered
    ]


def test_a_medium_beside_an_item_is_refused(model):
    scorer = SuffixScorer(model)
    with pytest.raises(PromptError, match=r"the user of an item, .* put it into the query"):
        list(scorer.logits(prompt_of([3]), [prompt_of([user(1), 4])], [1]))


def sample(parts, name: str = "s") -> EncodedSample:
    prompt = prompt_of(parts)
    ids = prompt.encoded.input_ids
    return EncodedSample(
        EncodedPrompt(ids, [token > 0 for token in ids], prompt.encoded.spans), prompt.media, name
    )


SAMPLES = [
    sample([3, user(1), 4, 5]),
    sample([6, 7, user(2, 3)]),  # nobody sees it, the next sample least of all
    sample([8, 9, 10]),
    sample([user(3), 11, picture(1), 12, 13]),
]


@pytest.mark.parametrize("bins", [[[0, 1, 2, 3]], [[1, 2], [3, 0]], [[0], [1], [2], [3]]])
def test_packed_samples_have_the_loss_of_each_alone(bins):
    model = TrainedModel(build()).train()
    batch = collate_packed([[SAMPLES[i] for i in row] for row in bins])
    model(batch).total.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0.0
    for one in SAMPLES:
        loss = model(collate([one])).total
        loss.backward()
        total += loss.item()
    assert model(batch).total.item() == pytest.approx(total, rel=1e-5)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-4, rtol=1e-3, msg=name)
    assert found["vlm.modalities.user.projector.weight"].any()
    assert found["vlm.language_model.cross_attention.1.attention_gate"].any()


def test_blocks_have_a_gradient_of_zero_in_a_batch_of_text():
    model = TrainedModel(build()).train()
    model(collate([SAMPLES[2]])).total.backward()
    for name, parameter in model.named_parameters():
        if "cross_attention" in name or "user" in name:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    evaluated, trained = model.eval()(collate([SAMPLES[2]])), model.train()(collate([SAMPLES[2]]))
    torch.testing.assert_close(evaluated.total, trained.total)

"""Cached values are used for nothing else: pictures, questions, evictions, adapters at random.

Every answer is compared with one that was computed without caches.
"""

import dataclasses

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lapilli.generate.engine import Engine
from lapilli.lora import LoraConfig, adapters, inject, merge
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import SMALL, alone, build, picture, request_of

pytestmark = pytest.mark.slow

LORA = LoraConfig(rank=2, alpha=4, targets=("language_model.*.{q,v,down}_proj", "*.projector"))

# Few different ones, so that much begins alike: pictures of one length that differ in their
# content, questions that part inside a block, a picture before and after a text.
PICTURES = st.tuples(st.integers(0, 2), st.sampled_from([3, 5]))
WORDS = st.integers(1, 3)
QUESTIONS = st.lists(WORDS | PICTURES, min_size=1, max_size=5)


class Service(RuleBasedStateMachine):
    """One engine with little memory, asked by people who change its model under its hands."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build()
        options = dataclasses.replace(SMALL, kv_bytes=40 * 4096, feature_bytes=2000, max_rows=3)
        self.engine = Engine(self.model, WordTokenizer(), options=options)
        self.source = torch.Generator().manual_seed(0)
        self.open: list = []

    @rule(questions=st.lists(QUESTIONS, min_size=1, max_size=4), length=st.integers(1, 6))
    def ask(self, questions, length):
        """Several at once, all answered before the next change of the model."""
        requests = [self.request(parts, length) for parts in questions]
        for request, answer in zip(requests, self.engine.run(requests), strict=True):
            assert_same(answer, alone(self.model, request), self.model, request)

    @rule(parts=QUESTIONS, steps=st.integers(1, 3))
    def ask_and_leave(self, parts, steps):
        """A request that is cancelled while it is read or answered."""
        handle = self.engine.submit(self.request(parts, 8))
        for _ in range(steps):
            self.engine.step()
        handle.cancel()

    @rule(parts=QUESTIONS, steps=st.integers(1, 3), more=st.integers(0, 3))
    def turn_and_turn_back_while_asked(self, parts, steps, more):
        """What is read with a setting that is gone again must not stay."""
        handle = self.engine.submit(self.request(parts, 6))
        for _ in range(steps):
            self.engine.step()
        layers = [layer for _, layer in adapters(self.model)]
        before = [layer.scaling for layer in layers]
        for layer in layers:
            layer.scaling += 1.0
        for _ in range(more):
            self.engine.step()
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling
        while not handle.is_finished:
            self.engine.step()

    @rule()
    def forget_features(self):
        self.engine.features.clear()

    @rule()
    def forget_prefixes(self):
        self.engine.pool.clear()

    @rule()
    def put_adapter_on(self):
        if any(True for _ in adapters(self.model)):
            return
        inject(self.model, LORA)
        for _, layer in adapters(self.model):
            with torch.no_grad():
                layer.lora_B.weight.normal_(std=0.3, generator=self.source)

    @rule(scaling=st.sampled_from([0.0, 1.0, 2.0]))
    def turn_adapter(self, scaling):
        for _, layer in adapters(self.model):
            layer.scaling = scaling

    @rule()
    def merge_adapter(self):
        if any(True for _ in adapters(self.model)):
            merge(self.model)

    @rule()
    def change_projector(self):
        projector = self.model.modality("vector").projector
        with torch.no_grad():
            next(projector.parameters()).add_(0.5)

    @precondition(lambda self: not self.engine.has_work)
    @invariant()
    def all_blocks_are_free(self):
        assert self.engine.pool.available == self.engine.pool.capacity

    def request(self, parts, length):
        media = [part if isinstance(part, int) else picture(*part) for part in parts]
        return request_of(media, max_new_tokens=length)


TestService = Service.TestCase
TestService.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


def test_a_second_question_computes_new_tokens_only(model, tokenizer):
    engine = Engine(model, tokenizer, options=SMALL)
    shared = [1, picture(7, 21), 2]
    engine.run([request_of([*shared, 3, 4])])
    assert engine.prefix_stats.cached_tokens == 0
    seen = model.modality("vector").items_seen
    engine.features.clear()
    request = request_of([*shared, 9, 8])
    [answer] = engine.run([request])
    assert engine.prefix_stats.cached_tokens == 23  # all that both have, inside a block too
    assert model.modality("vector").items_seen == seen  # no look: its positions were known
    assert_same(answer, alone(model, request), model, request)


def test_a_further_turn_computes_new_tokens_only(model, tokenizer):
    engine = Engine(model, tokenizer, options=SMALL)
    [answer] = engine.run([request_of([1, picture(7, 9), 2])])
    turn = [1, picture(7, 9), 2, *answer.token_ids, 5]
    engine.run([request_of(turn)])
    assert (
        engine.prefix_stats.cached_tokens == 11 + len(answer.token_ids) - 1
    )  # its last was not read


def test_requests_with_a_common_prefix_wait_for_the_first(model, tokenizer):
    engine = Engine(model, tokenizer, options=dataclasses.replace(SMALL, max_rows=8))
    shared = [1, picture(8, 33), 2]
    seen = model.modality("vector").items_seen
    requests = [request_of([*shared, i]) for i in range(3, 9)]
    answers = engine.run(requests)
    assert model.modality("vector").items_seen == seen + 1
    assert engine.prefix_stats.cached_tokens >= 5 * 32
    for request, answer in zip(requests, answers, strict=True):
        assert_same(answer, alone(model, request), model, request)


def test_same_features_for_another_picture_are_not_taken(model, tokenizer):
    engine = Engine(model, tokenizer, options=SMALL)
    for number in (1, 2, 1, 3):
        request = request_of([1, picture(number, 13), 2])
        [answer] = engine.run([request])
        assert_same(answer, alone(model, request), model, request)
    assert engine.features.stats.misses == 3


def test_weight_changes_that_torch_does_not_count_need_a_reset(tokenizer):
    model = build()
    engine = Engine(model, tokenizer, options=SMALL)
    request = request_of([1, picture(1, 13), 2], logprobs=0)
    engine.run([request])
    model.modality("vector").projector.weight.data.mul_(3)
    engine.reset_cache()
    [answer] = engine.run([request])
    assert_same(answer, alone(model, request), model, request)


def test_answers_without_caches_are_the_same(model, tokenizer):
    options = dataclasses.replace(SMALL, prefix_bytes=0, feature_bytes=0)
    engine = Engine(model, tokenizer, options=options)
    request = request_of([1, picture(1, 13), 2])
    for _ in range(2):
        [answer] = engine.run([request])
        assert_same(answer, alone(model, request), model, request)
    assert engine.prefix_stats.cached_tokens == 0
    assert engine.features.stats.hits == 0


def test_int8_keys_and_values_stay_near(model, tokenizer):
    options = dataclasses.replace(SMALL, kv_dtype="int8")
    engine = Engine(model, tokenizer, options=options)
    request = request_of([1, picture(1, 13), 2], logprobs=0, max_new_tokens=1)
    expected = alone(model, request)
    for _ in range(2):
        [answer] = engine.run([request])
        assert answer.token_ids == expected.token_ids
        assert abs(answer.logprobs[0].logprob - expected.logprobs[0].logprob) < 0.1

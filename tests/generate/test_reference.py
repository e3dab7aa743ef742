"""The plain decode loop against transformers: rows, limits, stop strings, streams, caches."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from lapilli.config.generation import SamplingParams
from lapilli.errors import ContextTooLongError, GenerationError
from lapilli.generate.reference import generate, stream
from lapilli.model import FusedBatch
from lapilli.nn.kv_cache import KVCache
from tests.generate.conftest import VOCABULARY, WordTokenizer, fuse_rows

PROMPTS = ([1, 2, 3], [7], [4, 9, 11, 30, 2, 8, 5], [12, 13])
Fused = Callable[..., FusedBatch]


def oracle_answer(oracle: LlamaForCausalLM, prompt: list[int], **options: object) -> list[int]:
    ids = torch.tensor([prompt])
    out = oracle.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers(model, oracle, tokenizer, fused: Fused, prompt, penalty):
    expected = oracle_answer(
        oracle, prompt, max_new_tokens=20, do_sample=False, repetition_penalty=penalty
    )
    params = SamplingParams(max_new_tokens=20, repetition_penalty=penalty)
    [answer] = generate(model, fused(prompt), params, tokenizer=tokenizer, prompt_ids=[prompt])
    assert list(answer.token_ids) == expected
    assert answer.finish_reason == "length"
    assert answer.prompt_len == len(prompt)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("penalty", "length_penalty", "eos"),
    [
        (1.0, 1.0, ()),
        (1.3, 1.0, (17,)),
        (1.0, 0.5, (3, 17, 40)),
        (1.0, -0.5, (3, 17, 40)),
        (1.3, 2.0, (3, 17, 40)),
    ],
)
def test_beams_equal_transformers(
    model, oracle, tokenizer, fused: Fused, penalty, length_penalty, eos
):
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        expected = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=4,
            do_sample=False,
            max_new_tokens=12,
            length_penalty=length_penalty,
            repetition_penalty=penalty,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        params = SamplingParams(
            max_new_tokens=12,
            num_beams=4,
            length_penalty=length_penalty,
            repetition_penalty=penalty,
        )
        [answer] = generate(
            model, fused(prompt), params, tokenizer=tokenizer, prompt_ids=[prompt], eos_ids=eos
        )
        tokens = expected.sequences[0, len(prompt) :].tolist()
        assert list(answer.token_ids) == tokens[: len(answer.token_ids)]
        assert not any(tokens[len(answer.token_ids) :])  # padding
        assert answer.score == pytest.approx(float(expected.sequences_scores[0]), rel=1e-5)


OPTIONS = [
    {},
    {"num_beams": 3},
    {"temperature": 0.9, "seed": 3},
    {"num_beams": 3, "temperature": 0.9, "top_p": 0.8, "seed": 3},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_rows_of_a_batch_answer_as_if_alone(model, tokenizer, fused: Fused, options):
    params = SamplingParams(max_new_tokens=10, stop_token_ids=(17, 40, 33), **options)
    together = generate(model, fused(*PROMPTS), params, tokenizer=tokenizer)
    alone = [generate(model, fused(p), params, tokenizer=tokenizer)[0] for p in PROMPTS]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.finish_reason for a in together] == [a.finish_reason for a in alone]


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=4
    ),
    stops=st.sets(st.integers(0, VOCABULARY - 1), max_size=6),
    beams=st.sampled_from([1, 2]),
)
def test_any_rows_answer_as_if_alone(model, rows, stops, beams):
    tokenizer = WordTokenizer()
    params = SamplingParams(max_new_tokens=6, stop_token_ids=tuple(stops), num_beams=beams)
    together = generate(model, fuse_rows(model, *rows), params, tokenizer=tokenizer)
    for row, answer in zip(rows, together, strict=True):
        [alone] = generate(model, fuse_rows(model, row), params, tokenizer=tokenizer)
        assert answer.token_ids == alone.token_ids
        assert answer.finish_reason == alone.finish_reason


def test_rows_end_at_their_own_step(model, tokenizer, fused: Fused):
    free = generate(model, fused(*PROMPTS), SamplingParams(max_new_tokens=8), tokenizer=tokenizer)
    stop = free[0].token_ids[2]
    params = SamplingParams(max_new_tokens=8, stop_token_ids=(stop,))
    answers = generate(model, fused(*PROMPTS), params, tokenizer=tokenizer)
    for before, after in zip(free, answers, strict=True):
        ends = before.token_ids.index(stop) + 1 if stop in before.token_ids else 8
        assert after.token_ids == before.token_ids[:ends]
        assert after.finish_reason == ("stop" if stop in before.token_ids else "length")
    assert len({len(a.token_ids) for a in answers}) > 1


def test_the_stop_token_is_counted_but_not_shown(model, tokenizer, fused: Fused):
    params = SamplingParams(max_new_tokens=8)
    [free] = generate(model, fused([1, 2]), params, tokenizer=tokenizer)
    end = next(i for i in range(1, 8) if free.token_ids[i] not in free.token_ids[:i])
    tokenizer.eos_id = free.token_ids[end]
    [answer] = generate(model, fused([1, 2]), params, tokenizer=tokenizer)
    assert answer.token_ids == free.token_ids[: end + 1]
    assert answer.text == tokenizer.decode(list(free.token_ids[:end]))
    assert answer.finish_reason == "stop"


def test_stop_string_across_tokens(model, tokenizer, fused: Fused):
    params = SamplingParams(max_new_tokens=8)
    [free] = generate(model, fused([1, 2]), params, tokenizer=tokenizer)
    words = free.text.split()
    stop = f"{words[2]} {words[3]}"
    params = SamplingParams(max_new_tokens=8, stop=(stop,))
    pieces = list(stream(model, fused([1, 2]), params, tokenizer=tokenizer))
    assert "".join(piece.text for piece in pieces) == free.text[: free.text.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    [beam] = generate(
        model,
        fused([1, 2]),
        SamplingParams(max_new_tokens=8, num_beams=2, stop=("w",)),
        tokenizer=tokenizer,
    )
    assert (beam.text, len(beam.token_ids), beam.finish_reason) == ("", 1, "stop")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0, "seed": 1}])
def test_stream_gives_the_text_of_generate(model, tokenizer, fused: Fused, options):
    params = SamplingParams(max_new_tokens=9, logprobs=2, **options)
    [whole] = generate(model, fused([4, 5]), params, tokenizer=tokenizer)
    answering = stream(model, fused([4, 5]), params, tokenizer=tokenizer)
    pieces = list(answering)
    assert answering.generation == whole
    assert "".join(piece.text for piece in pieces) == whole.text
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reason == "length"
    assert len(pieces) == (1 if "num_beams" in options else 9)


def test_logprobs_are_those_of_the_model(model, oracle, tokenizer, fused: Fused):
    prompt = [4, 5]
    for options in ({"temperature": 2.0, "top_k": 5, "seed": 8}, {"num_beams": 3}):
        params = SamplingParams(max_new_tokens=6, logprobs=3, repetition_penalty=1.5, **options)
        [answer] = generate(model, fused(prompt), params, tokenizer=tokenizer, prompt_ids=[prompt])
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + list(answer.token_ids)])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        assert len(answer.logprobs) == 6
        for row, token_id, report in zip(expected, answer.token_ids, answer.logprobs, strict=True):
            assert report.token_id == token_id
            assert report.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
            best = row.topk(3)
            assert [i for i, _ in report.top] == best.indices.tolist()
            assert [v for _, v in report.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_answers_follow_the_seed(model, tokenizer, fused: Fused):
    def texts(seed: int | None, *rows: list[int]) -> list[str]:
        params = SamplingParams(max_new_tokens=12, temperature=1.5, seed=seed)
        return [a.text for a in generate(model, fused(*rows), params, tokenizer=tokenizer)]

    assert texts(1, [3]) == texts(1, [3])
    assert texts(1, [3]) != texts(2, [3])
    # Without a seed rows differ from each other, and torch's own seed repeats them.
    torch.manual_seed(0)
    first = texts(None, [3], [3])
    assert first[0] != first[1]
    torch.manual_seed(0)
    assert texts(None, [3], [3]) == first


def test_greedy_does_not_advance_the_global_generator(model, tokenizer, fused: Fused):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    generate(model, fused([1], [2, 3]), SamplingParams(max_new_tokens=3), tokenizer=tokenizer)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_closing_the_stream_frees_the_cache(model, tokenizer, fused: Fused, monkeypatch):
    caches: list[weakref.ref[KVCache]] = []
    steps: list[int] = []
    decoder = model.language_model
    new_cache, embed = decoder.new_cache, decoder.embed

    def counted_cache(batch: int, capacity: int = 256) -> KVCache:
        cache = new_cache(batch, capacity)
        caches.append(weakref.ref(cache))
        return cache

    def counted_embed(ids: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        return embed(ids)

    batch = fused([1, 2])
    monkeypatch.setattr(decoder, "new_cache", counted_cache)
    monkeypatch.setattr(decoder, "embed", counted_embed)
    pieces = stream(model, batch, SamplingParams(max_new_tokens=50), tokenizer=tokenizer)
    next(pieces)
    next(pieces)
    assert len(steps) == 1
    assert caches[0]() is not None
    pieces.close()
    gc.collect()
    assert caches[0]() is None
    assert list(pieces) == []
    assert len(steps) == 1
    answer = pieces.generation
    assert (len(answer.token_ids), answer.finish_reason) == (2, "cancelled")


@pytest.mark.parametrize("beams", [1, 2])
def test_cancelling_a_batch(model, tokenizer, fused: Fused, beams):
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == 3

    params = SamplingParams(max_new_tokens=20, num_beams=beams)
    answers = generate(model, fused([1], [2, 3]), params, tokenizer=tokenizer, cancelled=cancelled)
    assert [(len(a.token_ids), a.finish_reason) for a in answers] == [(3, "cancelled")] * 2
    assert all(a.text for a in answers)


def test_answers_end_with_the_context(model, tokenizer, fused: Fused):
    params = SamplingParams(max_new_tokens=20)
    [answer] = generate(model, fused([1] * 60), params, tokenizer=tokenizer)
    assert (len(answer.token_ids), answer.finish_reason) == (4, "length")
    with pytest.raises(ContextTooLongError, match=r"row 1 has 64 tokens.* may have 64: shorten"):
        generate(model, fused([1], [1] * 64), params, tokenizer=tokenizer)
    with pytest.raises(ContextTooLongError, match=r"the prompt has 9 tokens, .* may have 9"):
        stream(model, fused([1] * 9), params, tokenizer=tokenizer, context_length=9)


def test_a_stream_refuses_several_rows_and_beams_with_a_cache(model, tokenizer, fused: Fused):
    params = SamplingParams()
    with pytest.raises(GenerationError, match="has 2: use generate"):
        stream(model, fused([1], [2]), params, tokenizer=tokenizer)
    beams = SamplingParams(num_beams=2)
    cache = model.language_model.new_cache(1)
    with pytest.raises(GenerationError, match="num_beams 2 with a cache of one row"):
        stream(model, fused([1]), beams, tokenizer=tokenizer, cache=cache)


def test_a_cached_beginning_is_not_computed_again(model, tokenizer, fused: Fused):
    params = SamplingParams(max_new_tokens=6)
    first, second = [3, 1, 4, 1, 5], [3, 1, 4, 1, 5, 9, 2, 6]
    cache = model.language_model.new_cache(1, 4)
    list(stream(model, fused(first), params, tokenizer=tokenizer, cache=cache))
    assert cache.length == len(first) + 5
    cache.truncate(len(first))
    pieces = stream(model, fused(second), params, tokenizer=tokenizer, cache=cache)
    text = "".join(piece.text for piece in pieces)
    [fresh] = generate(model, fused(second), params, tokenizer=tokenizer)
    assert text == fresh.text


def test_works_outside_inference_mode_and_leaves_no_graph(model, tokenizer: WordTokenizer, fused):
    pieces = stream(model, fused([1, 2]), SamplingParams(max_new_tokens=3), tokenizer=tokenizer)
    next(pieces)
    assert not torch.is_inference_mode_enabled()
    list(pieces)
    assert all(parameter.grad is None for parameter in model.parameters())

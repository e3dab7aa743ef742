"""Suffixes in packed passes have the logits that each has alone, in every kind of layer."""

import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.config.model import DecoderConfig, MptConfig
from lapilli.errors import ConfigError, PromptError
from lapilli.lm import build_language_model
from lapilli.model import VisionLanguageModel
from lapilli.pipeline import ProcessedPrompt
from lapilli.pipeline.scorer import SuffixScorer, join
from lapilli.prompt.encode import EncodedPrompt, Span

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_positions": 256,
}
GEMMA = {
    "norm_offset": 1.0,
    "post_norms": True,
    "query_scalar": 24.0,
    "embedding_scale": 8.0,
    "activation": "gelu_tanh",
    "sliding_window": 6,
    "full_layers": (1,),
    "tie_embeddings": True,
}
CONFIGS = {
    "llama": DecoderConfig(**SIZES),
    "mistral": DecoderConfig(**SIZES, sliding_window=5),
    "qwen2": DecoderConfig(**SIZES, qkv_bias=True, tie_embeddings=True),
    "qwen3": DecoderConfig(**SIZES, qk_norm=True),
    "gemma2": DecoderConfig(**SIZES, **GEMMA, attention_softcap=2.0, logit_softcap=3.0),
    "gemma3": DecoderConfig(**SIZES, **GEMMA, qk_norm=True, local_rope_theta=100.0),
    "mpt": MptConfig(vocab_size=61, hidden_size=64, num_layers=3, num_heads=4, max_positions=256),
}
WIDTH, LABELS = 64, [5, 17, 60]


def make_model(name: str) -> VisionLanguageModel:
    torch.manual_seed(1)
    model = VisionLanguageModel(build_language_model(CONFIGS[name])).eval().requires_grad_(False)
    for path, parameter in model.named_parameters():
        mean = float("norm" in path and parameter.ndim == 1)
        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    return model


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request) -> VisionLanguageModel:
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama() -> VisionLanguageModel:
    return make_model("llama")


def piece(*parts: int | torch.Tensor) -> ProcessedPrompt:
    """Ids, and vectors [n, D] between them."""
    ids: list[int] = []
    spans, media = [], []
    for part in parts:
        if isinstance(part, torch.Tensor):
            spans.append(Span(0, len(ids), len(part)))
            media.append(part)
            ids += [0] * len(part)
        else:
            ids.append(part)
    return ProcessedPrompt(EncodedPrompt(ids, [False] * len(ids), tuple(spans)), tuple(media))


PARTS = st.integers(0, 60) | st.tuples(st.integers(1, 3), st.integers(0, 10**6))
"""An id, or how many vectors, of which seed."""


def drawn(parts: list[int | tuple[int, int]]) -> ProcessedPrompt:
    """The piece of what was drawn: checked types draw random numbers, which a strategy may not."""
    return piece(
        *(
            part
            if isinstance(part, int)
            else torch.randn(part[0], WIDTH, generator=torch.Generator().manual_seed(part[1]))
            for part in parts
        )
    )


@torch.inference_mode()
def one_by_one(
    model: VisionLanguageModel, prefix: ProcessedPrompt, suffixes: Sequence[ProcessedPrompt]
) -> torch.Tensor:
    """The plain loop: every prompt whole and alone, with all logits."""
    found = []
    for suffix in suffixes:
        whole = join([prefix, suffix])
        hidden = model(model.embed_prompts([whole.encoded], [whole.media]))
        found.append(model.logits(hidden[:, -1])[0, LABELS])
    return torch.stack(found)


def packed(scorer: SuffixScorer, prefix, suffixes) -> torch.Tensor:
    return torch.stack(list(scorer.logits(prefix, suffixes, LABELS)))


@settings(max_examples=8)
@given(
    st.lists(PARTS, min_size=1, max_size=12),
    st.lists(st.lists(PARTS, min_size=1, max_size=6), min_size=1, max_size=9),
    st.integers(1, 30),
)
def test_packed_suffixes_have_the_logits_that_each_has_alone(model, before, after, max_tokens):
    prefix, suffixes = drawn(before), list(map(drawn, after))
    scorer = SuffixScorer(model, max_tokens=max_tokens)
    expected = one_by_one(model, prefix, suffixes)
    torch.testing.assert_close(packed(scorer, prefix, suffixes), expected, atol=1e-4, rtol=0)
    again = packed(scorer, prefix, suffixes[::-1])  # with the prefix of before
    torch.testing.assert_close(again, expected.flip(0), atol=1e-4, rtol=0)
    assert scorer.prefixes.stats.misses == 1


def test_the_logits_differ_and_depend_on_the_prefix(model):
    """What the equality above compares has something to say."""
    suffixes = [piece(3, 4), piece(5), piece(torch.ones(1, WIDTH), 7)]
    found = one_by_one(model, piece(1, 2, 9), suffixes)
    assert found.std(dim=0).min() > 0.01
    assert (found - one_by_one(model, piece(2, 1, 8), suffixes)).abs().min() > 1e-4


def test_a_passes_positions_are_bounded(llama, monkeypatch):
    sizes = []
    forward = type(llama.language_model).forward

    def watched(self, inputs_embeds, **options):
        sizes.append(inputs_embeds.shape[1])
        return forward(self, inputs_embeds, **options)

    monkeypatch.setattr(type(llama.language_model), "forward", watched)
    lengths = (3, 4, 9, 2, 2, 2, 5)
    suffixes = [piece(at, *range(8, length + 7)) for at, length in enumerate(lengths)]
    list(SuffixScorer(llama, max_tokens=7).logits(piece(1, 2), suffixes, LABELS))
    assert sizes == [2, 7, 9, 6, 5]  # the prefix, then chunks in order; a longer one is alone
    sizes.clear()
    suffixes = [piece(*range(1, length + 1)) for length in lengths]
    list(SuffixScorer(llama, max_tokens=7).logits(piece(1, 2), suffixes, LABELS))
    assert sizes == [2, 4, 9, 5]  # what begins alike is read once


def test_suffixes_are_taken_as_there_is_room(llama):
    taken = []

    def endless():
        while True:
            taken.append(0)
            yield piece(1, 2)

    found = SuffixScorer(llama, max_tokens=8).logits(piece(1), endless(), LABELS)
    for _ in range(5):
        next(found)
    assert len(taken) <= 9


def test_changed_weights_read_the_prefix_anew_within_a_call(llama):
    model = make_model("llama")
    scorer = SuffixScorer(model, max_tokens=2)
    prefix, suffixes = piece(4, 5, 6), [piece(1, 2), piece(3, 4)]
    found = scorer.logits(prefix, suffixes, LABELS)
    first = next(found)
    torch.testing.assert_close(first, one_by_one(llama, prefix, suffixes)[0], atol=1e-4, rtol=0)
    with torch.no_grad():
        model.language_model.model.layers[0].self_attn.k_proj.weight.mul_(-1)
    expected = one_by_one(model, prefix, suffixes)[1]
    assert (expected - one_by_one(llama, prefix, suffixes)[1]).abs().max() > 1e-2
    torch.testing.assert_close(next(found), expected, atol=1e-4, rtol=0)


def test_prefixes_that_differ_in_a_vector_alone_are_not_confused(llama):
    scorer, suffixes = SuffixScorer(llama), [piece(1, 2)]
    for scale in (1.0, -1.0, 1.0):
        prefix = piece(1, torch.full((2, WIDTH), scale), 3)
        expected = one_by_one(llama, prefix, suffixes)
        torch.testing.assert_close(packed(scorer, prefix, suffixes), expected, atol=1e-4, rtol=0)
    assert (scorer.prefixes.stats.hits, scorer.prefixes.stats.misses) == (1, 2)


def test_no_room_for_prefixes_reads_each_once_a_call(llama):
    scorer = SuffixScorer(llama, max_tokens=2, prefix_bytes=0)
    prefix, suffixes = piece(1, 2, 3), [piece(4, 5)] * 5
    expected = one_by_one(llama, prefix, suffixes)
    torch.testing.assert_close(packed(scorer, prefix, suffixes), expected, atol=1e-4, rtol=0)
    assert scorer.prefixes.stats.misses == 1
    assert scorer.prefixes.num_bytes == 0


def test_a_model_without_ragged_rows_reads_every_prompt_whole(llama, monkeypatch):
    monkeypatch.setattr(type(llama.language_model), "supports_varlen", False)
    suffixes = [piece(1, 2), piece(torch.ones(2, WIDTH)), piece(7)]
    scorer = SuffixScorer(llama)
    expected = one_by_one(llama, piece(3, 4), suffixes)
    torch.testing.assert_close(packed(scorer, piece(3, 4), suffixes), expected, atol=1e-5, rtol=0)
    assert scorer.prefixes.stats.misses == 0


@pytest.mark.slow
def test_a_model_of_transformers_has_the_same_logits_plainly():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from lapilli.lm.foreign import ForeignLanguageModel

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=61,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    inner = GPTNeoXForCausalLM(config).eval()
    foreign = VisionLanguageModel(ForeignLanguageModel(inner)).requires_grad_(False)
    found = packed(SuffixScorer(foreign), piece(3, 4), [piece(1, 2), piece(7), piece(9, 8, 5)])
    for row, ids in zip(found, [[3, 4, 1, 2], [3, 4, 7], [3, 4, 9, 8, 5]], strict=True):
        expected = inner(input_ids=torch.tensor([ids])).logits[0, -1, LABELS]
        torch.testing.assert_close(row, expected.detach(), atol=1e-5, rtol=0)


def test_threads_score_at_the_same_time(llama):
    scorer = SuffixScorer(llama, max_tokens=6, prefix_bytes=4000)  # prefixes are evicted
    generator = torch.Generator().manual_seed(0)
    prefixes = [piece(*torch.randint(1, 60, (5,), generator=generator).tolist()) for _ in range(4)]
    suffixes = [piece(i, torch.randn(1, WIDTH, generator=generator)) for i in range(8)]
    expected = [one_by_one(llama, prefix, suffixes) for prefix in prefixes]
    worst: list[float] = []

    def work(i: int) -> None:
        for turn in range(6):
            at = (i + turn) % len(prefixes)
            found = packed(scorer, prefixes[at], suffixes)
            worst.append((found - expected[at]).abs().max().item())

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(worst) == 24
    assert max(worst) < 1e-4


def test_pieces_are_joined_with_their_media():
    vectors = torch.ones(2, WIDTH), torch.zeros(1, WIDTH)
    whole = join([piece(1, vectors[0]), piece(2), piece(vectors[1], 3)])
    assert whole.encoded.input_ids == [1, 0, 0, 2, 0, 3]
    assert [(span.start, span.length) for span in whole.encoded.spans] == [(1, 2), (4, 1)]
    assert all(a is b for a, b in zip(whole.media, vectors, strict=True))


def test_what_has_no_positions_is_refused(llama):
    scorer = SuffixScorer(llama)
    with pytest.raises(PromptError, match="the prefix has no positions"):
        list(scorer.logits(piece(), [piece(1)], LABELS))
    with pytest.raises(PromptError, match="a suffix has no positions"):
        list(scorer.logits(piece(1), [piece()], LABELS))


@pytest.mark.parametrize("limits", [{"max_tokens": 0}, {"prefix_bytes": -1}])
def test_limits_that_leave_nothing_are_refused(llama, limits):
    with pytest.raises(ConfigError, match="max_tokens must be at least 1 and prefix_bytes"):
        SuffixScorer(llama, **limits)

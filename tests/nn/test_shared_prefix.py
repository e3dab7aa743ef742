"""Sequences after one prefix, packed in a row: each as if it were alone after it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.errors import GenerationError
from lapilli.lm.decoder import Decoder
from lapilli.lm.fused_layer import FusedLayer, FusedLayers
from lapilli.lm.mpt import Mpt
from lapilli.nn import shared_prefix
from lapilli.nn.shared_prefix import SharedPrefix, attend_reference
from tests.nn.test_paged import MODELS, decoder

SCALE, WIDTH = 0.2, 8


@st.composite
def cases(draw) -> dict:
    groups = draw(st.sampled_from([1, 2, 3]))
    heads = groups * draw(st.sampled_from([1, 2, 3]))
    slopes = draw(st.booleans())
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=9))
    # In any order: a parent is any sequence of which this one is none.
    order = draw(st.permutations(range(len(lengths))))
    parents = [-1] * len(lengths)
    for at, number in enumerate(order):
        parents[number] = draw(st.sampled_from([-1, *order[:at]]))
    return {
        "seed": draw(st.integers(0, 10**6)),
        "groups": groups,
        "heads": heads,
        "past": draw(st.integers(1, 20)),
        "lengths": lengths,
        "parents": draw(st.sampled_from([None, parents])),
        "window": None if slopes else draw(st.none() | st.integers(1, 30)),
        "slopes": torch.rand(heads) if slopes else None,
        "softcap": draw(st.none() | st.just(0.7)),
    }


def attend_both(case: dict, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """What the cache computes in its second of two layers, and what the mask says."""
    torch.manual_seed(case["seed"])
    past, new = case["past"], sum(case["lengths"])
    prefix = torch.randn(2, 2, 1, case["groups"], past, WIDTH).to(dtype)
    q = torch.randn(1, case["heads"], new, WIDTH).to(dtype)
    k, v = torch.randn(2, 1, case["groups"], new, WIDTH).to(dtype)
    options = {name: case[name] for name in ("window", "slopes", "softcap")} | {"scale": SCALE}
    family = case["lengths"], case.get("parents")
    found = SharedPrefix(prefix, *family).attend(1, q, k, v, **options)
    return found, attend_reference(q, k, v, tuple(prefix[:, 1]), *family, **options)


@given(cases(), st.booleans(), st.booleans())
def test_attention_is_that_of_a_mask_over_everything(case, is_long, is_split):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefix, "LONG", 1 if is_long else 100)
        patch.setattr(shared_prefix, "CACHED_BYTES", 1000 if is_split else 1 << 20)
        found, expected = attend_both(case)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_bfloat16_is_computed_in_float32():
    case = {"seed": 1, "groups": 2, "heads": 4, "past": 9, "lengths": [3, 3, 2]}
    case |= {"window": None, "slopes": None, "softcap": None}
    found, expected = attend_both(case, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


ALL_MODELS = {
    **MODELS,
    "window beyond everything": lambda: decoder(500, 2),
}


@pytest.fixture(scope="module", params=list(ALL_MODELS))
def model(request) -> Decoder | Mpt:
    torch.manual_seed(4)
    model = ALL_MODELS[request.param]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@settings(max_examples=20)
@given(
    st.integers(0, 10**6),
    st.integers(1, 14),
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
)
def test_a_packed_pass_is_each_sequence_alone(model, seed, past, lengths):
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    prefix = torch.randn(1, past, width, generator=generator)
    new = [torch.randn(1, length, width, generator=generator) for length in lengths]
    with torch.inference_mode():
        cache = model.new_cache(1)
        model.forward(prefix, position_ids=torch.arange(past)[None], cache=cache)
        shared = SharedPrefix(cache.stacked(), lengths)
        found = model.forward(torch.cat(new, dim=1), position_ids=shared.position_ids, cache=shared)
        alone = [torch.cat([prefix, one], dim=1) for one in new]
        expected = [
            model.forward(one, position_ids=torch.arange(one.shape[1])[None]) for one in alone
        ]
    pieces = torch.split(found, lengths, dim=1)
    for piece, one in zip(pieces, expected, strict=True):
        torch.testing.assert_close(piece, one[:, past:], atol=1e-4, rtol=1e-4)
    ends = torch.cat([one[:, -1] for one in expected])
    torch.testing.assert_close(found[0, shared.last], ends, atol=1e-4, rtol=1e-4)


def test_layers_are_not_called_as_those_over_blocks(monkeypatch):
    """The call in one piece reads blocks; who sees a prefix runs module by module."""
    torch.manual_seed(0)
    model = decoder(None, 2).eval()
    taken = []
    for kind in (FusedLayer, FusedLayers):
        run = kind.run

        def watched(self, *args, run=run, **options):
            taken.append(run(self, *args, **options))
            return taken[-1]

        monkeypatch.setattr(kind, "run", watched)
    shared = SharedPrefix(torch.randn(2, 2, 1, 2, 5, 16), [1, 1])
    with torch.inference_mode():
        model.forward(torch.randn(1, 2, 24), position_ids=shared.position_ids, cache=shared)
    assert taken == [None, None, None]  # all layers, and each of two


def test_positions_begin_behind_the_prefix():
    shared = SharedPrefix(torch.zeros(2, 1, 1, 1, 4, 8), [2, 1, 3])
    assert shared.prefix_length == 4
    assert shared.position_ids.tolist() == [[4, 5, 4, 4, 5, 6]]
    assert shared.last.tolist() == [1, 2, 5]


@pytest.mark.parametrize("lengths", [[], [2, 0]])
def test_sequences_without_positions_are_refused(lengths):
    with pytest.raises(GenerationError, match="at least one position each, got"):
        SharedPrefix(torch.zeros(2, 1, 1, 1, 4, 8), lengths)


def test_a_pass_of_another_length_is_refused():
    shared = SharedPrefix(torch.zeros(2, 1, 1, 1, 4, 8), [2, 1])
    with pytest.raises(GenerationError, match="3 positions together, the pass 4"):
        shared.attend(0, *torch.zeros(3, 1, 1, 4, 8))

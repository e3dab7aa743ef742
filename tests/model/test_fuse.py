"""Counted fusion writes every item over its span and refuses everything else."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.errors import FusionError
from lapilli.model.fuse import fuse
from lapilli.prompt.encode import Span


@st.composite
def situations(draw):
    """Text [B, T, D] and spans that do not overlap, in any order."""
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    spans, longest = [], 1
    for row in range(batch):
        place = 0
        for _ in range(draw(st.integers(0, 3))):
            place += draw(st.integers(0, 3))
            length = draw(st.integers(1, 4))
            spans.append(Span(row, place, length))
            place += length
        longest = max(longest, place)
    spans = draw(st.permutations(spans))
    text = torch.randn(batch, longest + draw(st.integers(0, 2)), width)
    features = [torch.randn(span.length, width) for span in spans]
    return text, features, spans


@given(situations())
def test_features_stand_in_their_spans_and_text_everywhere_else(situation):
    text, features, spans = situation
    before = text.clone()
    expected = text.clone()
    for item, span in zip(features, spans, strict=True):
        for i in range(span.length):
            expected[span.row, span.start + i] = item[i]
    assert torch.equal(fuse(text, features, spans), expected)
    assert torch.equal(text, before)


@given(situations(), st.data())
def test_one_feature_more_or_less_is_refused(situation, data):
    text, features, spans = situation
    if not spans:
        return
    i = data.draw(st.integers(0, len(spans) - 1))
    more = torch.cat((features[i], features[i][:1]))
    features[i] = more if data.draw(st.booleans()) else features[i][:-1]
    with pytest.raises(FusionError, match=rf"item {i} \(row {spans[i].row}, position"):
        fuse(text, features, spans)


@given(situations())
def test_another_number_of_items_is_refused(situation):
    text, features, spans = situation
    extra = [*features, torch.randn(1, text.shape[2])]
    with pytest.raises(
        FusionError, match=f"{len(spans)} spans in the prompt but {len(extra)} media"
    ):
        fuse(text, extra, spans)


@given(situations())
def test_gradients_go_where_the_values_went(situation):
    text, features, spans = situation
    text.requires_grad_()
    for item in features:
        item.requires_grad_()
    fuse(text, features, spans).sum().backward()
    covered = torch.zeros(text.shape[:2], dtype=torch.bool)
    for span in spans:
        covered[span.row, span.start : span.start + span.length] = True
    assert torch.equal(text.grad, (~covered)[..., None].expand(text.shape).float())
    assert all(torch.equal(item.grad, torch.ones_like(item)) for item in features)


def test_another_width_is_refused():
    text = torch.zeros(1, 4, 3)
    with pytest.raises(FusionError, match=r"2 positions of width 3, the features are \[2, 5\]"):
        fuse(text, [torch.zeros(2, 5)], [Span(0, 1, 2)])


@pytest.mark.parametrize(
    "span", [Span(0, 3, 2), Span(1, 0, 2), Span(0, -1, 2), Span(-1, 0, 2)], ids=str
)
def test_a_span_outside_of_its_row_is_refused(span):
    with pytest.raises(FusionError, match="does not lie inside 1 rows of 4 positions"):
        fuse(torch.zeros(1, 4, 3), [torch.zeros(2, 3)], [span])


def test_overlapping_spans_are_refused():
    items = [torch.zeros(2, 3), torch.zeros(2, 3)]
    with pytest.raises(FusionError, match="position 2 begins inside the span of 2 positions at 1"):
        fuse(torch.zeros(1, 4, 3), items, [Span(0, 2, 2), Span(0, 1, 2)])


def test_features_are_cast_to_the_dtype_of_the_text():
    fused = fuse(torch.zeros(1, 3, 2).bfloat16(), [torch.ones(1, 2)], [Span(0, 1, 1)])
    assert fused.dtype == torch.bfloat16
    assert fused[0, 1].tolist() == [1, 1]


def test_spans_know_their_modality_by_name_only():
    span = dataclasses.replace(Span(0, 1, 1), modality="anything")
    assert fuse(torch.zeros(1, 3, 2), [torch.ones(1, 2)], [span]).sum() == 2

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.errors import ConfigError
from lapilli.nn.linear import rounded
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.train.trainer.task import collate, collate_packed, pack


@dataclass
class EncodedSample:
    prompt: EncodedPrompt
    media: list = field(default_factory=list)
    id: str = "a"
    skipped: tuple = ()


def row(length, *, span=None):
    """A row of ids 1, 2, ... whose every text position counts."""
    spans = () if span is None else (Span(0, *span),)
    covered = {s.start + i for s in spans for i in range(s.length)}
    ids = [PLACEHOLDER if i in covered else i + 1 for i in range(length)]
    mask = [i not in covered for i in range(length)]
    return EncodedSample(
        EncodedPrompt(ids, mask, spans), [torch.full((s.length, 3), 1.0) for s in spans]
    )


def test_rows_are_padded_on_the_right():
    first = EncodedPrompt([1, 0, 0, 7], [False, False, False, True], (Span(0, 1, 2),))
    second = EncodedPrompt([1, 5], [True, True])
    batch = collate([EncodedSample(first, [torch.ones(2, 3)]), EncodedSample(second)])
    assert batch.input_ids.tolist() == [[1, 0, 0, 7], [1, 5, PLACEHOLDER, PLACEHOLDER]]
    assert batch.loss_mask.tolist() == [[False, False, False, True], [False, True, False, False]]
    assert batch.num_valid == 2
    assert batch.spans == (Span(0, 1, 2),)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.segments == ((4,), (2,))
    assert not batch.is_packed


def test_spans_name_their_row():
    prompt = EncodedPrompt([0, 0, 3], [False, False, True], (Span(0, 0, 2),))
    batch = collate(
        [EncodedSample(prompt, [torch.zeros(2, 3)]), EncodedSample(prompt, [torch.ones(2, 3)])]
    )
    assert [span.row for span in batch.spans] == [0, 1]
    assert batch.media[1].sum() == 6


drawn_bins = st.lists(
    st.lists(
        st.tuples(st.integers(2, 12) | st.integers(33, 90), st.booleans()), min_size=1, max_size=6
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@given(drawn_bins)
def test_bins_hold_every_sample_one_after_the_other(drawn):
    bins = [
        [row(length, span=(1, length // 2) if seen else None) for length, seen in samples]
        for samples in drawn
    ]
    batch = collate_packed(bins)
    assert len(batch.ids) == sum(map(len, bins))
    assert batch.is_packed == any(len(samples) > 1 for samples in bins)
    assert len(batch.media) == len(batch.spans) == sum(len(s.media) for b in bins for s in b)
    spans = iter(batch.spans)
    for number, samples in enumerate(bins):
        start = 0
        assert batch.segments[number] == tuple(len(sample.prompt) for sample in samples)
        for sample in samples:
            end = start + len(sample.prompt)
            assert batch.input_ids[number, start:end].tolist() == sample.prompt.input_ids
            found = batch.loss_mask[number, start:end].tolist()
            assert found == [False, *sample.prompt.loss_mask[1:]]
            assert batch.position_ids[number, start:end].tolist() == list(range(end - start))
            for span in sample.prompt.spans:
                assert next(spans) == Span(number, start + span.start, span.length)
            start = end
        assert not batch.loss_mask[number, start:].any()
        assert not batch.input_ids[number, start:].any()
        assert not batch.position_ids[number, start:].any()
    assert batch.num_valid == int(batch.loss_mask.sum())
    assert batch.input_ids.shape[1] == rounded(max(map(sum, batch.segments)))


def test_long_samples_come_first_and_short_ones_fill_the_rows():
    assert pack([300, 900, 400, 700, 600], 1024) == [[1], [3, 0], [4, 2]]


def test_a_sample_that_fills_the_rest_of_a_row_exactly_goes_into_it():
    assert pack([60, 40], 100) == [[0, 1]]
    assert pack([100], 100) == [[0]]


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 250))
def test_every_sample_is_in_one_row_that_has_room(lengths, room):
    bins = pack(lengths, room)
    assert sorted(i for numbers in bins for i in numbers) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in numbers) for numbers in bins]
    assert all(used <= room for used in sums)
    assert sum(used <= room / 2 for used in sums) <= 1  # two of those would have been one


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ConfigError, match="sample of 30 positions does not fit into a row of 20"):
        pack([3, 30], 20)

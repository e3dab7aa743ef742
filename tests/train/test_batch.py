import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.train.batch import by_length, collate
from lapilli.train.order import draw_indices


def test_rows_are_padded_on_the_right():
    first = EncodedPrompt([1, 0, 0, 7], [False, False, False, True], (Span(0, 1, 2),))
    second = EncodedPrompt([1, 5], [True, True])
    batch = collate([first, second], [[torch.ones(2, 3)], []])
    assert batch.input_ids.tolist() == [[1, 0, 0, 7], [1, 5, PLACEHOLDER, PLACEHOLDER]]
    assert batch.loss_mask.tolist() == [[False, False, False, True], [False, True, False, False]]
    assert batch.num_valid == 2
    assert batch.spans == (Span(0, 1, 2),)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2


def test_spans_name_their_row():
    prompt = EncodedPrompt([0, 0, 3], [False, False, True], (Span(0, 0, 2),))
    batch = collate([prompt, prompt], [[torch.zeros(2, 3)], [torch.ones(2, 3)]])
    assert [span.row for span in batch.spans] == [0, 1]
    assert batch.media[1].sum() == 6


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_groups_hold_every_row_once_by_length(lengths, pieces):
    groups = by_length(lengths, pieces)
    rows = [row for group in groups for row in group]
    assert sorted(rows) == list(range(len(lengths)))
    ordered = [lengths[row] for row in rows]
    assert ordered == sorted(lengths, reverse=True)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_every_epoch_sees_every_sample_once(num_samples, batch_size, seed):
    number = -(-3 * num_samples // batch_size)
    seen = [
        int(i)
        for step in range(number)
        for i in draw_indices(num_samples, batch_size, step, seed=seed)
    ]
    for epoch in range(3):
        part = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(num_samples))

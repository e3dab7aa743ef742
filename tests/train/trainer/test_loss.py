import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lapilli.train.trainer.loss import cross_entropy_sum, noisy, noisy_samples, scales, supervised


def test_a_position_predicts_its_successor():
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 0]])
    mask = torch.tensor([[False, False, True, True], [True, True, False, False]])
    where, targets = supervised(ids, mask)
    assert where.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert targets.tolist() == [7, 8, 2]


def test_tokens_and_llava_differ_only_in_weights():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9), torch.randint(9, (6,))
    parts = [(logits[:1], targets[:1]), (logits[1:], targets[1:])]
    sums = [cross_entropy_sum(*part) for part in parts]
    by_token = sum(s * w for s, w in zip(sums, scales([1, 5], "tokens"), strict=True))
    torch.testing.assert_close(by_token, F.cross_entropy(logits, targets))
    by_batch = sum(s * w for s, w in zip(sums, scales([1, 5], "llava"), strict=True))
    means = [F.cross_entropy(*part) for part in parts]
    torch.testing.assert_close(by_batch, (means[0] + means[1]) / 2)


def test_nothing_supervised_is_an_error():
    with pytest.raises(ValueError, match=r"no supervised token among 2 micro-batches"):
        scales([0, 0], "tokens")
    with pytest.raises(ValueError, match=r"\[3, 0\]"):
        scales([3, 0], "llava")
    assert scales([3, 0], "tokens") == [1 / 3, 1 / 3]


WIDTH = 64


def test_every_sample_of_a_packed_row_has_its_own_size():
    torch.manual_seed(0)
    segments = ((40, 10), (25,))
    moved = noisy_samples(torch.ones(2, 60, WIDTH), segments, 5.0) - 1
    for row, start, length in ((0, 0, 40), (0, 40, 10), (1, 0, 25)):
        limit = 5.0 / (length * WIDTH) ** 0.5
        part = moved[row, start : start + length]
        assert 0.98 * limit < part.abs().max() <= limit * 1.0001
        assert part.mean().abs() < 0.05 * limit  # to both sides
        assert part.abs().mean() == pytest.approx(limit / 2, rel=0.1)
    assert not moved[0, 50:].any()
    assert not moved[1, 25:].any()


def test_a_picture_has_the_size_of_its_features():
    torch.manual_seed(0)
    moved = noisy(torch.zeros(100, WIDTH), 5.0)
    limit = 5.0 / (100 * WIDTH) ** 0.5
    assert 0.98 * limit < moved.abs().max() <= limit * 1.0001

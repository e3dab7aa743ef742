"""Noise of NEFTune: the size is that of a sample's own positions, whatever row it stands in."""

import pytest
import torch

from lapilli.train.trainer.loss import noisy, noisy_samples

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

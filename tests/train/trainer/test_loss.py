import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lapilli.train.trainer.loss import cross_entropy_sum, scales, supervised


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

"""Labels of several tokens: probabilities along their way, and sequences that cannot be told."""

import math

import pytest
import torch

from lapilli.errors import PromptError
from lapilli.pipeline.labels import LabelTree


def test_probabilities_are_products_along_the_way():
    tree = LabelTree([[(7, 1, 2)], [(7, 1, 3), (7, 4)], [(7, 5)]], ["a", "b", "c"])
    assert tree.lead == (7,)
    assert tree.nodes == {(7,): [1, 4, 5], (7, 1): [2, 3]}
    logits = {(7,): torch.tensor([2.0, 3.0, 5.0]).log(), (7, 1): torch.tensor([1.0, 3.0]).log()}
    assert tree.probabilities(logits) == pytest.approx((0.2 * 0.25, 0.2 * 0.75 + 0.3, 0.5))
    assert math.fsum(tree.probabilities(logits)) == pytest.approx(1)


def test_a_way_without_a_choice_has_probability_one():
    tree = LabelTree([[(1, 2, 3)], [(4,)]], ["a", "b"])
    assert tree.lead == ()
    assert tree.probabilities({(): torch.zeros(2)}) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[(1,)], [()]], "the label 'b' has no tokens"),
        ([[(1,)], [(1,)]], "the labels 'a' and 'b' are the same tokens"),
        ([[(1,)], [(1, 2)]], "the tokens of the label 'a' are the beginning of another"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(labels, message):
    with pytest.raises(PromptError, match=message):
        LabelTree(labels, ["a", "b"])

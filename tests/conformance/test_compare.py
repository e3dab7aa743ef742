import numpy as np
import pytest
import torch

from lapilli.errors import MediaError
from tests.conformance.compare import Check, first_difference


def test_values_within_the_tolerance_are_close() -> None:
    check = Check()
    assert check.close("x", torch.tensor([1.0, 2.0]), [1.0, 2.0 + 9e-5], atol=1e-4)
    assert (check.worst_name, check.failures) == ("x", [])
    assert check.worst == pytest.approx(9e-5)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.1]),
        ([1.0], [1.0, 1.0]),
        ([float("nan")], [1.0]),
        ([1.0], ["nan"]),
        ([float("inf")], ["-inf"]),
    ],
)
def test_values_that_are_not_close(found: list[float], expected: list[object]) -> None:
    check = Check()
    assert not check.close("x", found, expected, atol=1e-4)
    assert check.failures[0].startswith("x: expected")


def test_special_values_are_equal_to_themselves() -> None:
    check = Check()
    assert check.close("x", [float("nan"), float("inf")], ["nan", "inf"], atol=1e-4)


def test_a_share_of_outliers_is_allowed() -> None:
    values = np.zeros(100)
    far = values.copy()
    far[0] = 1
    assert Check().mostly_close("x", far, values, atol=1e-4, outliers=0.01)
    far[1] = 1
    check = Check()
    assert not check.mostly_close("x", far, values, atol=1e-4, outliers=0.01)
    assert check.failures == ["x: 2.00% of the values differ by more than 0.0001"]


def test_an_error_of_the_same_kind_or_on_purpose_is_right() -> None:
    def fails(error: Exception) -> None:
        raise error

    assert Check().raises("IndexError", lambda: fails(IndexError()))
    assert Check().raises("IndexError", lambda: fails(MediaError("no")))
    check = Check()
    assert not check.raises("IndexError", lambda: fails(AttributeError("oops")))
    assert not check.raises("IndexError", lambda: 3)
    assert check.failures == [
        "expected IndexError, raised AttributeError: oops",
        "expected IndexError, found an answer: 3",
    ]


def test_the_first_difference_is_named() -> None:
    assert first_difference([1, [2, 3]], [1, [2, 4]]) == "[1][1] expected 4, found 3"
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ".b is missing"
    assert first_difference([1], [1, 2]) == " expected length 2, found 1"

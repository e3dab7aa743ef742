import pytest

from lapilli.compat.m4c_evaluator import (
    EvalAIAnswerProcessor,
    STVQAAccuracyEvaluator,
    STVQAANLSEvaluator,
    TextVQAAccuracyEvaluator,
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Red Bus.", "red bus"),
        ("two", "2"),
        ("None", "0"),
        ("dont walk", "don't walk"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("1,000 dollars", "1000 dollars"),
        ("coca-cola", "coca cola"),
        ("coca- cola", "coca cola"),
        ("john's", "john 's"),
        ("3.50.", "3.50"),
        ("a\nb\tc", "b c"),
        ("what?", "what"),
    ],
)
def test_answers_are_brought_into_one_form(answer: str, expected: str) -> None:
    assert EvalAIAnswerProcessor()(answer) == expected


def test_soft_accuracy() -> None:
    people = ["red"] * 2 + ["Blue."] * 4 + ["green"] * 4
    score = TextVQAAccuracyEvaluator().eval_pred_list
    assert score([{"pred_answer": "blue", "gt_answers": people}]) == pytest.approx(1.0)
    # Of ten, the two who said red find one other each, the eight others find two.
    expected = (2 * 1 / 3 + 8 * 2 / 3) / 10
    assert score([{"pred_answer": "red", "gt_answers": people}]) == pytest.approx(expected)
    assert score([{"pred_answer": "black", "gt_answers": people}]) == 0
    with pytest.raises(AssertionError, match="expected 10"):
        score([{"pred_answer": "red", "gt_answers": ["red"]}])


def test_scene_text() -> None:
    entries = [{"pred_answer": "Hotel!", "gt_answers": ["hotel", "motel"]}]
    entries.append({"pred_answer": "bar", "gt_answers": ["hotel"]})
    assert STVQAAccuracyEvaluator().eval_pred_list(entries) == 0.5
    assert STVQAANLSEvaluator().get_anls("hotel", "Hotal") == pytest.approx(0.8)
    assert STVQAANLSEvaluator().eval_pred_list(entries) == pytest.approx((5 / 6) / 2)

"""Scores of TextVQA and ST-VQA (llava.eval.m4c_evaluator): how answers are brought into one form.

Source: the normalisation of the VQA challenge as the original's scripts apply it, its oddities
included: a mark is dropped where a space is beside it anywhere in the text, else becomes a space.
"""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

_WORDS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't "
    "mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't "
    "she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd "
    "there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll "
    "y'all'd've you'd you'd've you'll you're you've"
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


class EvalAIAnswerProcessor:
    """Brings an answer into the form in which answers are compared."""

    CONTRACTIONS: Mapping[str, str] = {
        **{key: word for word in _WORDS.split() for key in _without_one_apostrophe(word)},
        "somebody'd": "somebodyd",
    }
    NUMBER_MAP: Mapping[str, str] = {
        "none": "0",
        **{word: str(number) for number, word in enumerate(_NUMBERS)},
    }
    ARTICLES = ("a", "an", "the")
    PERIOD_STRIP = re.compile(r"(?!<=\d)(\.)(?!\d)")
    COMMA_STRIP = re.compile(r"(?<=\d)(\,)+(?=\d)")
    PUNCTUATIONS = tuple(';/[]"{}()=+\\_-><@`,?!')

    def word_tokenize(self, word: str) -> str:
        """Return the text in small letters, without commas and question marks."""
        return word.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()

    def process_punctuation(self, in_text: str) -> str:
        """Return the text without punctuation."""
        has_number = self.COMMA_STRIP.search(in_text) is not None
        text = in_text
        for mark in self.PUNCTUATIONS:
            is_edge = f"{mark} " in in_text or f" {mark}" in in_text
            text = text.replace(mark, "" if is_edge or has_number else " ")
        # The original hands a flag (of the value 32) over as the number of replacements.
        return self.PERIOD_STRIP.sub("", text, count=int(re.UNICODE))

    def process_digit_article(self, in_text: str) -> str:
        """Return the text with numbers as digits, without articles, with apostrophes."""
        words = [self.NUMBER_MAP.get(word, word) for word in in_text.lower().split()]
        kept = [word for word in words if word not in self.ARTICLES]
        return " ".join(self.CONTRACTIONS.get(word, word) for word in kept)

    def __call__(self, item: str) -> str:
        """Return the answer in its one form."""
        text = self.word_tokenize(item).replace("\n", " ").replace("\t", " ").strip()
        return self.process_digit_article(self.process_punctuation(text))


class TextVQAAccuracyEvaluator:
    """Soft accuracy: how many of the nine other people agree, three being enough."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def _compute_answer_scores(self, raw_answers: Sequence[str]) -> dict[str, float]:
        if len(raw_answers) != 10:
            raise AssertionError(f"{len(raw_answers)} answers of people: expected 10")
        answers = [self.answer_processor(answer) for answer in raw_answers]
        return {
            answer: fmean(
                min(1.0, (answers.count(answer) - (other == answer)) / 3) for other in answers
            )
            for answer in set(answers)
        }

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Return the mean score of {"pred_answer", "gt_answers"}."""
        return fmean(
            self._compute_answer_scores(entry["gt_answers"]).get(
                self.answer_processor(entry["pred_answer"]), 0.0
            )
            for entry in pred_list
        )


class STVQAAccuracyEvaluator:
    """Share of the answers that one of the people gave."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Return the share of {"pred_answer", "gt_answers"} that are right."""
        return fmean(
            float(
                self.answer_processor(entry["pred_answer"])
                in [self.answer_processor(answer) for answer in entry["gt_answers"]]
            )
            for entry in pred_list
        )


class STVQAANLSEvaluator:
    """Normalised similarity of letters to the nearest answer, 0 below one half."""

    def get_anls(self, s1: str, s2: str) -> float:
        """Return 1 - edits / length, or 0 where that is below one half."""
        s1, s2 = s1.lower().strip(), s2.lower().strip()
        share = 1 - _edits(s1, s2) / max(len(s1), len(s2))
        return share if share >= 0.5 else 0.0

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Return the mean over {"pred_answer", "gt_answers"}."""
        return fmean(
            max(self.get_anls(entry["pred_answer"], answer) for answer in entry["gt_answers"])
            for entry in pred_list
        )


def _edits(first: str, second: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        last, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]

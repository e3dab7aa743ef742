import math

import pytest

from lapilli.config.generation import SamplingParams, check_count, check_number
from lapilli.errors import GenerationError


def test_defaults_are_greedy():
    params = SamplingParams()
    assert params.is_greedy
    assert params.max_new_tokens == 512


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": True}, r"max_new_tokens .* got True"),
        ({"num_beams": 0}, r"num_beams .* at least 1, got 0"),
        ({"top_k": 0}, r"top_k .* at least 1, got 0"),
        ({"logprobs": -1}, r"logprobs .* at least 0, got -1"),
        ({"temperature": -0.1}, r"temperature must be in \[0, inf\), got -0.1"),
        ({"temperature": math.nan}, r"temperature .* got nan"),
        ({"temperature": math.inf}, r"temperature .* got inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p .* got 1.1"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be in \(0, inf\), got 0.0"),
        ({"length_penalty": math.nan}, r"length_penalty .* got nan"),
        ({"stop": ("",)}, r"stop must hold non-empty strings"),
        ({"stop_token_ids": (-1,)}, r"stop_token_ids must be .* at least 0, got -1"),
    ],
)
def test_impossible_values_are_refused(options, match):
    with pytest.raises(GenerationError, match=match):
        SamplingParams(**options)


@pytest.mark.parametrize("value", [1.5, True, "4", None])
def test_counts_are_whole_numbers(value):
    with pytest.raises(GenerationError, match="num_beams must be a whole number of at least 1"):
        check_count("num_beams", value, least=1)


@pytest.mark.parametrize("value", ["hot", True, None])
def test_numbers_are_numbers(value):
    with pytest.raises(GenerationError, match=f"temperature must be a number, got {value!r}"):
        check_number("temperature", value, 0.0, 1.0)


def test_options_accept_one_stop_string_and_lists():
    params = SamplingParams.from_options(stop="###", stop_token_ids=[2, 3], top_p=0.9)
    assert params.stop == ("###",)
    assert params.stop_token_ids == (2, 3)
    assert params.updated(top_p=None).top_p is None


def test_unknown_option_is_named():
    with pytest.raises(GenerationError, match=r"unknown sampling option topp: choose from .*top_p"):
        SamplingParams.from_options(topp=0.9)

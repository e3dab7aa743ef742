"""Options of a request over those of the server."""

from lapilli.config.generation import SamplingParams
from lapilli.serve.sampling import SamplingBody


def test_what_a_request_does_not_say_is_the_server_s():
    base = SamplingParams(
        temperature=0.5, logit_bias={2: -100.0}, stop=("x",), seed=3, max_new_tokens=7, top_k=4
    )
    assert SamplingBody().params(base) == base


def test_what_it_says_counts():
    base = SamplingParams(logit_bias={2: -100.0})
    assert SamplingBody(logit_bias={"5": 1.0}).params(base).logit_bias == {5: 1.0}

"""Errors: which status a kind of error has, and how each protocol says it."""

import pytest

from lapilli import errors
from lapilli.serve.errors import ApiError, UnknownMediumError, api_error, dialect_of


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (errors.BusyError, 429, "too_many_requests"),
        (errors.ClosedError, 503, "unavailable"),
        (errors.ModelFailedError, 500, "model_failed"),
        (UnknownMediumError, 404, "not_found"),
        (errors.MediaTooLargeError, 413, "too_large"),
        (errors.MediaError, 400, "invalid_image"),
        (errors.ContextTooLongError, 400, "context_length_exceeded"),
        (errors.StoreError, 404, "unknown_id"),
        (errors.GrammarError, 400, "GrammarError"),
        (errors.GenerationError, 400, "GenerationError"),
    ],
)
def test_the_status_follows_from_the_kind_of_error(kind, status, code):
    found = api_error(kind("the model failed, more than the limit of 3, the engine is closed"))
    assert (found.status, found.code) == (status, code)


def test_a_kind_that_is_not_in_the_table_is_told_as_its_nearest():
    class LateError(errors.MediaTooLargeError):
        pass

    assert api_error(LateError("late")).status == 413


@pytest.mark.parametrize(("kind", "seconds"), [(errors.BusyError, "1"), (errors.ClosedError, "5")])
def test_an_error_that_passes_says_when_to_ask_again(kind, seconds):
    assert api_error(kind("wait")).headers == {"Retry-After": seconds}


def test_what_nobody_foresaw_has_its_name_and_no_other_kind_of_status():
    found = api_error(ZeroDivisionError("by zero"))
    assert (found.status, found.message) == (500, "the server failed: ZeroDivisionError: by zero")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat", {"message": "no", "type": "not_found_error", "param": "p", "code": "c"}),
        ("/v1/messages", {"type": "not_found_error", "message": "no"}),
        ("/api/chat", "no"),
    ],
)
def test_every_protocol_says_an_error_in_its_shape(path, body):
    assert ApiError(404, "no", "c", "p").body(dialect_of(path))["error"] == body

"""Errors: which status a kind of error has, and how each protocol says it."""

import base64

import pytest

from lapilli import errors
from lapilli.serve.errors import ApiError, UnknownMediumError, api_error, dialect_of
from tests.serve.conftest import asked, data_uri


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


TURN = {"role": "user", "content": "a"}
NO_PICTURE = base64.b64encode(b"just some text").decode()


def refused(client, path, body):
    """Return what is said, and the field that is named."""
    response = client.post(path, json={"model": "pebble", **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    if isinstance(error, str):
        return error, None
    return error["message"], error.get("param")


@pytest.mark.parametrize(
    ("path", "body", "name", "has_param"),
    [
        ("/v1/chat/completions", {"messages": [TURN], "max_tokens": 0}, "max_tokens", True),
        (
            "/v1/chat/completions",
            {"messages": [TURN], "max_completion_tokens": 0},
            "max_completion_tokens",
            True,
        ),
        ("/v1/chat/completions", {"messages": [TURN], "top_p": 3}, "top_p", True),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", True),
        ("/v1/responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens", True),
        ("/v1/messages", {"messages": [TURN], "max_tokens": 0}, "max_tokens", False),
        (
            "/v1/messages",
            {"messages": [TURN], "max_tokens": 1, "stop_sequences": [""]},
            "stop_sequences",
            False,
        ),
        (
            "/api/chat",
            {"messages": [TURN], "options": {"num_predict": 0}},
            "options.num_predict",
            False,
        ),
        (
            "/api/chat",
            {"messages": [TURN], "options": {"repeat_penalty": -1}},
            "options.repeat_penalty",
            False,
        ),
        ("/worker_generate_stream", {"prompt": "a", "top_p": 2}, "top_p", True),
    ],
)
def test_an_option_has_the_name_that_its_client_wrote(client, path, body, name, has_param):
    message, param = refused(client, path, body)
    assert message.startswith(f"{name} must ")
    assert "max_new_tokens" not in message
    assert param == (name if has_param else None)


def anthropic(source):
    block = {"type": "image", "source": source}
    return {"max_tokens": 2, "messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    ("path", "body", "match"),
    [
        ("/api/generate", {"prompt": "a", "images": ["%"]}, "images[0] '%' is no"),
        ("/api/chat", {"messages": [TURN | {"images": [NO_PICTURE, "%"]}]}, "no picture"),
        ("/api/chat", {"messages": [TURN, TURN | {"images": ["%"]}]}, "messages[1].images[0] '%'"),
        (
            "/api/generate",
            {"prompt": "a", "images": ["http://example.com/a.png"]},
            "images[0]: this server fetches no pictures from URLs: send the picture in base64",
        ),
        (
            "/v1/messages",
            anthropic({"type": "url", "url": "http://example.com/a.png"}),
            "messages.0.content.0.source.url: this server fetches no pictures from URLs: send a "
            "source of the type base64",
        ),
        (
            "/v1/messages",
            anthropic({"type": "base64", "media_type": "image/png", "data": "%%%%"}),
            "messages.0.content.0.source.data '%%%%' is no base64",
        ),
        (
            "/rerank",
            {"query": "a", "documents": ["b", {"image": "http://example.com/a.png"}]},
            "documents[1].image: this server fetches no pictures",
        ),
        (
            "/worker_generate_stream",
            {"prompt": "<image>", "images": ["%"]},
            "images[0] '%' is no",
        ),
        ("/v1/chat/completions", asked("a", "http://example.com/a.png"), "image_url: this server"),
    ],
)
def test_a_picture_has_the_name_that_its_client_wrote(client, path, body, match):
    message, _ = refused(client, path, body)
    assert match in message


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", asked("a", data_uri(b"no picture")), "messages"),
        ("/v1/responses", {"input": asked("a", data_uri(b"no picture"))["messages"]}, "input"),
        ("/v1/completions", {"prompt": [5] * 3000}, "prompt"),
        ("/v1/embeddings", {"input": "red " * 3000}, "input"),
        ("/rerank", {"query": "a", "documents": [{"image": data_uri(b"no picture")}]}, None),
    ],
)
def test_the_field_of_an_error_is_one_of_its_route(client, path, body, param):
    assert refused(client, path, body)[1] == param


def test_an_upload_s_error_is_of_its_file(client):
    response = client.post("/v1/files", files={"file": ("a.png", b"nothing", "image/png")})
    assert response.json()["error"]["param"] == "file"
    assert client.get("/v1/files/file-none").json()["error"]["param"] is None

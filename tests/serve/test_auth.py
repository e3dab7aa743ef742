"""Keys, limits of their owners, bodies and hosts: what stands before every route."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from lapilli.config.generation import SamplingParams
from lapilli.errors import ConfigError
from lapilli.serve.auth import OPEN_PATHS
from lapilli.serve.options import ApiKey, Limits, ServeOptions, keys_of
from tests.serve.conftest import KEY, asked, data_uri, picture

BEARER = {"Authorization": f"Bearer {KEY}"}
KEYS = (ApiKey(key=KEY, name="anna"), ApiKey(key="secret-2", name="ben"))


def routes_of(app):
    """Return (method, path) of every route, whichever router holds it."""
    routers = [getattr(route, "original_router", None) for route in app.routes]
    routes = [*app.routes, *(route for router in routers if router for route in router.routes)]
    found = [
        (method, route.path) for route in routes for method in getattr(route, "methods", None) or ()
    ]
    assert {("POST", "/v1/chat/completions"), ("GET", "/health")} < set(found)
    return found


def test_every_route_asks_for_the_key_but_those_that_are_named(serve):
    client = serve(keys=KEYS)
    for method, path in routes_of(client.app):
        filled = path.replace("{name:path}", "x").replace("{file_id}", "x")
        code = client.request(method, filled).status_code
        if path in OPEN_PATHS:
            assert code != 401, path
        elif method != "OPTIONS":
            assert code == 401, (method, path)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"x-api-key": ""},
        {"Authorization": f"Bearer {KEY}x"},
    ],
)
def test_another_key_is_refused(serve, headers):
    client = serve(keys=KEYS)
    response = client.get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in response.text


@pytest.mark.parametrize(
    "headers", [BEARER, {"x-api-key": KEY}, {"authorization": f"bearer {KEY}"}]
)
def test_the_key_opens(serve, headers):
    assert serve(keys=KEYS).get("/v1/models", headers=headers).status_code == 200


def test_a_route_that_is_not_there_is_no_secret_to_learn(serve):
    client = serve(keys=KEYS)
    assert client.get("/nothing").status_code == 401
    assert client.get("/nothing", headers=BEARER).status_code == 404


def test_an_owner_with_a_rate_is_told_when_to_come_again(serve):
    client = serve(keys=(ApiKey(key=KEY, name="anna", requests_per_minute=3), KEYS[1]))
    codes = [client.get("/v1/models", headers=BEARER) for _ in range(5)]
    assert [one.status_code for one in codes] == [200, 200, 200, 429, 429]
    assert 1 <= int(codes[-1].headers["Retry-After"]) <= 21
    assert client.get("/v1/models", headers={"x-api-key": "secret-2"}).status_code == 200


def test_an_owner_has_so_many_requests_at_the_same_time(serve):
    client = serve(keys=(ApiKey(key=KEY, name="anna", concurrent=1),))
    body = asked("What is in this picture?", data_uri(picture()), max_tokens=400, temperature=2.0)
    body["logit_bias"] = {"2": -100}  # no end token: the answer is long

    def ask(_):
        return client.post("/v1/chat/completions", json=body, headers=BEARER).status_code

    with ThreadPoolExecutor(4) as threads:
        codes = sorted(threads.map(ask, range(4)))
    assert codes[0] == 200
    assert codes[-1] == 429
    assert ask(0) == 200  # afterwards there is room again


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example"])
def test_a_name_of_a_web_page_does_not_lead_to_an_open_server(client, host):
    response = client.get("/v1/models", headers={"Host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "forbidden_host"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000"])
def test_names_of_this_machine_do(client, host):
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_page_may_send_without_asking_is_no_request(client, kind):
    response = client.post(
        "/v1/chat/completions", content=json.dumps(asked("Hi")), headers={"Content-Type": kind}
    )
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


def test_a_body_over_the_limit_is_413_whether_it_says_so_or_not(serve):
    client = serve(limits=Limits(body_bytes=10_000))
    body = json.dumps(asked("x" * 20_000)).encode()
    headers = {"Content-Type": "application/json"}
    said = client.post("/v1/chat/completions", content=body, headers=headers)
    assert said.status_code == 413
    assert "10000 bytes" in said.json()["error"]["message"]
    # In chunks, without a length.
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
    pieces = iter([body[at : at + 1000] for at in range(0, len(body), 1000)])
    connection.request("POST", "/v1/chat/completions", pieces, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert client.get("/health").status_code == 200


def test_an_address_that_others_reach_needs_a_key():
    with pytest.raises(ConfigError, match="no API key: give --api-key"):
        ServeOptions(host="0.0.0.0")
    ServeOptions(host="0.0.0.0", keys=KEYS)
    ServeOptions(host="0.0.0.0", without_key=True)


def test_keys_of_the_command_line_may_have_limits(monkeypatch):
    monkeypatch.delenv("LAPILLI_API_KEY", raising=False)
    assert keys_of([]) == ()
    [plain] = keys_of(["abc"])
    assert (plain.key, plain.requests_per_minute) == ("abc", 0)
    [named] = keys_of(["anna=abc:60:4"])
    assert named == ApiKey(key="abc", name="anna", requests_per_minute=60, concurrent=4)
    [few] = keys_of(["anna=abc::4"])
    assert (few.requests_per_minute, few.concurrent) == (0, 4)
    for limits in ("fast", "0", "1:0", "-1", "1.5", "1:2:3"):
        with pytest.raises(ConfigError, match="whole numbers above 0") as caught:
            keys_of([f"anna=abc:{limits}"])
        assert "abc" not in str(caught.value)
    for strange in ("=abc", " =abc", "anna=abc=", "a=b=c"):
        with pytest.raises(ConfigError, match="without '='"):
            keys_of([strange])
    monkeypatch.setenv("LAPILLI_API_KEY", "one,two")
    assert [key.key for key in keys_of([])] == ["one", "two"]


def test_beams_are_refused_before_a_request_asks_for_them():
    with pytest.raises(ConfigError, match="a server does not search by beams"):
        ServeOptions(sampling=SamplingParams(num_beams=4))

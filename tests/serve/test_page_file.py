"""The file of the page: built from its sources, sent with headers that let it do no more."""

import base64
import hashlib
import re
from importlib.resources import files

from lapilli.serve.options import ApiKey
from tests.conftest import REPOSITORY
from tests.serve.conftest import KEY

WEB = REPOSITORY / "web"
NAMES = ("index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts")
PAGE = files("lapilli.serve").joinpath("page.html")


def source_digest() -> str:
    """Return what web/vite.config.ts writes into the file."""
    sources = [f"src/{path.name}" for path in (WEB / "src").iterdir()]
    digest = hashlib.sha256()
    for name in sorted([*NAMES, *sources]):
        text = (WEB / name).read_text("utf-8").encode()
        digest.update(f"{name}\n{len(text)}\n".encode() + text)
    return digest.hexdigest()


def policy(client):
    sent = client.get("/").headers["content-security-policy"]
    return {name: values for name, *values in (part.split() for part in sent.split("; "))}


def test_the_page_is_not_older_than_its_sources():
    [built_from] = re.findall(
        r'<meta name="lapilli-sources" content="(\w+)">', PAGE.read_text("utf-8")
    )
    assert built_from == source_digest(), "web/ has changed: cd web; npm ci; npm run build"


def test_the_lock_of_the_page_names_no_machine_and_no_registry():
    lock = (WEB / "package-lock.json").read_text("utf-8")
    assert '"integrity"' in lock
    assert "resolved" not in lock
    assert "file:" not in lock


def test_the_page_is_served_without_a_key(serve):
    guarded = serve(keys=(ApiKey(key=KEY),))
    assert guarded.get("/v1/models").status_code == 401
    assert guarded.get("/").headers["content-type"].startswith("text/html")


def test_the_page_may_do_what_it_must_and_no_more(client):
    found = policy(client)
    assert found["default-src"] == ["'none'"]
    assert found["connect-src"] == ["'self'"]
    assert found["img-src"] == ["'self'", "data:", "blob:"]
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert found[name] == ["'none'"]
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        bodies = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", PAGE.read_text("utf-8"), re.DOTALL)
        digests = [hashlib.sha256(body.encode()).digest() for body in bodies]
        assert found[name] == [f"'sha256-{base64.b64encode(one).decode()}'" for one in digests]
    headers = client.get("/").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_the_page_loads_nothing_else():
    html = PAGE.read_text("utf-8")
    head = re.sub(r"<(script|style)\b([^>]*)>.*?</\1>", r"<\1\2>", html, flags=re.DOTALL)
    assert not re.findall(r'\b(?:src|href)="(?!data:,")', head)


def test_a_browser_asks_whether_its_copy_is_the_newest(client):
    first = client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert not again.content
    assert client.get("/", headers={"If-None-Match": '"another"'}).status_code == 200

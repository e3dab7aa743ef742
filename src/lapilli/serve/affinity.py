"""Affinity: which requests look at the same thing, so that one engine's cache serves them.

    body -> the first picture: its uuid, its bytes or its URL; without one the beginning of the text

Knows bodies of all protocols by the names of their fields; must not know engines.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from lapilli.serve.files import Files

_FILE = "file-"


def prefix_key(body: bytes, owner: str = "") -> str:
    """Return a text that requests share whose prompts begin with the same picture, or text.

    A uuid goes before the picture's bytes, since later requests may name the uuid alone. A body
    that is no JSON object has a key too.

    Args:
        body: of a request.
        owner: whose key it came with; uuids belong to it.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return _digest(body)
    for name, value in _pictures(found):
        return _digest(f"{owner if name == 'uuid' else ''}\0{value}".encode("utf-8", "replace"))
    return _digest(_first_text(found).encode("utf-8", "replace"))


def with_files(body: bytes, files: Files, owner: str) -> bytes:
    """Return a body in which uploaded files stand as data, for an engine that has no files.

    Raises:
        UnknownMediumError: a file that is not there.
    """
    if _FILE.encode() not in body:
        return body
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return body
    return json.dumps(_filled(found, files, owner)).encode()


def _filled(value: object, files: Files, owner: str) -> object:
    if isinstance(value, list):
        return [_filled(each, files, owner) for each in value]
    if not isinstance(value, dict):
        return value
    value = {name: _filled(each, files, owner) for name, each in value.items()}
    if isinstance(file_id := value.get("file_id"), str):
        del value["file_id"]
        value["image_url"] = {"url": _uri(files.content(file_id, owner))}
    url = value.get("image_url")
    if isinstance(url, str) and url.startswith(_FILE):
        value["image_url"] = _uri(files.content(url, owner))
    elif isinstance(url, dict) and str(url.get("url")).startswith(_FILE):
        value["image_url"] = url | {"url": _uri(files.content(url["url"], owner))}
    return value


def _uri(data: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


def _pictures(value: object) -> Iterator[tuple[str, str]]:
    """Yield what pictures are called or hold, in the order in which they stand."""
    if isinstance(value, list):
        for each in value:
            yield from _pictures(each)
    elif isinstance(value, dict):
        yield from _own_pictures(value)
        for name, each in value.items():
            if name not in ("image_url", "source", "images"):
                yield from _pictures(each)


def _own_pictures(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the pictures of one part, in the forms of OpenAI, Anthropic and Ollama."""
    url, source, images = value.get("image_url"), value.get("source"), value.get("images")
    inner = url if isinstance(url, dict) else {"url": url}
    uuid = value.get("uuid") or inner.get("uuid")
    if isinstance(uuid, str):
        yield "uuid", uuid
    held = [inner.get("url"), value.get("image_embeds")]
    held += [source.get("data")] if isinstance(source, dict) else []
    held += images if isinstance(images, list) else []
    for one in held:
        if isinstance(one, str) and one:
            yield "held", one.partition(",")[2] if one.startswith("data:") else one


def _first_text(value: object) -> str:
    """Return the instructions of a conversation, or its first turn, or the prompt."""
    if not isinstance(value, dict):
        return json.dumps(value)
    messages = value.get("messages")
    if isinstance(messages, list) and messages:
        return json.dumps(messages[0])
    return json.dumps(value.get("system") or value.get("prompt") or value)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()

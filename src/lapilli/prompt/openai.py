"""Messages in OpenAI's form, as data of JSON: roles, and texts and pictures in order.

    [{"role": "system", "content": "Be brief."},
     {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                  {"type": "text", "text": "What is it?"}]}]

Knows nothing of files and URLs: what stands for a picture is passed on untouched.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lapilli.config.reader import shown
from lapilli.errors import PromptError
from lapilli.prompt.message import MediaPart, Message, Part, TextPart, joined

ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
TEXTS: Final = ("text", "input_text", "output_text")
PICTURES: Final = ("image_url", "input_image", "image")
_KEYS_OF_A_MESSAGE: Final = frozenset(("role", "content", "name"))
_KEYS_OF_A_PICTURE: Final = frozenset(("type", "image_url", "image", "detail"))


def messages_of(given: object, modalities: Sequence[str] = ()) -> tuple[Message, ...]:
    """Return the messages of a conversation whose last one is the user's.

    As in a server, all instructions join at the beginning, and neighbouring messages of one role
    are one message, since templates know no others.

    Args:
        given: a list of objects with `role` and `content`, a text or a list of parts.
        modalities: names that the checkpoint declares; a part {"type": name, name: value} is a
            medium of it.

    Raises:
        PromptError: another form than this, an unknown key, a picture among the instructions, or a
            conversation with nothing to answer.
    """
    if not isinstance(given, list) or not given:
        raise PromptError(f"messages must be a list of at least one message, got {shown(given)}")
    found: list[Message] = []
    for at, one in enumerate(given):
        where = f"messages[{at}]"
        role, parts = _message(one, where, modalities)
        if role == "system" and any(isinstance(part, MediaPart) for part in parts):
            raise PromptError(f"{where} holds a picture: show it in a message of the user")
        found.append(Message(role, tuple(parts)))
    found = joined(found)
    if found[-1].role != "user":
        raise PromptError("the last of the messages must be the user's: there is nothing to answer")
    if not found[-1].text.strip() and not found[-1].media:
        raise PromptError("the last of the messages is empty: ask something in it")
    return tuple(found)


def _message(given: object, where: str, modalities: Sequence[str]) -> tuple[str, list[Part]]:
    """Return role and parts of a message."""
    row = _object(given, where, _KEYS_OF_A_MESSAGE)
    role, content = row.get("role"), row.get("content")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise PromptError(f"{where} has the role {shown(role)}: expected one of {known}")
    if isinstance(content, str):
        return ROLES[role], [TextPart(content)]
    if not isinstance(content, list):
        raise PromptError(f"{where}: content must be a text or a list, got {shown(content)}")
    parts = [
        _part(part, f"{where}.content[{number}]", modalities) for number, part in enumerate(content)
    ]
    return ROLES[role], parts


def _part(given: object, where: str, modalities: Sequence[str]) -> Part:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind in TEXTS:
        text = _object(given, where, frozenset(("type", "text"))).get("text")
        if not isinstance(text, str):
            raise PromptError(f"{where}: text must be a text, got {shown(text)}")
        return TextPart(text)
    if kind in PICTURES:
        return MediaPart(_picture(_object(given, where, _KEYS_OF_A_PICTURE), where))
    if isinstance(kind, str) and kind in modalities:
        row = _object(given, where, frozenset(("type", kind)))
        if kind not in row:
            raise PromptError(f"{where} has no {shown(kind)}: add the key with the medium")
        return MediaPart(row[kind], kind)
    known = ", ".join((*TEXTS, *PICTURES, *modalities))
    if not isinstance(given, dict):
        raise PromptError(f"{where} must be an object with a type, got {shown(given)}")
    raise PromptError(f"{where} has the type {shown(kind)}: expected one of {known}")


def _picture(row: Mapping[str, Any], where: str) -> str:
    """Return what stands for a picture."""
    named = [name for name in ("image_url", "image") if name in row]
    if len(named) != 1:
        raise PromptError(f"{where} has {len(named)} pictures: expected one, under image_url")
    [name] = named
    url = row[name]
    if isinstance(url, dict):
        url = _object(url, f"{where}.{name}", frozenset(("url", "detail"))).get("url")
    if not isinstance(url, str) or not url:
        raise PromptError(f"{where}: {name} must be a path, a URL or a data URI, got {shown(url)}")
    return url


def _object(given: object, where: str, known: frozenset[str]) -> dict[str, Any]:
    """Return an object without the keys that hold null, as columns of tables have them.

    Raises:
        PromptError: no object, or an unknown key.
    """
    if not isinstance(given, dict):
        raise PromptError(f"{where} must be an object, got {shown(given)}")
    row = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(row.keys() - known)
    if unknown:
        expected = ", ".join(sorted(known))
        raise PromptError(f"{where} has the unknown key {shown(unknown[0])}: expected {expected}")
    return row

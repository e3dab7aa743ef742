"""Records: frozen dataclasses of settings, read from JSON and written as it.

    {"kind": "vector", "width": 64}   read_record -> VectorConfig   write_record -> the same object

The annotation of a field says what its key may hold: numbers, texts, flags, tuples and dataclasses
of these, and a language model as in a config.json of its family.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from lapilli.config.families import family_named, family_of
from lapilli.config.model import DecoderConfig, MptConfig, TextConfig
from lapilli.config.reader import LARGEST, KeyReader, shown
from lapilli.errors import ConfigError, ConfigFileError


def read_record(kind: type, reader: KeyReader, *, extra: frozenset[str] = frozenset()) -> Any:  # noqa: ANN401
    """Return a dataclass of the keys of an object; every key is one of its fields."""
    where = f"{reader.where}: {reader.prefix.removesuffix('.')}"
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    if odd := next((key for key in reader.raw if key not in known.keys() | extra), None):
        raise ConfigFileError(
            f"{where} has a key {shown(odd)}, which nothing reads: expected {', '.join(known)}"
        )
    given: dict[str, object] = {}
    for key, field in known.items():
        if reader.raw.get(key) is not None:
            given[key] = _value(hints[key], reader, key)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigFileError(f"{where}.{key} is missing, expected {_expected(hints[key])}")
    try:
        return kind(**given)
    except ConfigError as error:
        raise ConfigFileError(f"{where}: {error}") from error


_SIMPLE: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def _value(hint: Any, reader: KeyReader, key: str) -> Any:  # noqa: ANN401  of any field
    """Return the value of a key as its field's type."""
    found = reader.value(key)
    hint = _given(hint)
    if hint is TextConfig or hint in get_args(TextConfig):
        child = reader.child(key)
        family = family_named(child.text("model_type", "llama"))
        child.ignored = family.ignored
        return family.parse(child)
    if isinstance(hint, type) and is_dataclass(hint):
        return read_record(hint, reader.child(key))
    if get_origin(hint) is tuple:
        if not isinstance(found, list | tuple):
            raise _wrong(reader, key, "a list", found)
        one = get_args(hint)[0]
        items = KeyReader(
            {f"{key}[{i}]": item for i, item in enumerate(found)},
            reader.where,
            prefix=reader.prefix,
        )
        reader.children.append(items)
        return tuple(_value(one, items, name) for name in items.raw)
    if hint is float and type(found) is int:
        return float(found)
    is_plain = hint in _SIMPLE and type(found) is hint
    if not is_plain or (type(found) is float and not abs(found) < LARGEST):
        raise _wrong(reader, key, _expected(hint), found)
    return found


def _given(hint: Any) -> Any:  # noqa: ANN401  any annotation
    """Return X of X | None, and other annotations as they are."""
    if hint == TextConfig or get_origin(hint) not in (Union, types.UnionType):
        return TextConfig if hint == TextConfig else hint
    kinds = [one for one in get_args(hint) if one is not type(None)]
    return kinds[0] if len(kinds) == 1 else hint


def _expected(hint: Any) -> str:  # noqa: ANN401  any annotation
    hint = _given(hint)
    if get_origin(hint) is tuple:
        return "a list"
    return _SIMPLE.get(hint, "an object")


def _wrong(reader: KeyReader, key: str, expected: str, found: object) -> ConfigFileError:
    return ConfigFileError(
        f"{reader.where}: {reader.prefix}{key} must be {expected}, got {shown(found)}"
    )


def write_record(record: Any) -> dict[str, object]:  # noqa: ANN401  a dataclass
    """Return the fields of a record as JSON has them; those that are None are left out."""
    found = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: _json(value) for name, value in found.items() if value is not None}


def _json(value: object) -> object:
    if isinstance(value, DecoderConfig | MptConfig):
        return {"model_type": value.family, **family_of(value).write(value)}
    if is_dataclass(value):
        return write_record(value)
    return [_json(one) for one in value] if isinstance(value, tuple | list) else value

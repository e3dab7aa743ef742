"""A recipe as TOML: what `load_recipe` reads back; knows dataclasses and text."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lapilli.train.recipe import Recipe


def recipe_text(recipe: Recipe) -> str:
    """Every value that is not None, sections after the keys that stand alone."""
    alone: list[str] = []
    sections: list[str] = []
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            lines = [f"[{field.name}]", *_pairs(_table(value))]
            sections.append("\n".join(lines))
        elif value is not None:
            alone.append(f"{field.name} = {_literal(value)}")
    return "\n\n".join(["\n".join(alone), *sections]) + "\n"


def _table(value: Any) -> dict[str, Any]:  # noqa: ANN401  any dataclass
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_literal(value)}" for key, value in table.items() if value is not None]


def _literal(value: Any) -> str:  # noqa: ANN401  TOML values
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_literal(item) for item in value)}]"
    if dataclasses.is_dataclass(value):
        return _literal(_table(value))
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_pairs(value))} }}" if value else "{}"
    return repr(value)

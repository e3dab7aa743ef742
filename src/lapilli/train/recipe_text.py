"""A recipe as TOML: what `load_recipe` reads back; knows dataclasses and text."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lapilli.train.recipe import Recipe


def recipe_text(recipe: Recipe, *, defaults: bool = True) -> str:
    """Every value that is not None, sections after the keys that stand alone.

    Args:
        recipe: what is written.
        defaults: also the values that a recipe has where it does not name them.
    """
    alone: list[str] = []
    sections: list[str] = []
    for name, value in _table(recipe, defaults=defaults).items():
        if dataclasses.is_dataclass(value):
            sections.append("\n".join([f"[{name}]", *_pairs(value, defaults=defaults)]))
        else:
            alone.append(f"{name} = {_literal(value, defaults=defaults)}")
    return "\n\n".join(["\n".join(alone), *sections]) + "\n"


def _table(value: Any, *, defaults: bool) -> Mapping[str, Any]:  # noqa: ANN401  dataclass or table
    """Its values by name, without those that are None, or that nobody needs to name."""
    if isinstance(value, Mapping):
        return value
    found = {field.name: (getattr(value, field.name), field) for field in dataclasses.fields(value)}
    return {
        name: one
        for name, (one, field) in found.items()
        if one is not None and (defaults or one != _default(field))
    }


def _default(field: dataclasses.Field[Any]) -> Any:  # noqa: ANN401  of any field
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _pairs(value: Any, *, defaults: bool) -> list[str]:  # noqa: ANN401  see _table
    table = _table(value, defaults=defaults)
    return [f"{key} = {_literal(one, defaults=defaults)}" for key, one in table.items()]


def _literal(value: Any, *, defaults: bool) -> str:  # noqa: ANN401  TOML values
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_literal(item, defaults=defaults) for item in value)}]"
    if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
        pairs = _pairs(value, defaults=defaults)
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    return repr(value)

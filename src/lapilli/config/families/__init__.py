"""Language-model families, one file each, by the model_type of their config.json.

A file of this folder that has a `FAMILY` is one of them without being named anywhere else.
"""

import pkgutil
from importlib import import_module

from lapilli.config.families.base import Family
from lapilli.config.model import TextConfig
from lapilli.config.reader import shown
from lapilli.errors import UnsupportedModelError

__all__ = [
    "Family",
    "family_by_class",
    "family_named",
    "family_of",
    "find_family",
    "original_types",
    "register",
    "text_types",
]

_FAMILIES: dict[str, Family] = {}
_DEFAULT = "llama"  # of files that only say "llava"


def register(family: Family) -> Family:
    """Make a family known, in place of one of the same model_type, and return it."""
    _FAMILIES[family.model_type] = family
    return family


def text_types() -> tuple[str, ...]:
    """Return the model_type of every family."""
    return tuple(_FAMILIES)


def original_types() -> dict[str, str]:
    """Return the family of every model_type in the original layout."""
    return {family.original[0]: name for name, family in _FAMILIES.items()}


def find_family(kind: str) -> Family | None:
    """Return the family that a model_type of either layout belongs to, if we have it."""
    kind = original_types().get(kind, kind)
    return _FAMILIES.get(kind) or _FAMILIES.get(kind.removeprefix("llava_"))


def family_named(kind: object, where: str = "config.json") -> Family:
    """Return the family of a model_type.

    Raises:
        UnsupportedModelError: lapilli has no such family.
    """
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise UnsupportedModelError(
            f"{where}: language model type {shown(kind)} is not supported, "
            f"choose from {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[kind]


def family_of(text: TextConfig) -> Family:
    """Return the family of a language model.

    Raises:
        UnsupportedModelError: it is one of transformers, which is only run.
    """
    return family_named(text.family, "the language model")


def family_by_class(architectures: str) -> Family:
    """Return the family that class names speak of, in any case; "qwen3" before "qwen"."""
    lowered = architectures.lower()
    marks = [(mark, family) for family in _FAMILIES.values() for mark in family.marks]
    marks.sort(key=lambda one: -len(one[0]))
    return next((family for mark, family in marks if mark in lowered), _FAMILIES[_DEFAULT])


for _module in pkgutil.iter_modules(__path__):
    _found = getattr(import_module(f"{__name__}.{_module.name}"), "FAMILY", None)
    if isinstance(_found, Family):
        register(_found)

"""Recipe files: TOML read with the command line's options, and written so that it is read back.

    recipes/tiny/align.toml      ->  Recipe(stage, optim, run, model, data)    unknown key = error
    --optim.lr 2e-4              ->  the same recipe with one value replaced (--optim.lr=2e-4 too)

Knows text and dataclasses; no torch.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from lapilli.errors import ConfigError, UnknownKeyError
from lapilli.train.recipe import Recipe
from lapilli.train.recipe.checks import check_idle_keys, default_value

Section = TypeVar("Section")

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_LIKE = 0.85  # of two names that one may have been meant for the other
_LIKE_A_SECTION = 0.7  # there are few of them
# What a key was called until version 1.
_RENAMED = {
    "optim.clip": "optim.max_grad_norm",
    "optim.warmup_share": "optim.warmup_ratio",
    "optim.final_share": "optim.min_lr_ratio",
    "run.accumulate": "run.gradient_accumulation_steps",
}
# What the trainers of transformers and peft call a key.
_OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "max_steps": "run.steps",
    "num_train_epochs": "run.epochs",
    "per_device_train_batch_size": "run.batch_size",
    "logging_steps": "run.log_every",
    "save_steps": "run.save_every",
    "eval_steps": "run.evaluate_every",
    "model_name_or_path": "model.checkpoint",
    "model_max_length": "data.max_length",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "r": "lora.rank",
    "target_modules": "lora.targets",
    "output_dir": "--out",
}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe of a TOML file, with `--section.key value` pairs laid over it.

    Raises:
        ConfigError: no such file, not TOML, a missing section, or a value of another type.
        UnknownKeyError: a section or key that nothing reads, or that another value makes idle.
    """
    recipe = read_recipe(path, Recipe, overrides)
    check_idle_keys(recipe)
    return recipe


def read_recipe(path: Path, kind: type[Section], overrides: Sequence[str] = ()) -> Section:
    """Read a TOML file as a recipe of your own: a dataclass such as a subclass of TrainerRecipe.

    Args:
        path: of the file.
        kind: the dataclass; its fields are sections (dataclasses) or plain values.
        overrides: `--section.key value` pairs laid over the file.

    Raises:
        ConfigError: no such file, not TOML, a missing section, or a value of another type.
        UnknownKeyError: a section or key that is no field.
    """
    if not path.exists():
        raise ConfigError(f"{path.absolute()} is not there: expected a recipe in TOML")
    if path.is_dir():
        raise ConfigError(f"{path.absolute()} is a folder: expected a recipe in TOML")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    _override(raw, overrides)
    return build_section(kind, raw, "")


def build_section(kind: type[Section], raw: Mapping[str, Any], where: str) -> Section:
    """Build a dataclass from a table; `where` is the table's name for messages.

    Raises:
        ConfigError: a key is missing, or its value has another type.
        UnknownKeyError: a key that is no field.
    """
    hints = get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(cast(Any, kind))}
    unknown = sorted(set(raw) - set(fields))
    if unknown:
        key = _join(where, unknown[0])
        if key in _RENAMED:
            raise UnknownKeyError(f"recipe key {key} is called {_RENAMED[key]} now: rename it")
        meant = _meant(key)
        rest = f"did you mean {meant}?" if meant else f"expected one of {', '.join(fields)}"
        raise UnknownKeyError(f"recipe key {key} is unknown: {rest}")
    missing = [name for name in _required(kind) if name not in raw]
    if missing:
        key = _join(where, missing[0])
        if dataclasses.is_dataclass(
            hints[missing[0]]
        ):  # a section: its first key that has to be given
            key = _join(key, next(_required(hints[missing[0]])))
        raise ConfigError(f"recipe key {key} is missing: add it")
    return kind(**{key: _value(hints[key], value, _join(where, key)) for key, value in raw.items()})


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _required(kind: Any) -> Iterator[str]:  # noqa: ANN401  a dataclass
    """Yield the names of the fields that have no default."""
    for field in dataclasses.fields(kind):
        if default_value(field) is dataclasses.MISSING:
            yield field.name


def _meant(key: str) -> str | None:
    """Return the key of a recipe that has this name in another section, or nearly this name."""
    name = key.rpartition(".")[2].replace("-", "_")
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    known = list(_keys(Recipe))
    if "." not in key:
        sections = [one for one in known if "." not in one]
        if near := difflib.get_close_matches(name, sections, 1, _LIKE_A_SECTION):
            return near[0]
    elsewhere = [one for one in known if one.rpartition(".")[2] == name]
    return next(iter(elsewhere or difflib.get_close_matches(key, known, 1, _LIKE)), None)


def _keys(kind: type, where: str = "") -> Iterator[str]:
    """Yield the names of all sections and keys."""
    for key, hint in get_type_hints(kind).items():
        name = _join(where, key)
        yield name
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for section in kinds:
            if isinstance(section, type) and dataclasses.is_dataclass(section):
                yield from _keys(section, name)


def _value(hint: Any, value: Any, where: str) -> Any:  # noqa: ANN401  TOML values
    """Return the value as the field's type, or raise an error that names both."""
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return build_section(hint, value, where)
    if origin in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        return _value(kinds[0], value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(
                f"recipe key {where} is {value!r}: expected one of {', '.join(get_args(hint))}"
            )
        return value
    if origin is tuple and isinstance(value, list):
        return _tuple(get_args(hint), value, where)
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and isinstance(value, bool) is (hint is bool)
    ):
        return value
    raise ConfigError(f"recipe key {where} is {value!r}: expected {_expected(hint)}")


def _expected(hint: Any) -> str:  # noqa: ANN401  any annotation
    """Return what a value of this type looks like in TOML."""
    if get_origin(hint) is tuple:
        return f"a list [...] of which each is {_expected(get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return f"a table with {', '.join(field.name for field in dataclasses.fields(hint))}"
    return _NAMES.get(hint, "a table")


def _tuple(kinds: tuple[Any, ...], value: list[Any], where: str) -> tuple[Any, ...]:
    """Return a list as a tuple of fixed kinds, or of any number of one kind."""
    if kinds[-1] is Ellipsis:
        return tuple(_value(kinds[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(kinds) != len(value):
        raise ConfigError(f"recipe key {where} is {value!r}: expected {len(kinds)} values")
    return tuple(_value(kind, item, where) for kind, item in zip(kinds, value, strict=True))


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write `--section.key value` pairs into the table; values are read as TOML, else as text."""
    left = list(overrides)
    while left:
        option, is_joined, text = left.pop(0).partition("=")
        if not option.startswith("--"):
            raise ConfigError(f"recipe option {option!r}: expected --section.key VALUE")
        if not is_joined:
            if not left or left[0].startswith("--"):
                raise ConfigError(f"recipe option {option} has no value: write {option} VALUE")
            text = left.pop(0)
        *sections, key = option[2:].split(".")
        table: Any = raw
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(
                    f"recipe option {option}: {section} is {table!r}, no table with keys of its own"
                )
        table[key] = _literal(text)


def _literal(text: str) -> Any:  # noqa: ANN401  TOML values
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def recipe_text(recipe: Recipe, *, defaults: bool = True) -> str:
    """Return the recipe as TOML, sections after the keys that stand alone.

    Args:
        recipe: what is written; values that are None are left out.
        defaults: also the values that a recipe has where it does not name them.
    """
    alone: list[str] = []
    sections: list[str] = []
    for name, value in _table(recipe, defaults=defaults).items():
        if dataclasses.is_dataclass(value):
            sections.append("\n".join([f"[{name}]", *_pairs(value, defaults=defaults)]))
        else:
            alone.append(f"{name} = {_toml_literal(value, defaults=defaults)}")
    return "\n\n".join(["\n".join(alone), *sections]) + "\n"


def _table(value: Any, *, defaults: bool) -> Mapping[str, Any]:  # noqa: ANN401  dataclass or table
    """Return values by name, without those that are None, or that nobody needs to name."""
    if isinstance(value, Mapping):
        return value
    found = {field.name: (getattr(value, field.name), field) for field in dataclasses.fields(value)}
    return {
        name: one
        for name, (one, field) in found.items()
        if one is not None and (defaults or one != default_value(field))
    }


def _pairs(value: Any, *, defaults: bool) -> list[str]:  # noqa: ANN401  see _table
    table = _table(value, defaults=defaults)
    return [f"{key} = {_toml_literal(one, defaults=defaults)}" for key, one in table.items()]


def _toml_literal(value: Any, *, defaults: bool) -> str:  # noqa: ANN401  TOML values
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml_literal(item, defaults=defaults) for item in value)}]"
    if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
        pairs = _pairs(value, defaults=defaults)
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    return repr(value)

"""Recipe files: TOML read with the command line's options, checked, and written to be read back.

    recipes/tiny/align.toml      ->  Recipe(stage, optim, run, model, data)    unknown key = error
    --optim.lr 2e-4              ->  the same recipe with one value replaced (--optim.lr=2e-4 too)

A key that another value makes idle would be swallowed, so it is refused. A relative path starts at
the working directory, as on every command line: a recipe in a repository serves whoever has the
data, and `--data.sources` means what the shell means. Knows text, dataclasses and paths; no model.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from lapilli.checkpoint.source import HUB_ID, is_local
from lapilli.config.reader import given_path, shown
from lapilli.errors import ConfigError, DataError, UnknownKeyError
from lapilli.train.data.source import NAME_A_FILE, expand
from lapilli.train.recipe import DistillRecipe, Recipe, TrainerRecipe

MOST_CHARACTERS = 1 << 20
"""Of a recipe: what is read may be a device without an end."""

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

    The fields of `kind` are sections (dataclasses) or plain values; `overrides` are `--section.key
    value` pairs laid over the file.

    Raises:
        ConfigError: no such file, not TOML, a missing section, or a value of another type.
        UnknownKeyError: a section or key that is no field.
    """
    if not path.exists():
        raise ConfigError(f"{path.absolute()} is not there: expected a recipe in TOML")
    if path.is_dir():
        raise ConfigError(f"{path.absolute()} is a folder: expected a recipe in TOML")
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise ConfigError(
                f"{path} has more than {MOST_CHARACTERS} characters: expected a recipe in TOML"
            )
        raw = tomllib.loads(text)
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

    Values that are None are left out; with `defaults` those stay that nobody needs to name.
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


def check_idle_keys(recipe: Recipe) -> None:
    """Check that every key which has another value than its default changes something.

    Raises:
        UnknownKeyError: the first key that another value of the recipe makes idle, and why.
    """
    idle = dict(_idle(recipe))
    for key in set_keys(recipe):
        if key in idle:
            raise UnknownKeyError(
                f"recipe key {key} would change nothing: {idle[key]}, or leave {key} out"
            )


def set_keys(recipe: TrainerRecipe) -> Iterator[str]:
    """Yield the names of the keys whose values are not the defaults, section.key."""
    for section in dataclasses.fields(recipe):
        part = getattr(recipe, section.name)
        if not dataclasses.is_dataclass(part):
            continue  # stage, and sections that are not there
        changed = [
            f"{section.name}.{field.name}"
            for field in dataclasses.fields(part)
            if getattr(part, field.name) != default_value(field)
        ]
        if not changed and section.default is None:
            changed = [section.name]  # an optional section that is there as it is
        yield from changed


def default_value(field: "dataclasses.Field[Any]") -> Any:  # noqa: ANN401  of any field
    """Return the default of a dataclass field; dataclasses.MISSING where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _idle(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield keys that another value of the recipe makes idle, and what would make them count."""
    yield from idle_optim(recipe)
    if not recipe.noise.alpha:
        yield "noise.on", "noise.alpha is 0, so there is no noise: set noise.alpha"
    data = recipe.data
    if data.evaluation:
        yield "data.held_out", "data.evaluation names what is evaluated: leave that out"
    elif not data.held_out:
        for key in ("evaluate_every", "exam"):
            yield f"run.{key}", "nothing is held out: set data.held_out or data.evaluation"
    if recipe.lora is None and recipe.model.adapter is None:
        yield "save.merge", "there is no adapter to fold in: add [lora]"
    if recipe.objective is not None:
        yield from _idle_of_objective(recipe.objective)
    if not _saves_whole(recipe):
        yield "save.dtype", "what comes out is no whole checkpoint: set save.merge with [lora]"


def _idle_of_objective(objective: str) -> Iterator[tuple[str, str]]:
    """Yield keys that only a run on conversations reads."""
    keys = [f"data.{key}" for key in ("template", "max_length", "group", "pack", "placement")]
    keys += [
        "data.alpha",
        "data.stores",
        "data.on_bad_sample",
        "noise.alpha",
        "optim.z_loss",
        "run.compile",
    ]
    keys += [f"distill.{field.name}" for field in dataclasses.fields(DistillRecipe)]
    for key in (*keys, "run.exam"):
        yield key, f"[{objective}] does not learn from conversations: leave [{objective}] out"


def _saves_whole(recipe: Recipe) -> bool:
    if recipe.lora is not None or recipe.model.adapter is not None:
        return recipe.save.merge
    return recipe.saves_frozen or recipe.model.tune_tower


def idle_optim(recipe: TrainerRecipe) -> Iterator[tuple[str, str]]:
    """Yield keys of the optimizer that change nothing, and what would make them count."""
    optim = recipe.optim
    if optim.name == "sgd":
        for key in ("betas", "eps"):
            yield f"optim.{key}", 'optim.name is "sgd", which has none: set optim.name = "adamw"'
    if optim.schedule != "trapezoid":
        yield (
            "optim.decay_share",
            f'optim.schedule is "{optim.schedule}": set optim.schedule = "trapezoid"',
        )
    if optim.schedule == "constant":
        yield (
            "optim.min_lr_ratio",
            'optim.schedule is "constant", which keeps the rate: set another',
        )
    if optim.warmup_steps:
        yield "optim.warmup_ratio", "optim.warmup_steps says it already: leave that out"
    if not optim.weight_decay:
        yield "optim.decay", "optim.weight_decay is 0: set it"


def check_paths(recipe: Recipe, file: Path) -> None:
    """Check that what the recipe names is there, as far as this disk can tell.

    A hub id may be anywhere.

    `file` is the one that it was read from.

    Raises:
        ConfigError: a path that leads nowhere, and where it would, from the recipe's own folder; a
            folder where files of data are meant; a name that is no UTF-8.
        CheckpointError: a file where a checkpoint's directory is meant.
    """
    for key, name, is_there in _paths(recipe):
        if name is None:
            continue
        _check_name(key, name)
        if is_there(name):
            continue
        path = given_path(name)
        if is_there is _has_files and path.is_dir():
            raise ConfigError(
                f"recipe key {key} is {name!r}, and {path.absolute()} is a folder: {NAME_A_FILE}"
            )
        beside = file.absolute().parent / path
        lies_beside = is_there(str(beside))
        if is_there is is_local and HUB_ID.fullmatch(name) and not lies_beside:
            continue
        there = f"; {beside} is there: write that, or start in {file.absolute().parent}"
        raise ConfigError(
            f"recipe key {key} is {name!r}, and there is no {path.absolute()}: relative paths "
            f"start in the folder where the command is started{there if lies_beside else ''}"
        )


def _check_name(key: str, name: str) -> None:
    """Refuse what the files of the results could not name: the recipe, and a base by its path."""
    is_base = key.startswith("model.") and _is_folder(name)
    try:
        (str(given_path(name).resolve()) if is_base else name).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"recipe key {key} is {name!r}, and {shown(error.object[: error.end])} is no UTF-8, so "
            "that the results could not name it: rename it first"
        ) from error


def _paths(recipe: Recipe) -> Iterator[tuple[str, str | None, Callable[[str], bool]]]:
    """Yield key, name and what tells whether it is there."""
    model, distill = recipe.model, recipe.distill
    ranking, next_item = recipe.ranking, recipe.next_item
    yield "model.checkpoint", model.checkpoint, is_local
    yield "model.adapter", model.adapter, is_local
    yield "model.projector", model.projector, _is_folder
    yield "distill.teacher", None if distill is None else distill.teacher, is_local
    yield "ranking.teacher", None if ranking is None else ranking.teacher, is_local
    yield "next_item.catalogue", None if next_item is None else next_item.catalogue, _has_files
    for name, folder in recipe.data.stores.items():
        yield f"data.stores.{name}", folder, _is_folder
    for part in ("sources", "evaluation"):
        for number, source in enumerate(getattr(recipe.data, part)):
            yield f"data.{part}[{number}].path", source.path, _has_files
            yield f"data.{part}[{number}].images", source.images, _is_folder


def _is_folder(name: str) -> bool:
    return given_path(name).is_dir()


def _has_files(pattern: str) -> bool:
    try:
        return bool(expand(pattern))
    except DataError:
        return False

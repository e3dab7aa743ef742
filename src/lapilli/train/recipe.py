"""What a training run does, as frozen values read from TOML; no torch.

recipes/pebble/1_tower.toml  ->  Recipe(stage, optim, run, model, data)      unknown key = error
--optim.lr 2e-4              ->  the same recipe with one value replaced
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from lapilli.errors import ConfigError, UnknownKeyError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]  # only on Python 3.10

Stage = Literal["tower", "language", "align", "instruct"]
Schedule = Literal["cosine", "linear", "constant", "trapezoid"]
Reduction = Literal["tokens", "llava"]
Precision = Literal["float32", "bfloat16"]

Section = TypeVar("Section")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimRecipe:
    """AdamW and its schedule.

    Attributes:
        lr: learning rate at the end of the warm-up.
        projector_lr: another one for the projector; None takes `lr`.
        tower_lr: another one for the vision tower; None takes `lr`.
        warmup_steps: steps of linear growth from 0.
        decay_share: part of all steps that a `trapezoid` spends on its way down.
        final_share: part of `lr` that is left at the end.
        clip: largest norm of all gradients together.
    """

    lr: float
    projector_lr: float | None = None
    tower_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    decay_share: float = 0.3
    final_share: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr is {self.lr}: expected a number above 0")
        if not 0 <= self.decay_share <= 1:
            raise ConfigError(f"optim.decay_share is {self.decay_share}: expected 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecipe:
    """How long, how much at once, how often something is written."""

    steps: int
    batch_size: int
    accumulate: int = 1
    precision: Precision = "float32"
    reduction: Reduction = "tokens"
    seed: int = 0
    threads: int | None = None
    log_every: int = 10
    save_every: int = 200
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name} is {getattr(self, name)}: expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecipe:
    """Sizes of what starts with fresh weights, and where the rest comes from.

    Attributes:
        language_model: output folder of an earlier stage, or a checkpoint.
        vision_tower: the same for the tower.
        projector: the same for the projector.
        vision: fields of VisionConfig for a fresh tower.
        text: fields of DecoderConfig for a fresh language model.
    """

    language_model: str | None = None
    vision_tower: str | None = None
    projector: str | None = None
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """Which samples.

    Attributes:
        num_pictures: how many are drawn (pebble).
        num_crowds: how many more with many objects, for the tower alone.
        conversations: a LLaVA JSON file.
        images: the folder that its `image` paths are relative to.
        template: name of the chat template.
        questions: fewest and most questions about one picture in one conversation.
        long_share: part of the long answers that are kept (pebble).
        pointing: weight of the loss that teaches attention where to look (pebble).
    """

    num_pictures: int = 0
    num_crowds: int = 0
    conversations: str | None = None
    images: str | None = None
    template: str = "vicuna_v1"
    questions: tuple[int, int] = (6, 10)
    long_share: float = 1.0
    pointing: float = 0.0
    max_length: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run."""

    stage: Stage
    optim: OptimRecipe
    run: RunRecipe
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a TOML file, with `--section.key value` pairs laid over it.

    Raises:
        ConfigError: not TOML, a missing section, or a value of another type.
        UnknownKeyError: a section or key that nothing reads.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    _override(raw, overrides)
    return build_section(Recipe, raw, "")


def build_section(kind: type[Section], raw: Mapping[str, Any], where: str) -> Section:
    """A dataclass from a table; `where` is the table's name for messages.

    Raises:
        ConfigError: a key is missing, or its value has another type.
        UnknownKeyError: a key that is no field.
    """
    hints = get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(cast(Any, kind))}
    unknown = sorted(set(raw) - set(fields))
    if unknown:
        raise UnknownKeyError(
            f"recipe key {_join(where, unknown[0])} is unknown: expected one of {', '.join(fields)}"
        )
    missing = [
        name
        for name, item in fields.items()
        if name not in raw
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"recipe key {_join(where, missing[0])} is missing: add it")
    return kind(**{key: _value(hints[key], value, _join(where, key)) for key, value in raw.items()})


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _value(hint: Any, value: Any, where: str) -> Any:  # noqa: ANN401  TOML values
    """The value as the field's type, or an error that names both."""
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
    if origin is tuple and isinstance(value, list) and len(value) == len(get_args(hint)):
        pairs = zip(get_args(hint), value, strict=True)
        return tuple(_value(kind, item, where) for kind, item in pairs)
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
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"recipe key {where} is {value!r}: expected {name}")


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """`--section.key value` pairs written into the table; values are read as TOML, else as text."""
    if len(overrides) % 2:
        raise ConfigError(f"recipe option {overrides[-1]} has no value: write --section.key VALUE")
    for option, text in zip(overrides[::2], overrides[1::2], strict=True):
        if not option.startswith("--"):
            raise ConfigError(f"recipe option {option!r}: expected --section.key VALUE")
        *sections, key = option[2:].split(".")
        table = raw
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = _literal(text)


def _literal(text: str) -> Any:  # noqa: ANN401  TOML values
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text

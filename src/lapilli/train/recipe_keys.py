"""Which keys of a recipe its stage reads: what nothing reads would be swallowed, so it is refused.

    samples from files (data.sources)    align, instruct                     `lapilli train`
    pictures drawn (data.num_pictures)   tower, language, align, instruct    recipes/pebble

A new key is refused everywhere until a table below names it. Knows names and values; no torch.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from lapilli.errors import ConfigError, UnknownKeyError

if TYPE_CHECKING:
    from lapilli.train.recipe import Recipe

_ALL: Final = ("*",)
_TALK: Final = {
    "optim": ("projector_lr",),
    "data": ("template", "questions", "long_share", "pointing"),
}
# What each stage reads, by section.
_FROM_FILES: Final[Mapping[str, Sequence[str]]] = {
    **dict.fromkeys(("optim", "run", "lora", "noise", "distill", "save"), _ALL),
    "model": ("checkpoint", "projector", "adapter", "tune_tower", "freeze"),
    "data": (
        *("sources", "held_out", "evaluation", "template", "max_length", "group", "pack"),
        *("placement", "on_bad_sample"),
    ),
}
_DRAWN: Final[Mapping[str, Sequence[str]]] = {
    "optim": (
        *("lr", "name", "betas", "eps", "weight_decay", "decay", "schedule", "warmup_steps"),
        *("warmup_share", "decay_share", "final_share", "clip", "ema"),
    ),
    "run": (
        *("batch_size", "steps", "accumulate", "precision", "reduction", "seed", "threads"),
        *("log_every", "save_every", "evaluate_every", "keep_best", "workers", "loggers", "plot"),
    ),
    "data": ("num_pictures",),
}
_OF_DRAWN_STAGE: Final[Mapping[str, Mapping[str, Sequence[str]]]] = {
    "tower": {"model": ("vision", "checkpoint"), "data": ("num_crowds",)},
    "language": {"model": ("text",), **_TALK},
    "align": {"optim": ("projector_lr",), "data": ("template",)},
    "instruct": {"model": ("checkpoint",), **_TALK},
}


def is_drawn(recipe: "Recipe") -> bool:
    """Whether the stage is one of recipes/pebble, which draw their own pictures."""
    if recipe.stage in ("tower", "language"):
        return True
    return bool(recipe.data.num_pictures) and not recipe.data.sources


def refuse_unread(recipe: "Recipe") -> None:
    """Every key that has another value than its default is one that something reads.

    Raises:
        UnknownKeyError: the first key that nothing reads, and why.
    """
    drawn = is_drawn(recipe)
    idle = dict(_idle(recipe, drawn=drawn))
    for key in set_keys(recipe):
        if not _is_read(key, recipe.stage, drawn=drawn):
            whose = " of recipes/pebble, which draws its own pictures," if drawn else ""
            raise UnknownKeyError(
                f"recipe key {key} is not read by stage {recipe.stage!r}{whose} and would change "
                f"nothing: leave it out{'' if drawn else _hint(key)}"
            )
        if key in idle:
            raise UnknownKeyError(
                f"recipe key {key} would change nothing: {idle[key]}, or leave {key} out"
            )


def _is_read(key: str, stage: str, *, drawn: bool) -> bool:
    section, _, name = key.partition(".")
    tables = (_DRAWN, _OF_DRAWN_STAGE[stage]) if drawn else (_FROM_FILES,)
    names = [one for table in tables for one in table.get(section, ())]
    return name in names or names == list(_ALL)


def refuse_drawn(recipe: "Recipe") -> None:
    """A run over files of samples draws no pictures and makes no parts.

    Raises:
        ConfigError: the recipe is one of recipes/pebble.
    """
    if recipe.stage not in ("align", "instruct"):
        raise ConfigError(
            f"stage {recipe.stage!r} makes the parts of a model: a whole one has the stages align "
            "and instruct (`make pebble` follows recipes/pebble)"
        )
    if is_drawn(recipe):
        raise ConfigError(
            "recipe key data.num_pictures has pictures drawn, as `make pebble` does by "
            "recipes/pebble: name a model.checkpoint and data.sources instead"
        )


def set_keys(recipe: "Recipe") -> Iterator[str]:
    """Names of the keys whose values are not the defaults, section.key."""
    for section in dataclasses.fields(recipe):
        part = getattr(recipe, section.name)
        if not dataclasses.is_dataclass(part):
            continue  # stage, and sections that are not there
        changed = [
            f"{section.name}.{field.name}"
            for field in dataclasses.fields(part)
            if getattr(part, field.name) != _default(field)
        ]
        if not changed and section.default is None:
            changed = [section.name]  # an optional section that is there as it is
        yield from changed


def _default(field: "dataclasses.Field[Any]") -> Any:  # noqa: ANN401  of any field
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _hint(key: str) -> str:
    """Where a key belongs that `lapilli train` does not read."""
    if key in ("model.vision", "model.text"):
        return " (the parts of a model are chosen when `lapilli build` joins them)"
    return " (it belongs to recipes/pebble, which draws its own pictures)"


def _idle(recipe: "Recipe", *, drawn: bool) -> Iterator[tuple[str, str]]:
    """Keys that another value of the recipe makes idle, and what would make them count."""
    yield from _idle_optim(recipe)
    if not recipe.noise.alpha:
        yield "noise.on", "noise.alpha is 0, so there is no noise: set noise.alpha"
    if drawn:
        return
    data = recipe.data
    if data.evaluation:
        yield "data.held_out", "data.evaluation names what is evaluated: leave that out"
    elif not data.held_out:
        for key in ("evaluate_every", "exam"):
            yield f"run.{key}", "nothing is held out: set data.held_out or data.evaluation"
    if recipe.lora is None and recipe.model.adapter is None:
        yield "save.merge", "there is no adapter to fold in: add [lora]"
    if not _saves_whole(recipe):
        yield "save.dtype", "what comes out is no whole checkpoint: set save.merge with [lora]"


def _saves_whole(recipe: "Recipe") -> bool:
    if recipe.lora is not None or recipe.model.adapter is not None:
        return recipe.save.merge
    return recipe.saves_frozen or recipe.model.tune_tower


def _idle_optim(recipe: "Recipe") -> Iterator[tuple[str, str]]:
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
        yield "optim.final_share", 'optim.schedule is "constant", which keeps the rate: set another'
    if optim.warmup_steps:
        yield "optim.warmup_share", "optim.warmup_steps says it already: leave that out"
    if not optim.weight_decay:
        yield "optim.decay", "optim.weight_decay is 0: set it"

"""Keys of a recipe that another value makes idle: they would be swallowed, so they are refused.

Both stages read every other key. Knows names and values; no torch.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lapilli.errors import UnknownKeyError

if TYPE_CHECKING:
    from lapilli.train.recipe import Recipe, TrainerRecipe


def refuse_unread(recipe: "Recipe") -> None:
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


def set_keys(recipe: "TrainerRecipe") -> Iterator[str]:
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


def _idle(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """Keys that another value of the recipe makes idle, and what would make them count."""
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
    if not _saves_whole(recipe):
        yield "save.dtype", "what comes out is no whole checkpoint: set save.merge with [lora]"


def _saves_whole(recipe: "Recipe") -> bool:
    if recipe.lora is not None or recipe.model.adapter is not None:
        return recipe.save.merge
    return recipe.saves_frozen or recipe.model.tune_tower


def idle_optim(recipe: "TrainerRecipe") -> Iterator[tuple[str, str]]:
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
        yield "optim.final_share", 'optim.schedule is "constant", which keeps the rate: set another'
    if optim.warmup_steps:
        yield "optim.warmup_share", "optim.warmup_steps says it already: leave that out"
    if not optim.weight_decay:
        yield "optim.decay", "optim.weight_decay is 0: set it"

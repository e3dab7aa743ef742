"""What a stage of pebble does: the keys of lapilli's trainer, and those of a drawn world.

    recipes/from_nothing/1_tower.toml --load_recipe--> PebbleRecipe(stage, optim, run, model, data)

    tower      everything it is given: the tower and the heads of its own losses
    language   projector and language model, over words in the place of features
    align      the projector
    instruct   projector and language model

Knows names and values; no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from lapilli.errors import UnknownKeyError
from lapilli.train.recipe import TrainerRecipe
from lapilli.train.recipe.file import idle_optim, read_recipe, set_keys

Stage = Literal["tower", "language", "align", "instruct"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsRecipe:
    """What a stage begins with.

    Attributes:
        checkpoint: an earlier pebble that goes on; None: fresh parts.
        vision: fields of VisionConfig for a fresh tower.
        text: fields of DecoderConfig: all of a fresh language model, or the sizes to which that of
            the checkpoint grows.
    """

    checkpoint: str | None = None
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldRecipe:
    """Which pictures are drawn, and what is said about them.

    Attributes:
        num_pictures: how many are drawn.
        num_crowds: how many more with many objects, for the tower alone.
        template: name of the chat template.
        questions: fewest and most questions about one picture in one conversation.
        long_share: part of the long answers that are kept.
        pointing: weight of the loss that teaches attention where to look.
    """

    num_pictures: int = 0
    num_crowds: int = 0
    template: str = ""
    questions: tuple[int, int] = (6, 10)
    long_share: float = 1.0
    pointing: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PebbleRecipe(TrainerRecipe):
    """One stage."""

    stage: Stage
    model: PartsRecipe = field(default_factory=PartsRecipe)
    data: WorldRecipe = field(default_factory=WorldRecipe)


_TALK: Final = {
    "optim": ("projector_lr",),
    "data": ("template", "questions", "long_share", "pointing"),
}
# Keys that only some stages read, by section; the rest of model and data is read by none of them.
_OF_STAGE: Final[Mapping[Stage, Mapping[str, Sequence[str]]]] = {
    "tower": {"model": ("vision", "checkpoint"), "data": ("num_crowds",)},
    "language": {"model": ("text",), **_TALK},
    "align": {"optim": ("projector_lr",), "data": ("template",)},
    "instruct": {"model": ("checkpoint", "text"), **_TALK},
}
_OF_ALL: Final[Mapping[str, Sequence[str]]] = {
    "optim": (
        *("lr", "name", "betas", "eps", "weight_decay", "decay", "schedule", "warmup_steps"),
        *("warmup_ratio", "decay_share", "min_lr_ratio", "max_grad_norm", "ema"),
    ),
    "run": (
        *("batch_size", "steps", "gradient_accumulation_steps", "precision", "reduction", "seed"),
        "threads",
        *("log_every", "save_every", "evaluate_every", "keep_best", "workers", "loggers", "plot"),
    ),
    "data": ("num_pictures",),
}


def load_recipe(path: Path) -> PebbleRecipe:
    """Load the recipe of a stage from its TOML file.

    Raises:
        ConfigError: no such file, not TOML, a missing key, or a value of another type.
        UnknownKeyError: a key that no stage reads, or that this one does not read.
    """
    recipe = read_recipe(path, PebbleRecipe)
    check_keys(recipe)
    return recipe


def check_keys(recipe: PebbleRecipe) -> None:
    """Check that every key which has another value than its default is read by the stage.

    Raises:
        UnknownKeyError: the first key that changes nothing.
    """
    idle = dict(idle_optim(recipe))
    for key in _unread(recipe):
        raise UnknownKeyError(
            f"recipe key {key} is not read by stage {recipe.stage!r} of pebble and would change "
            "nothing: leave it out"
        )
    for key in set_keys(recipe):
        if key in idle:
            raise UnknownKeyError(
                f"recipe key {key} would change nothing: {idle[key]}, or leave {key} out"
            )


def _unread(recipe: PebbleRecipe) -> Iterator[str]:
    tables = (_OF_ALL, _OF_STAGE[recipe.stage])
    for key in set_keys(recipe):
        section, _, name = key.partition(".")
        if not any(name in table.get(section, ()) for table in tables):
            yield key

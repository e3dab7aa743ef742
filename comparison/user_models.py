"""The models that read a user: what they begin as, and how they learn.

    histories --NextEventTask--> encoder of events --.
              --TextTask-------> language model -----+--UserTask--> a form that reads users' vectors

Source: Ning et al. 2024 (User-LLM, arXiv 2402.13598).
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, cast

import torch

from comparison.baselines import SequenceOptions
from comparison.film_tasks import TextTask, UserTask
from comparison.movies import Movies
from comparison.next_film import (
    USER,
    FilmWords,
    Sizes,
    Window,
    events_of,
    events_of_window,
    write_language_model,
)
from lapilli.checkpoint.load import Loaded, load_checkpoint, with_modalities
from lapilli.config.modalities import EventsConfig, modality_config
from lapilli.modality.events import EventsModality
from lapilli.train.next_event import NextEventTask
from lapilli.train.recipe import (
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    TrainerRecipe,
)
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer.loop import train

FUSIONS: Final = {
    "tokens": ("mlp2x_gelu", False),
    "soft prompt": ("resampler{tokens}", False),
    "cross-attention": ("mlp2x_gelu", True),
}
"""The projector between encoder and language model, and whether its features stand beside the
sequence. All of them hand on the same number of features."""
LEARNS: Final = ("full", "encoder", "projector", "lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Sizes, and how long each part learns.

    Attributes:
        sequence: the model of film numbers that the others are compared with.
        encoder_epochs: passes of the encoder over all histories.
        text_steps: steps of the language model on histories as text.
        form_steps: steps of each form that reads users.
        item_steps: steps of HLLM's objective.
    """

    sizes: Sizes = field(default_factory=Sizes)
    sequence: SequenceOptions = field(default_factory=SequenceOptions)
    encoder_epochs: float = 40.0
    encoder_lr: float = 3e-3
    encoder_batch: int = 32
    encoder_decay: float = 0.1
    text_steps: int = 600
    text_lr: float = 3e-3
    text_batch: int = 24
    form_steps: int = 1200
    form_lr: float = 1e-3
    form_batch: int = 32
    item_steps: int = 100
    item_lr: float = 1e-3
    item_batch: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the forms begin with.

    Attributes:
        text: weights of the language model that has read histories as text.
        encoder: weights of the encoder of events that has learned alone.
    """

    movies: Movies
    options: Options
    text: Mapping[str, torch.Tensor]
    encoder: Mapping[str, torch.Tensor]

    def language_model(self) -> Loaded:
        """Return the language model that has read histories."""
        with temporary_folder() as folder:
            path = write_language_model(folder / "fresh", self.movies, self.options.sizes)
            loaded = load_checkpoint(path, device="cpu", dtype="float32")
        loaded.model.load_state_dict(self.text)
        return loaded

    def with_user(self, fusion: str, *, seed: int) -> Loaded:
        """Return the language model with the encoder beside it and fresh weights between them."""
        projector, attended = FUSIONS[fusion]
        sizes = self.options.sizes
        settings = sizes.user(
            self.movies, projector=projector.format(tokens=sizes.tokens), attended=attended
        )
        loaded = with_modalities(self.language_model(), {USER: settings}, seed=seed)
        events_of(loaded.model).encoder.load_state_dict(self.encoder)
        return loaded


Weights = Mapping[str, torch.Tensor]
TABLE_SCALE: Final = 0.1
"""Of an encoder's tables: torch's own 1 is far from what a softmax over films begins well with."""


def learn_parts(movies: Movies, options: Options | None = None, *, seed: int = 0) -> Parts:
    """Let the language model read histories as text, and the encoder predict events.

    Args:
        movies: what is learned from.
        options: sizes and steps.
        seed: of weights and batches.
    """
    options = options or Options()
    return Parts(
        movies=movies,
        options=options,
        text=learn_text(movies, options, seed=seed),
        encoder=learn_encoder(movies, options, seed=seed),
    )


def learn_text(movies: Movies, options: Options, *, seed: int = 0) -> Weights:
    """Let a fresh language model read histories as text, and return its weights."""
    with temporary_folder() as folder:
        path = write_language_model(folder / "fresh", movies, options.sizes, seed=seed)
        loaded = load_checkpoint(path, device="cpu", dtype="float32")
        run = run_recipe(options.text_batch, options.text_steps, seed)
        words = FilmWords(loaded, movies)
        task = TextTask(loaded.model, words, movies, run, options.sizes.events)
        train(task, trainer_recipe("text", options.text_lr, run), folder / "run")
    return loaded.model.state_dict()


def learn_encoder(movies: Movies, options: Options, *, seed: int = 0) -> Weights:
    """Let a fresh encoder predict the events of histories, and return its weights."""
    settings = options.sizes.user(movies, projector="linear", attended=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = cast("EventsConfig", modality_config(USER, settings))
        users = EventsModality(config, name=USER, hidden_size=options.sizes.width)
        for feature in users.encoder.tables:
            torch.nn.init.normal_(cast("torch.nn.Embedding", feature).weight, std=TABLE_SCALE)
    known = movies.split.train
    histories = [
        events_of_window(movies, Window.of(known, known.of_user(user)))
        for user in range(len(known.user_ids))
    ]
    run = replace(run_recipe(options.encoder_batch, 0, seed), epochs=options.encoder_epochs)
    with temporary_folder() as folder:
        task = NextEventTask(users.train(), histories, run)
        recipe = trainer_recipe("events", options.encoder_lr, run, options.encoder_decay)
        train(task, recipe, folder / "run")
    return users.encoder.state_dict()


def learn_form(parts: Parts, *, fusion: str, learns: str = "full", seed: int = 0) -> Loaded:
    """Let a language model and an encoder learn to recommend together.

    Args:
        parts: what both begin as.
        fusion: one of FUSIONS.
        learns: one of LEARNS: all of it; encoder and projector; the projector; or both and an
            adapter of the language model. Gated blocks of cross-attention always learn.
        seed: of what is fresh, and of the batches.
    """
    options, loaded = parts.options, parts.with_user(fusion, seed=seed)
    lora = LoraRecipe(rank=8, alpha=16.0) if learns == "lora" else None
    recipe = Recipe(
        stage="instruct" if learns in ("full", "lora") else "align",
        model=ModelRecipe(tune_encoder=() if learns == "projector" else (USER,)),
        lora=lora,
        optim=OptimRecipe(lr=options.form_lr),
        run=run_recipe(options.form_batch, options.form_steps, seed),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        choose_trainable(loaded.model, recipe)
    words = FilmWords(loaded, parts.movies)
    task = UserTask(loaded.model, words, parts.movies, recipe.run, options.sizes.events)
    task.model.train()
    with temporary_folder() as folder:
        train(task, trainer_recipe(f"{fusion}, {learns}", options.form_lr, recipe.run), folder)
    loaded.model.eval()
    return loaded


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Lend a folder for checkpoints and runs that nobody needs afterwards."""
    with tempfile.TemporaryDirectory(prefix="lapilli-userllm-") as folder:
        yield Path(folder)


def run_recipe(batch: int, steps: int, seed: int) -> RunRecipe:
    """Return the course of a run that nobody resumes."""
    return RunRecipe(
        batch_size=batch, steps=steps, seed=seed, plot=False, log_every=50, save_every=10**6
    )


def trainer_recipe(stage: str, lr: float, run: RunRecipe, decay: float = 0.05) -> TrainerRecipe:
    """Return a run with AdamW, a short warm-up and a cosine down to nothing."""
    optim = OptimRecipe(lr=lr, weight_decay=decay, decay="matrices", warmup_ratio=0.05)
    return TrainerRecipe(stage=stage, optim=optim, run=run)

"""The models that read a user: what they begin as, and how they learn.

    histories --EventTask--> encoder of events --.
              --TextTask---> language model -----+--UserTask--> a form that reads users' vectors

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
from comparison.evaluation import Scores, validation_ndcg
from comparison.film_tasks import EventStretches, EventTask, TextTask, UserTask
from comparison.movies import Movies
from comparison.next_film import (
    USER,
    FilmWords,
    Sizes,
    events_of,
    events_of_window,
    scores_of_encoder,
    scores_of_text,
    scores_of_users,
    windows_of,
    write_language_model,
)
from lapilli.checkpoint.load import Loaded, load_checkpoint, with_modalities
from lapilli.config.modalities import EventsConfig, modality_config
from lapilli.lm.decoder import Decoder
from lapilli.modality.events import EventsModality
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


@dataclass(frozen=True, slots=True)
class Fusion:
    """How a language model is told of a user.

    Attributes:
        projector: between encoder and language model.
        is_attended: the features stand beside the sequence, before gated cross-attention.
        begins_as_encoder: before the first step the scores are those of the encoder alone; see
            `begin_as_encoder`. Else projector and language model have never met.
    """

    projector: str
    is_attended: bool = False
    begins_as_encoder: bool = False


FUSIONS: Final = {
    "tokens": Fusion("linear", begins_as_encoder=True),
    "tokens, fresh mlp": Fusion("mlp2x_gelu"),
    "soft prompt": Fusion("resampler{tokens}"),
    "cross-attention": Fusion("mlp2x_gelu", is_attended=True),
}
"""All of them hand on the same number of features."""
LEARNS: Final = ("full", "encoder", "projector", "lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How a form learns; the weights that the validation finds best are kept.

    Attributes:
        check: steps between two looks at the validation.
    """

    steps: int
    lr: float
    batch: int = 32
    check: int = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Sizes, and how long each part learns.

    Attributes:
        sequence: the model of film numbers that the others are compared with.
        encoder_epochs: passes of the encoder over all histories.
        text_steps: steps of the language model on histories as text.
        text_check: steps of it between two looks at the validation.
        check_epochs: passes of the encoder between two looks at the validation.
        fresh: how a form learns whose projector and language model have never met.
        gentle: how one learns that begins as the encoder.
        item_steps: steps of HLLM's objective.
    """

    sizes: Sizes = field(default_factory=Sizes)
    sequence: SequenceOptions = field(default_factory=SequenceOptions)
    encoder_epochs: float = 20.0
    check_epochs: float = 4.0
    encoder_lr: float = 3e-3
    encoder_batch: int = 32
    encoder_decay: float = 0.1
    text_steps: int = 600
    text_check: int = 150
    text_lr: float = 3e-3
    text_batch: int = 24
    fresh: Course = field(default_factory=lambda: Course(steps=600, lr=1e-3))
    gentle: Course = field(default_factory=lambda: Course(steps=300, lr=2e-4))
    item_steps: int = 100
    item_lr: float = 1e-3
    item_batch: int = 8

    def said(self) -> dict[str, float]:
        """Return what the page says of them."""
        return {
            "width": self.sizes.width,
            "layers": self.sizes.layers,
            "tokens": self.sizes.tokens,
            "every": self.sizes.every,
            "encoder epochs": self.encoder_epochs,
            "text steps": self.text_steps,
            "form steps": self.fresh.steps,
            "gentle steps": self.gentle.steps,
            "item steps": self.item_steps,
            "SASRec epochs": self.sequence.epochs,
        }


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
        how, sizes = FUSIONS[fusion], self.options.sizes
        settings = sizes.user(
            self.movies,
            projector=how.projector.format(tokens=sizes.tokens),
            attended=how.is_attended,
        )
        loaded = with_modalities(self.language_model(), {USER: settings}, seed=seed)
        events_of(loaded.model).encoder.load_state_dict(self.encoder)
        if how.begins_as_encoder:
            begin_as_encoder(loaded, self.movies, sizes.events)
        return loaded


@torch.no_grad()
def begin_as_encoder(loaded: Loaded, movies: Movies, events: int) -> None:
    """Let a language model rank as its encoder of users does, until it learns more.

    The projector becomes the encoder's head of films and the films' words its table of films; what
    the layers of the language model add to a position becomes nothing, and what they compute it
    from stays. Its last norm takes the mean size of the projected states, so that the softmax is as
    sharp as the encoder's. The other words stay as they were learned from text.

    Args:
        loaded: with a linear projector, and a language model as wide as the encoder's table.
        movies: of whose training histories the sizes are measured.
        events: of a history that are read.
    """
    decoder = cast("Decoder", loaded.model.language_model)
    users = events_of(loaded.model).eval()
    encoder, [projector] = users.encoder, users.output_layers()
    head = cast("torch.nn.Linear", encoder.heads[0])
    projector.weight.copy_(head.weight)
    cast("torch.Tensor", projector.bias).copy_(cast("torch.Tensor", head.bias))
    table = cast("torch.nn.Embedding", encoder.tables[0]).weight
    decoder.model.embed_tokens.weight[FilmWords(loaded, movies).films] = table[1:]
    for number in range(len(decoder.model.layers)):
        decoder.layer(number).self_attn.o_proj.weight.zero_()
        decoder.layer(number).mlp.down_proj.weight.zero_()
    windows = [one for one in windows_of(movies.split.train, events) if len(one.films)]
    states = users.states([users.prepare(events_of_window(movies, one)) for one in windows])
    projected = projector(torch.stack([one[-1] for one in states]))
    decoder.model.norm.weight.fill_(projected.pow(2).mean(dim=-1).sqrt().mean())


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
        run = replace(run, evaluate_every=options.text_check, keep_best=True)
        scores = text_scores(loaded, movies, options.sizes.events)

        def validate() -> float:
            return validation_ndcg(movies, scores)

        words = FilmWords(loaded, movies)
        task = TextTask(loaded.model, words, movies, run, options.sizes.events, validate)
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
    sizes = options.sizes
    run = run_recipe(options.encoder_batch, 1, seed)
    drawn = EventStretches(users, movies, run, sizes.events)
    steps = round(options.encoder_epochs * drawn.steps_per_epoch)
    check = max(1, round(options.check_epochs * drawn.steps_per_epoch))
    run = replace(run, steps=steps, evaluate_every=check, keep_best=True)

    def validate() -> float:
        return validation_ndcg(movies, encoder_scores(users, movies, sizes.events))

    with temporary_folder() as folder:
        recipe = trainer_recipe("events", options.encoder_lr, run, options.encoder_decay)
        train(EventTask(users.train(), drawn, validate), recipe, folder / "run")
    return users.encoder.state_dict()


def encoder_scores(users: EventsModality, movies: Movies, events: int) -> Scores:
    """Return what ranks films by the encoder of events alone."""
    return lambda known: scores_of_encoder(users, movies, windows_of(known, events)).numpy()


def text_scores(loaded: Loaded, movies: Movies, events: int) -> Scores:
    """Return what ranks films by the last events as text."""
    words = FilmWords(loaded, movies)
    return lambda known: scores_of_text(loaded.model, words, windows_of(known, events)).numpy()


def form_scores(loaded: Loaded, movies: Movies, events: int) -> Scores:
    """Return what ranks films by a form that reads users."""
    words = FilmWords(loaded, movies)
    return lambda known: scores_of_users(
        loaded.model, words, movies, windows_of(known, events)
    ).numpy()


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
    course = options.gentle if FUSIONS[fusion].begins_as_encoder else options.fresh
    lora = LoraRecipe(rank=8, alpha=16.0) if learns == "lora" else None
    run = run_recipe(course.batch, course.steps, seed)
    recipe = Recipe(
        stage="instruct" if learns in ("full", "lora") else "align",
        model=ModelRecipe(tune_encoder=() if learns == "projector" else (USER,)),
        lora=lora,
        optim=OptimRecipe(lr=course.lr),
        run=replace(run, evaluate_every=course.check, keep_best=True),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        choose_trainable(loaded.model, recipe)
    scores = form_scores(loaded, parts.movies, options.sizes.events)

    def validate() -> float:
        return validation_ndcg(parts.movies, scores)

    drawn = EventStretches(events_of(loaded.model), parts.movies, run, options.sizes.events)
    words = FilmWords(loaded, parts.movies)
    task = UserTask(loaded.model, words, drawn, seed, validate=validate)
    begun = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    before = validate()
    task.model.train()
    with temporary_folder() as folder:
        train(task, trainer_recipe(f"{fusion}, {learns}", course.lr, recipe.run), folder)
    loaded.model.eval()
    if validate() < before:
        loaded.model.load_state_dict(begun)
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

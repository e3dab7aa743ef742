"""User-LLM on MovieLens-100k: a user as a few vectors, against the same history as text.

    python -m comparison.userllm [--data DIR] [--seeds N]

    histories --NextEventTask--> encoder of events --.
              --TextTask-------> language model -----+--UserTask--> forms that read a user's vectors
    popularity | item-kNN | SASRec | encoder alone | text | forms | HLLM   --rank all films--> rows

Every row learns from the same events and reads the same last events; the second last film of a user
was what choices were made by, the last one is the test. Writes results/userllm.json after every
row, and docs/userllm.md of it.

Source: Ning et al. 2024 (User-LLM, arXiv 2402.13598); Junyi Chen et al. 2024 (HLLM, arXiv
    2409.12740); Kang and McAuley 2018 (SASRec, arXiv 1808.09781).
"""

import argparse
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Final, cast

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from comparison.baselines import (
    SequenceOptions,
    item_knn,
    popularity,
    sequence_scores,
    train_sequence_model,
)
from comparison.movies import ADVICE, NAME, Movies, data_folder, film_word, read_movies
from comparison.next_film import (
    USER,
    FilmWords,
    Sizes,
    TextTask,
    UserTask,
    Window,
    events_of,
    events_of_window,
    film_scores,
    last_events,
    one_thread,
    scores_of_encoder,
    scores_of_text,
    scores_of_users,
    write_language_model,
)
from comparison.userllm_report import PAGE, RESULT, SEQUENCE, TEXT, page, table
from lapilli.checkpoint.load import Loaded, load_checkpoint, with_modalities
from lapilli.config.modalities import EventsConfig, modality_config
from lapilli.datasets.interactions import Interactions
from lapilli.modality.events import EventsModality
from lapilli.pipeline import Chat
from lapilli.plan.flops import request_flops
from lapilli.rank.next_item import NextItemScorer, NextItemTask
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

K: Final = 10
RESAMPLES: Final = 2000
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
        with _folder() as folder:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How many films stand before the right one, of every user, and what an answer costs.

    Attributes:
        validation: ranks, int64 [users].
        test: likewise.
        cost: positions of a request, its operations, and the like, by name.
    """

    validation: np.ndarray
    test: np.ndarray
    cost: Mapping[str, float] = field(default_factory=dict)


Scores = Callable[[Interactions], np.ndarray]
"""From what is known of all users to the scores of all films, float [users, films]."""


def ranks_of(scores: np.ndarray, known: Interactions, held_out: Interactions) -> np.ndarray:
    """Return the ranks of held-out films, as `baselines.next_item_ranks` does one by one."""
    found = []
    for user, row in enumerate(np.array(scores, dtype=np.float64)):
        target = held_out.history(user)
        if len(target):
            own = row[target[0]]
            row[known.history(user)] = -np.inf
            found.append(int((row >= own).sum()) - 1)
    return np.array(found, dtype=np.int64)


def measured(movies: Movies, scores: Scores, **cost: float) -> Measured:
    """Return the ranks of validation and test."""
    split = movies.split
    return Measured(
        validation=ranks_of(scores(split.train), split.train, split.validation),
        test=ranks_of(scores(split.before_test), split.before_test, split.test),
        cost=cost,
    )


Weights = Mapping[str, torch.Tensor]


def learn_text(movies: Movies, options: Options, *, seed: int = 0) -> Weights:
    """Let a fresh language model read histories as text, and return its weights."""
    with _folder() as folder:
        path = write_language_model(folder / "fresh", movies, options.sizes, seed=seed)
        loaded = load_checkpoint(path, device="cpu", dtype="float32")
        run = _run(options.text_batch, options.text_steps, seed)
        words = FilmWords(loaded, movies)
        task = TextTask(loaded.model, words, movies, run, options.sizes.events)
        train(task, _recipe("text", options.text_lr, run), folder / "run")
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
    run = replace(_run(options.encoder_batch, 0, seed), epochs=options.encoder_epochs)
    with _folder() as folder:
        task = NextEventTask(users.train(), histories, run)
        recipe = _recipe("events", options.encoder_lr, run, options.encoder_decay)
        train(task, recipe, folder / "run")
    return users.encoder.state_dict()


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


@contextmanager
def _folder() -> Iterator[Path]:
    """Lend a folder for checkpoints and runs that nobody needs afterwards."""
    with tempfile.TemporaryDirectory(prefix="lapilli-userllm-") as folder:
        yield Path(folder)


TABLE_SCALE: Final = 0.1
"""Of an encoder's tables: torch's own 1 is far from what a softmax over films begins well with."""


def _run(batch: int, steps: int, seed: int) -> RunRecipe:
    return RunRecipe(
        batch_size=batch, steps=steps, seed=seed, plot=False, log_every=50, save_every=10**6
    )


def _recipe(stage: str, lr: float, run: RunRecipe, decay: float = 0.05) -> TrainerRecipe:
    optim = OptimRecipe(lr=lr, weight_decay=decay, decay="matrices", warmup_ratio=0.05)
    return TrainerRecipe(stage=stage, optim=optim, run=run)


def measure_text(parts: Parts, *, seed: int = 0) -> Measured:
    """Ask the language model with the last events as text."""
    loaded, options = parts.language_model(), parts.options
    words, events = FilmWords(loaded, parts.movies), options.sizes.events
    known = parts.movies.split.before_test
    texts = [words.text(window) for window in windows_of(known, events)]
    positions = float(np.mean([len(text) for text in texts]))
    return measured(
        parts.movies,
        lambda known: scores_of_text(loaded.model, words, windows_of(known, events)).numpy(),
        positions=positions,
        flops=float(np.mean([flops_of(loaded, len(text)) for text in texts])),
    )


def measure_encoder(parts: Parts, *, seed: int = 0) -> Measured:
    """Ask the encoder of events by itself."""
    loaded = parts.with_user("tokens", seed=0)
    users, events = events_of(loaded.model).eval(), parts.options.sizes.events
    return measured(
        parts.movies,
        lambda known: scores_of_encoder(users, parts.movies, windows_of(known, events)).numpy(),
    )


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
        run=_run(options.form_batch, options.form_steps, seed),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        choose_trainable(loaded.model, recipe)
    words = FilmWords(loaded, parts.movies)
    task = UserTask(loaded.model, words, parts.movies, recipe.run, options.sizes.events)
    task.model.train()
    with _folder() as folder:
        train(task, _recipe(f"{fusion}, {learns}", options.form_lr, recipe.run), folder)
    loaded.model.eval()
    return loaded


def measure_form(
    parts: Parts, fusion: str = "tokens", learns: str = "full", *, seed: int = 0
) -> Measured:
    """Train one form that reads users and return its ranks and costs.

    `comparison.userllm.measure_form` is what other programs call, with `learn_parts` before it.

    Args:
        parts: what `learn_parts` returns.
        fusion: one of FUSIONS: how the language model is told of a user.
        learns: one of LEARNS.
        seed: of what is fresh, and of the batches.
    """
    loaded = learn_form(parts, fusion=fusion, learns=learns, seed=seed)
    movies, events = parts.movies, parts.options.sizes.events
    words = FilmWords(loaded, movies)
    number = parts.options.sizes.tokens
    beside = USER in loaded.model.attended
    positions = len(words.user(0 if beside else number))
    return measured(
        movies,
        lambda known: scores_of_users(
            loaded.model, words, movies, windows_of(known, events)
        ).numpy(),
        positions=positions,
        flops=flops_of(loaded, positions, memory=number if beside else 0),
        encoder_flops=encoder_flops(loaded, movies, events),
        trained=sum(p.numel() for p in loaded.model.parameters() if p.requires_grad),
    )


def measure_items(parts: Parts, *, seed: int = 0) -> Measured:
    """Train HLLM's two models, which both begin as the language model, and return the ranks."""
    options, movies = parts.options, parts.movies
    loaded = parts.language_model()
    settings = {"kind": "text", "text_config": dict(loaded.raw)}
    loaded = with_modalities(loaded, {"item": settings}, seed=seed)
    prefix = "language_model."
    encoder = {name.removeprefix(prefix): value for name, value in parts.text.items()}
    loaded.model.modality("item").encoder.load_state_dict(encoder)  # type: ignore[attr-defined]
    chat = Chat(loaded)
    run = _run(options.item_batch, options.item_steps, seed)
    recipe = Recipe(
        stage="instruct",
        model=ModelRecipe(tune_encoder=("item",), freeze=("language_model.model.embed_tokens.",)),
        optim=OptimRecipe(lr=options.item_lr),
        run=run,
    )
    choose_trainable(chat.model, recipe)
    catalogue = [
        " ".join((film_word(number), *title)) for number, title in enumerate(movies.titles)
    ]
    split, events = movies.split.train, options.sizes.events
    histories = [split.history(user).tolist() for user in range(len(split.user_ids))]
    task = NextItemTask(
        chat, catalogue, histories, run, modality="item", negatives=256, max_items=events
    )
    with _folder() as folder:
        train(task, _recipe("items", options.item_lr, run), folder)
    chat.model.eval()
    scorer = NextItemScorer(chat, "item", max_items=events)
    vectors = scorer.encode(catalogue)

    def scores(known: Interactions) -> np.ndarray:
        users = range(len(known.user_ids))
        return scorer.score([known.history(user).tolist() for user in users], vectors).numpy()

    positions = float(np.mean([len(one.films) for one in windows_of(split, events)]))
    # Cosines with all films stand where the logits of a vocabulary do.
    sized = replace(loaded.config.text, vocab_size=movies.num_films)
    return measured(
        movies,
        scores,
        positions=positions,
        flops=request_flops(sized, positions=round(positions)),  # type: ignore[arg-type]
    )


def windows_of(known: Interactions, events: int) -> list[Window]:
    """Return the last events of all users."""
    return [last_events(known, user, events) for user in range(len(known.user_ids))]


def flops_of(loaded: Loaded, positions: int, *, memory: int = 0) -> float:
    """Return the operations of a request of so many positions, and features beside them."""
    every = next((one.every for _, one in loaded.config.modalities if one.is_attended), None)
    return request_flops(loaded.config.text, positions=positions, memory=memory, every=every)  # type: ignore[arg-type]


def encoder_flops(loaded: Loaded, movies: Movies, events: int) -> float:
    """Return the operations that make the features of one user, as torch counts them."""
    users = events_of(loaded.model)
    longest = max(windows_of(movies.split.before_test, events), key=lambda one: len(one.films))
    item = users.prepare(events_of_window(movies, longest))
    with FlopCounterMode(display=False) as counter:
        users.embed([item])
    return float(counter.get_total_flops())


def of_users(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Return hit rate and NDCG of every user at K, with one right film each."""
    found = ranks < K
    return {"hit": found.astype(np.float64), "ndcg": np.where(found, 1 / np.log2(ranks + 2.0), 0)}


def interval(values: np.ndarray) -> list[float]:
    """Return the mean over users, and where 95 % of bootstrap samples of them put it."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return [float(values.mean()), float(low), float(high)]


class Results:
    """The rows so far, written to a file after each of them.

    Args:
        path: of the result.
        options: sizes and steps, for the page.
        movies: the data.
        others: rows that every later one is compared with, user by user.
    """

    def __init__(
        self, path: Path, options: Options, movies: Movies, others: Sequence[str], name: str
    ) -> None:
        self._path, self._others = path, others
        self._users: dict[str, dict[str, np.ndarray]] = {}
        split, sizes = movies.split, options.sizes
        self.found: dict[str, Any] = {
            "data": {
                "name": name,
                "users": len(split.test.user_ids),
                "films": movies.num_films,
                "events": sum(map(len, (split.train, split.validation, split.test))),
                "window": sizes.events,
            },
            "options": {
                "width": sizes.width,
                "layers": sizes.layers,
                "tokens": sizes.tokens,
                "every": sizes.every,
                "encoder epochs": options.encoder_epochs,
                "text steps": options.text_steps,
                "form steps": options.form_steps,
                "item steps": options.item_steps,
                "SASRec epochs": options.sequence.epochs,
            },
            "rows": {},
            "seconds": {},
        }

    def add(self, name: str, runs: Sequence[Measured]) -> None:
        """Add a row of one or several seeds, and write the file."""
        every = [of_users(run.test) for run in runs]
        users = {m: np.mean([one[m] for one in every], axis=0) for m in ("hit", "ndcg")}
        held = [of_users(run.validation) for run in runs]
        self._users[name] = users
        row: dict[str, Any] = {
            "test": {m: interval(values) for m, values in users.items()},
            "validation": {m: float(np.mean([one[m] for one in held])) for m in users},
            "each seed": [{m: float(one[m].mean()) for m in users} for one in every],
            "seeds": len(runs),
            "cost": dict(runs[0].cost),
            "against": {
                other: {m: interval(users[m] - self._users[other][m]) for m in users}
                for other in self._others
                if other in self._users and other != name
            },
        }
        self.found["rows"][name] = row
        self.write()
        hit, ndcg = (row["test"][m][0] for m in ("hit", "ndcg"))
        _say(f"{name}: HR@{K} {hit:.4f}, NDCG@{K} {ndcg:.4f}")

    def write(self) -> None:
        """Write what there is."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


Result = Callable[[], Any]
"""Waits for a piece of work and returns what it found."""


class Workers:
    """Processes of one thread each; none: what is asked for is done at once, in this one.

    Args:
        count: of processes.
        kept: a folder where what is done is kept, so that a killed run goes on. Work with other
            sizes or steps is other work.
    """

    def __init__(self, count: int, kept: Path) -> None:
        self._pool = None
        if count:
            self._pool = ProcessPoolExecutor(
                count, get_context("spawn"), torch.set_num_threads, (1,)
            )
        self._kept = kept
        self.seconds: dict[str, float] = {}
        """Of the processor, that each named piece of work took."""

    def start(self, name: str, work: Callable[..., Any], *given: object, seed: int = 0) -> Result:
        """Begin a piece of work, and return what waits for its result."""
        known = [name, seed, *map(_decides, given)]
        digest = sha256(repr(known).encode()).hexdigest()[:16]
        begun = partial(_kept_work, self._kept / f"{digest}.pickle", work, *given, seed=seed)
        ends = begun if self._pool is None else self._pool.submit(begun).result

        def result() -> Any:  # noqa: ANN401  whatever the work returns
            found, seconds = ends()
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            return found

        return result

    def each(self, name: str, work: Callable[..., Any], *given: object, seeds: int) -> list[Result]:
        """Begin a piece of work with several seeds."""
        return [self.start(name, work, *given, seed=seed) for seed in range(seeds)]

    def close(self) -> None:
        """Let the processes go."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _decides(given: object) -> object:
    """Return what a piece of work depends on, of something that it is given."""
    if isinstance(given, Parts):
        return _decides(given.movies), given.options
    return (given.num_films, len(given.split.train)) if isinstance(given, Movies) else given


def _kept_work(
    path: Path, work: Callable[..., Any], *given: object, seed: int
) -> tuple[Any, float]:
    """Return what work finds and the processor's seconds; from a file where it was done before."""
    if path.is_file():
        return cast("tuple[Any, float]", pickle.loads(path.read_bytes()))  # noqa: S301  our own file
    started = time.process_time()
    found = work(*given, seed=seed), time.process_time() - started
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    whole.write_bytes(pickle.dumps(found))
    whole.replace(path)
    return found


def compare(
    results: Results,
    pool: Workers,
    movies: Movies,
    options: Options,
    *,
    seeds: int,
    requests: int = 30,
) -> None:
    """Measure every row and write it.

    Args:
        results: where rows go.
        pool: does the work.
        movies: the data.
        options: sizes and steps.
        seeds: of SASRec and of each fusion; other rows have one.
        requests: of each kind whose time is taken.
    """
    text = pool.start("text", learn_text, movies, options)
    encoder = pool.start("encoder", learn_encoder, movies, options)
    rows: list[tuple[str, list[Result]]] = [
        ("popularity", [pool.start("popularity", measure_popularity, movies)]),
        ("item-kNN", [pool.start("item-kNN", measure_item_knn, movies)]),
        (SEQUENCE, pool.each(SEQUENCE, measure_sequence, movies, options.sequence, seeds=seeds)),
    ]
    parts = Parts(movies=movies, options=options, text=text(), encoder=encoder())
    rows += [
        (TEXT, [pool.start(TEXT, measure_text, parts)]),
        ("encoder alone", [pool.start("encoder alone", measure_encoder, parts)]),
    ]
    for fusion in FUSIONS:
        name = f"user: {fusion}"
        rows.append((name, pool.each(name, measure_form, parts, fusion, seeds=seeds)))
    for learns in LEARNS[1:]:
        name = f"user: tokens, {learns} learns"
        rows.append((name, [pool.start(name, measure_form, parts, "tokens", learns)]))
    rows.append(("HLLM", [pool.start("HLLM", measure_items, parts)]))
    for name, runs in rows:
        measured_runs = [result() for result in runs]
        results.found["seconds"] = dict(pool.seconds)
        results.add(name, measured_runs)
    results.found["milliseconds"] = milliseconds(parts, requests)
    results.write()


def measure_popularity(movies: Movies, *, seed: int = 0) -> Measured:
    """Rank films by how many have seen them."""
    return _of_histories(movies, popularity(movies.split.train))


def measure_item_knn(movies: Movies, *, seed: int = 0) -> Measured:
    """Rank films by those that a user saw last."""
    return _of_histories(movies, item_knn(movies.split.train))


def measure_sequence(movies: Movies, options: SequenceOptions, *, seed: int = 0) -> Measured:
    """Train a model of film numbers, and rank by it."""
    model = train_sequence_model(movies.split.train, replace(options, seed=seed))
    return _of_histories(movies, sequence_scores(model))


def _of_histories(movies: Movies, score: Callable[[np.ndarray], np.ndarray]) -> Measured:
    def scores(known: Interactions) -> np.ndarray:
        users = range(len(known.user_ids))
        return np.stack([score(known.history(user)) for user in users])

    return measured(movies, scores)


@torch.inference_mode()
def milliseconds(parts: Parts, requests: int) -> dict[str, float]:
    """Return the median processor time of a request of each form, which take turns.

    The weights do not matter for it: fresh joints are as fast as learned ones.
    """
    movies, sizes = parts.movies, parts.options.sizes
    every = windows_of(movies.split.before_test, sizes.events)
    longest = [one for one in every if len(one.films) == sizes.events] or every
    asked = {TEXT: _text_request(parts)}
    asked |= {f"user: {fusion}": _user_request(parts, fusion) for fusion in FUSIONS}
    asked["the user's vectors"] = _encoder_request(parts)
    spent: dict[str, list[float]] = {name: [] for name in asked}
    for turn in range(requests + 3):
        for name, prepare in asked.items():
            request = prepare(longest[turn % len(longest)])
            started = time.process_time()  # others may be at work on the machine
            request()
            if turn >= 3:  # the first ones choose kernels
                spent[name].append(1000 * (time.process_time() - started))
    return {name: median(values) for name, values in spent.items()}


Request = Callable[[Window], Callable[[], object]]


def _text_request(parts: Parts) -> Request:
    loaded = parts.language_model()
    words = FilmWords(loaded, parts.movies)
    return lambda window: lambda: scores_of_text(loaded.model, words, [window])


def _user_request(parts: Parts, fusion: str) -> Request:
    loaded = parts.with_user(fusion, seed=0)
    words, users = FilmWords(loaded, parts.movies), events_of(loaded.model.eval())

    def request(window: Window) -> Callable[[], object]:
        features = users.embed([users.prepare(events_of_window(parts.movies, window))])
        return lambda: film_scores(loaded.model, words, features)

    return request


def _encoder_request(parts: Parts) -> Request:
    users = events_of(parts.with_user("tokens", seed=0).model.eval())
    movies = parts.movies
    return lambda window: lambda: users.embed([users.prepare(events_of_window(movies, window))])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all rows, and write the result and the page."""
    parser = argparse.ArgumentParser(prog="comparison.userllm", description=__doc__)
    parser.add_argument("--data", help="folder that has ml-100k/; default: LAPILLI_DATA")
    parser.add_argument("--seeds", type=int, default=1, help="of SASRec and of each fusion")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0: this one alone")
    kept = "where finished work is kept: a run that was killed goes on; remove it to begin anew"
    parser.add_argument("--kept", default="build/userllm", help=kept)
    given = parser.parse_args(arguments)
    folder = data_folder(given.data)
    movies = read_movies(folder)
    if movies is None:
        _say(ADVICE.format(folder=folder))
        return
    options = Options()
    results = Results(RESULT, options, movies, (SEQUENCE, TEXT), f"MovieLens-100k ({NAME})")
    pool = Workers(given.workers, Path(given.kept))
    try:
        with one_thread():
            compare(results, pool, movies, options, seeds=given.seeds)
    finally:
        pool.close()
    PAGE.write_text(page(results.found), encoding="utf-8")
    sys.stdout.write(table(results.found))


if __name__ == "__main__":
    main()

"""The next film: a small language model with a word for every film, asked with text or with a user.

    text   <s> next film_50 star wars *5 film_12 ..    every film word is learned from all before it
    user   <s> next [what an encoder makes of them]    a question for each beginning of a history

The scores of a whole catalogue are the logits of the films' words behind one prompt. Both forms
begin as the same language model, which has read the histories that are learned from as text.

Source: Ning et al. 2024 (User-LLM, arXiv 2402.13598): an encoder of events that learned alone, and
    what becomes of it inside a language model, against the same history as text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit

from comparison.movies import Movies, film_word
from lapilli.checkpoint.load import Loaded
from lapilli.config.huggingface import parse_text_config
from lapilli.datasets.interactions import Interactions
from lapilli.lm import build_language_model
from lapilli.modality.events import EventsModality, PreparedEvents
from lapilli.model import VisionLanguageModel
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.shapes import Float, Int, Tensor
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.recipe import RunRecipe
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import Loss, TrainingBatch, collate

UNKNOWN: Final = "<unk>"
QUESTION: Final = ("<s>", "next")
USER: Final = "user"
_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
_BATCH: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the language model and of the encoder of events, which are alike.

    Attributes:
        events: of a history that are read, by every model.
        tokens: features of a user in a prompt.
        every: gated blocks of cross-attention stand before every n-th layer.
    """

    width: int = 64
    inner: int = 176
    layers: int = 2
    heads: int = 2
    events: int = 50
    tokens: int = 4
    every: int = 1
    dropout: float = 0.4

    def user(self, movies: Movies, *, projector: str, attended: bool) -> dict[str, Any]:
        """Return the settings of the modality of users."""
        return {
            "kind": "events",
            "categorical": movies.categorical(self.width),
            "hidden_size": self.width,
            "num_layers": self.layers,
            "num_heads": self.heads,
            "max_events": self.events + 1,  # of a stretch that is learned from, the film behind too
            "projector": projector,
            "tokens": 0 if projector.startswith("resampler") else self.tokens,
            "dropout": self.dropout,
            **({"fusion": "cross_attention", "every": self.every} if attended else {}),
        }


def write_language_model(folder: Path, movies: Movies, sizes: Sizes, *, seed: int = 0) -> Path:
    """Write a small Llama with fresh weights, whose words are those of the histories."""
    folder.mkdir(parents=True)
    words = [UNKNOWN, *QUESTION, *movies.vocabulary()]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    longest = max(map(len, movies.titles)) + 2
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(words),
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "max_position_embeddings": len(QUESTION) + sizes.events * longest,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    _write(folder / "tokenizer_config.json", {"chat_template": _TEMPLATE})
    _write(folder / "config.json", config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_language_model(parse_text_config(config))
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05 if "embed" in name else sizes.width**-0.5 / 2)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a user's events: what was watched and how it was rated."""

    films: np.ndarray
    ratings: np.ndarray

    @classmethod
    def of(cls, events: Interactions, rows: slice) -> "Window":
        """Return the events of these rows."""
        return cls(events.items[rows], events.ratings[rows])


def last_events(known: Interactions, user: int, events: int) -> Window:
    """Return the last events of a user."""
    rows = known.of_user(user)
    return Window.of(known, slice(max(rows.start, rows.stop - events), rows.stop))


def draw_windows(
    train: Interactions, count: int, events: int, rng: np.random.Generator
) -> list[Window]:
    """Draw stretches of at most `events` + 1 events, so that each event is as often predicted.

    The stretches end anywhere, also behind the last event: there they are cut.
    """
    lengths = np.bincount(train.users, minlength=len(train.user_ids))
    weights = np.where(lengths > 1, lengths + events - 1, 0)
    users = rng.choice(len(lengths), size=count, p=weights / weights.sum())
    found = []
    for user in users:
        first, length = train.of_user(int(user)).start, int(lengths[user])
        end = int(rng.integers(2, length + events))
        rows = slice(first + max(0, end - events - 1), first + min(end, length))
        found.append(Window.of(train, rows))
    return found


class FilmWords:
    """What a language model is asked with, and the ids of the films' words.

    Args:
        loaded: the language model.
        movies: whose words it has.
    """

    def __init__(self, loaded: Loaded, movies: Movies) -> None:
        self._tokenizer, self._movies = loaded.tokenizer, movies
        self.question = self._ids(QUESTION)
        self.films = torch.tensor(self._ids([film_word(n) for n in range(movies.num_films)]))
        self._is_film = set(self.films.tolist())

    def text(self, window: Window) -> EncodedPrompt:
        """Return a history as text, every film's word supervised."""
        ids = self.question + self._ids(self._movies.words(window.films, window.ratings))
        return EncodedPrompt(ids, [one in self._is_film for one in ids])

    def user(self, length: int) -> EncodedPrompt:
        """Return the question about a user of so many positions; 0: it stands beside them."""
        ids = self.question + [PLACEHOLDER] * length
        # A user beside the sequence is seen from its last position on.
        start = len(self.question) if length else len(self.question) - 1
        return EncodedPrompt(ids, [False] * len(ids), (Span(0, start, length, USER),))

    def _ids(self, words: Sequence[str]) -> list[int]:
        return [token for token, *_ in self._tokenizer.tokenize(" ".join(words))]


@dataclass
class TextTask:
    """Histories as text for a language model; what `lapilli.train.trainer.loop.train` runs."""

    vlm: VisionLanguageModel
    words: FilmWords
    movies: Movies
    run: RunRecipe
    events: int
    model: TrainedModel = field(init=False)

    def __post_init__(self) -> None:
        self.model = TrainedModel(self.vlm.requires_grad_(True))

    def batch(self, step: int, micro: int) -> tuple[TrainingBatch, int]:
        """Return stretches of histories and how many films they predict."""
        rng = np.random.default_rng([self.run.seed, step, micro, 61])
        windows = draw_windows(self.movies.split.train, self.run.batch_size, self.events, rng)
        made = collate([EncodedSample(self.words.text(one)) for one in windows])
        return made, made.num_valid

    def loss(self, batch: TrainingBatch) -> Loss:
        """Return the summed loss of all films."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return nothing: what is held out is ranked, not read."""
        return {}


@dataclass(frozen=True, slots=True)
class UserBatch:
    """Stretches of histories, of which the first events, as many as each of `cuts`, are users."""

    windows: tuple[PreparedEvents, ...]
    cuts: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Return the number of a stretch and how many of its events are known."""
        return [
            (i, cut)
            for cut in self.cuts
            for i, one in enumerate(self.windows)
            if cut < len(one.categories)
        ]


class UserModel(nn.Module):
    """A language model that is told of users by their features; see `UserTask`."""

    def __init__(self, vlm: VisionLanguageModel, words: FilmWords) -> None:
        super().__init__()
        self.vlm, self._words = vlm, words

    def train(self, mode: bool = True) -> "UserModel":
        """Set the mode; an encoder that rests does so without dropout."""
        super().train(mode)
        encoder = events_of(self.vlm).encoder
        encoder.train(mode and any(p.requires_grad for p in encoder.parameters()))
        return self

    def forward(self, batch: UserBatch) -> Loss:
        """Return the summed loss of the film behind every pair."""
        users = events_of(self.vlm)
        states = users.states(batch.windows)
        features = users.project([states[i][:cut] for i, cut in batch.pairs])
        films = [int(batch.windows[i].categories[cut, 0]) - 1 for i, cut in batch.pairs]
        scores = film_scores(self.vlm, self._words, features)
        targets = torch.tensor(films, device=scores.device)
        right = (scores.detach().argmax(dim=-1) == targets).sum()
        return Loss(F.cross_entropy(scores, targets, reduction="sum"), {"right": right})


@dataclass
class UserTask:
    """Users and what they watched next, for a model with an encoder of events.

    The encoder reads a stretch of a history once; what is known behind `cuts` of its events are as
    many users. What learns is what requires a gradient.
    """

    vlm: VisionLanguageModel
    words: FilmWords
    movies: Movies
    run: RunRecipe
    events: int
    cuts: int = 8
    model: UserModel = field(init=False)

    def __post_init__(self) -> None:
        self.model = UserModel(self.vlm, self.words)

    def batch(self, step: int, micro: int) -> tuple[UserBatch, int]:
        """Return stretches of histories and how many films are predicted."""
        rng = np.random.default_rng([self.run.seed, step, micro, 67])
        windows = draw_windows(self.movies.split.train, self.run.batch_size, self.events, rng)
        users = events_of(self.vlm)
        prepared = tuple(users.windows(events_of_window(self.movies, one))[0] for one in windows)
        longest = max(len(one.categories) for one in prepared)
        cuts = rng.choice(np.arange(1, longest), size=min(self.cuts, longest - 1), replace=False)
        made = UserBatch(prepared, tuple(sorted(map(int, cuts))))
        return made, len(made.pairs)

    def loss(self, batch: UserBatch) -> Loss:
        """Return the summed loss."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return nothing: what is held out is ranked, not read."""
        return {}


def events_of(vlm: VisionLanguageModel) -> EventsModality:
    """Return the modality of users."""
    return cast("EventsModality", vlm.modality(USER))


def events_of_window(movies: Movies, window: Window) -> dict[str, list[Any]]:
    """Return a stretch of events as the encoder's modality prepares it."""
    return movies.events(window.films, window.ratings)


def film_scores(
    vlm: VisionLanguageModel, words: FilmWords, features: Sequence[Float[Tensor, "_ D"]]
) -> Float[Tensor, "U N"]:
    """Return the scores of all films for users, whose features are known."""
    prompts = [words.user(vlm.span_length(USER, one)) for one in features]
    hidden = vlm(vlm.embed_prompts(prompts, [[one] for one in features]))
    return _of_films(vlm, words, hidden[:, -1])


def _of_films(
    vlm: VisionLanguageModel, words: FilmWords, last: Float[Tensor, "U D"]
) -> Float[Tensor, "U N"]:
    ids: Int[Tensor, " N"] = words.films.to(last.device)
    return vlm.language_model.token_logits(last, ids)


@torch.inference_mode()
def scores_of_text(
    vlm: VisionLanguageModel, words: FilmWords, windows: Sequence[Window]
) -> Float[Tensor, "U N"]:
    """Return the scores of all films behind the texts of histories."""
    found = []
    for chunk in _chunks(windows):
        hidden = vlm(vlm.embed_prompts([words.text(one) for one in chunk]))
        found.append(_of_films(vlm, words, hidden[:, -1]))
    return torch.cat(found)


@torch.inference_mode()
def scores_of_users(
    vlm: VisionLanguageModel, words: FilmWords, movies: Movies, windows: Sequence[Window]
) -> Float[Tensor, "U N"]:
    """Return the scores of all films for users, through their encoder and the language model."""
    users, found = events_of(vlm), []
    for chunk in _chunks(windows):
        items = [users.prepare(events_of_window(movies, one)) for one in chunk]
        found.append(film_scores(vlm, words, users.embed(items)))
    return torch.cat(found)


@torch.inference_mode()
def scores_of_encoder(
    users: EventsModality, movies: Movies, windows: Sequence[Window]
) -> Float[Tensor, "U N"]:
    """Return what the encoder of events says itself of the next film, without a language model."""
    found = []
    for chunk in _chunks(windows):
        items = [users.prepare(events_of_window(movies, one)) for one in chunk]
        last = torch.stack([states[-1] for states in users.states(items)])
        found.append(users.encoder.scores(last, 0)[:, 1:])
    return torch.cat(found)


def _chunks(windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
    return (windows[at : at + _BATCH] for at in range(0, len(windows), _BATCH))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread inside: small products gain nothing by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""The next film: a small language model with a word for every film, asked with text or with a user.

    text   <s> next film_50 star wars *5 film_12 ..    every film word is learned from all before it
    user   <s> next [what an encoder makes of them]    a question for each beginning of a history

The scores of a whole catalogue are the logits of the films' words behind one prompt.

Source: Ning et al. 2024 (User-LLM, arXiv 2402.13598): an encoder of events that learned alone, and
    what becomes of it inside a language model, against the same history as text.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from comparison.movies import Movies, film_word
from lapilli.checkpoint.load import Loaded
from lapilli.config.huggingface import parse_text_config
from lapilli.datasets.interactions import Interactions
from lapilli.lm import build_language_model
from lapilli.modality.events import EventsModality
from lapilli.model import VisionLanguageModel
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.shapes import Float, Int, Tensor

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


def windows_of(known: Interactions, events: int) -> list[Window]:
    """Return the last events of all users."""
    return [last_events(known, user, events) for user in range(len(known.user_ids))]


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

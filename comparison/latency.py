"""What a request costs: processor time of requests that take turns, and operations."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from comparison.movies import Movies
from comparison.next_film import (
    FilmWords,
    Window,
    events_of,
    events_of_window,
    film_scores,
    scores_of_text,
    windows_of,
)
from comparison.user_models import FUSIONS, Parts
from comparison.userllm_report import TEXT
from lapilli.checkpoint.load import Loaded
from lapilli.plan.flops import request_flops

Request = Callable[[Window], Callable[[], object]]


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

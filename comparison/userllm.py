"""User-LLM on MovieLens-100k: a user as a few vectors, against the same history as text.

    python -m comparison.userllm [--data DIR] [--seeds N]

    histories --> encoder of events --.
              --> language model -----+--> forms that read a user's vectors      user_models.py
    popularity | item-kNN | SASRec | encoder alone | text | forms | HLLM   --rank all films--> rows

Every row learns from the same events and reads the same last events; the second last film of a user
was what choices were made by, the last one is the test. Writes results/userllm.json after every
row, and docs/userllm.md of it.

Source: Ning et al. 2024 (User-LLM, arXiv 2402.13598); Junyi Chen et al. 2024 (HLLM, arXiv
    2409.12740); Kang and McAuley 2018 (SASRec, arXiv 1808.09781).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from comparison.baselines import (
    Score,
    SequenceModel,
    SequenceOptions,
    item_knn,
    popularity,
    sequence_scores,
    train_sequence_model,
)
from comparison.evaluation import Measured, Results, Scores, measured, validation_ndcg
from comparison.hllm import measure_items
from comparison.latency import encoder_flops, flops_of, milliseconds
from comparison.movies import ADVICE, NAME, Movies, data_folder, read_movies
from comparison.next_film import (
    USER,
    FilmWords,
    events_of,
    one_thread,
    windows_of,
)
from comparison.user_models import (
    FUSIONS,
    LEARNS,
    Options,
    Parts,
    encoder_scores,
    form_scores,
    learn_encoder,
    learn_form,
    learn_parts,
    learn_text,
    text_scores,
)
from comparison.userllm_report import PAGE, RESULT, SEQUENCE, TEXT, page, table
from comparison.workers import Result, Workers
from lapilli.datasets.interactions import Interactions

__all__ = ["learn_parts", "measure_form"]


def measure_text(parts: Parts, *, seed: int = 0) -> Measured:
    """Ask the language model with the last events as text."""
    loaded, options = parts.language_model(), parts.options
    words, events = FilmWords(loaded, parts.movies), options.sizes.events
    known = parts.movies.split.before_test
    texts = [words.text(window) for window in windows_of(known, events)]
    positions = float(np.mean([len(text) for text in texts]))
    return measured(
        parts.movies,
        text_scores(loaded, parts.movies, events),
        positions=positions,
        flops=float(np.mean([flops_of(loaded, len(text)) for text in texts])),
    )


def measure_encoder(parts: Parts, *, seed: int = 0) -> Measured:
    """Ask the encoder of events by itself."""
    users = events_of(parts.with_user("tokens", seed=0).model).eval()
    return measured(parts.movies, encoder_scores(users, parts.movies, parts.options.sizes.events))


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
        form_scores(loaded, movies, events),
        positions=positions,
        flops=flops_of(loaded, positions, memory=number if beside else 0),
        encoder_flops=encoder_flops(loaded, movies, events),
        trained=sum(p.numel() for p in loaded.model.parameters() if p.requires_grad),
    )


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
        seeds: of SASRec, of the encoder, and of the form that begins as it; other rows have one.
        requests: of each kind whose time is taken.
    """
    encoders = pool.each("encoder", learn_encoder, movies, options, seeds=seeds)
    text = pool.start("text", learn_text, movies, options)
    rows: list[tuple[str, list[Result]]] = [
        ("popularity", [pool.start("popularity", measure_popularity, movies)]),
        ("item-kNN", [pool.start("item-kNN", measure_item_knn, movies)]),
        (SEQUENCE, pool.each(SEQUENCE, measure_sequence, movies, options.sequence, seeds=seeds)),
    ]
    read = text()
    parts = [Parts(movies=movies, options=options, text=read, encoder=one()) for one in encoders]

    def of_seeds(name: str, work: Callable[..., Measured], *given: object) -> None:
        runs = [pool.start(name, work, one, *given, seed=i) for i, one in enumerate(parts)]
        rows.append((name, runs))

    rows.append((TEXT, [pool.start(TEXT, measure_text, parts[0])]))
    of_seeds("encoder alone", measure_encoder)
    of_seeds("user: tokens", measure_form, "tokens")
    forms = [(f"user: {one}", one, "full") for one in list(FUSIONS)[1:]]
    forms += [(f"user: tokens, {learns} learns", "tokens", learns) for learns in LEARNS[1:]]
    for name, fusion, learns in forms:
        rows.append((name, [pool.start(name, measure_form, parts[0], fusion, learns)]))
    rows.append(("HLLM", [pool.start("HLLM", measure_items, parts[0])]))
    for name, runs in rows:
        measured_runs = [result() for result in runs]
        results.found["seconds"] = dict(pool.seconds)
        results.add(name, measured_runs)
    results.found["milliseconds"] = milliseconds(parts[0], requests)
    results.write()


def measure_popularity(movies: Movies, *, seed: int = 0) -> Measured:
    """Rank films by how many have seen them."""
    return measured(movies, _of_histories(popularity(movies.split.train)))


def measure_item_knn(movies: Movies, *, seed: int = 0) -> Measured:
    """Rank films by those that a user saw last."""
    return measured(movies, _of_histories(item_knn(movies.split.train)))


def measure_sequence(movies: Movies, options: SequenceOptions, *, seed: int = 0) -> Measured:
    """Train a model of film numbers, keep the epochs that the validation finds best, and rank."""

    def validate(model: SequenceModel) -> float:
        return validation_ndcg(movies, _of_histories(sequence_scores(model)))

    model = train_sequence_model(movies.split.train, replace(options, seed=seed), validate=validate)
    return measured(movies, _of_histories(sequence_scores(model)))


def _of_histories(score: Score) -> Scores:
    """Return the scores of all users from those of a single history."""

    def scores(known: Interactions) -> np.ndarray:
        users = range(len(known.user_ids))
        return np.stack([score(known.history(user)) for user in users])

    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all rows, and write the result and the page."""
    parser = argparse.ArgumentParser(prog="comparison.userllm", description=__doc__)
    parser.add_argument("--data", help="folder that has ml-100k/; default: LAPILLI_DATA")
    parser.add_argument("--seeds", type=int, default=2, help="of SASRec, encoder and form")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0: this one alone")
    kept = "where finished work is kept: a run that was killed goes on; remove it to begin anew"
    parser.add_argument("--kept", default="build/userllm", help=kept)
    given = parser.parse_args(arguments)
    folder = data_folder(given.data)
    movies = read_movies(folder)
    if movies is None:
        sys.stderr.write(f"{ADVICE.format(folder=folder)}\n")
        return
    options = Options()
    results = Results(
        RESULT,
        movies,
        (SEQUENCE, TEXT),
        name=f"MovieLens-100k ({NAME})",
        window=options.sizes.events,
        options=options.said(),
    )
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

"""HLLM on films: one language model reads the words of a film, another one the films of a user.

Source: Junyi Chen et al. 2024 (HLLM, arXiv 2409.12740).
"""

from dataclasses import replace

import numpy as np

from comparison.evaluation import Measured, measured
from comparison.movies import film_word
from comparison.next_film import windows_of
from comparison.user_models import Parts, run_recipe, temporary_folder, trainer_recipe
from lapilli.checkpoint.load import with_modalities
from lapilli.datasets.interactions import Interactions
from lapilli.pipeline import Chat
from lapilli.plan.flops import request_flops
from lapilli.rank.next_item import NextItemScorer, NextItemTask
from lapilli.train.recipe import ModelRecipe, OptimRecipe, Recipe
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer.loop import train


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
    run = run_recipe(options.item_batch, options.item_steps, seed)
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
    with temporary_folder() as folder:
        train(task, trainer_recipe("items", options.item_lr, run), folder)
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

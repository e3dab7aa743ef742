"""recipes/tiny from file to weights: what a recipe says is what is built, trained and kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lapilli.config.model import DecoderConfig
from lapilli.lm.decoder import Decoder
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.train.batch import TrainingBatch, collate
from lapilli.train.initialise import initialise
from lapilli.train.log import RunLog
from lapilli.train.loop import Loss, train
from lapilli.train.recipe import Recipe
from lapilli.train.recipe_file import build_section, load_recipe
from lapilli.train.stages import FeatureReader, freeze

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny" / "instruct.toml"
WIDTH = 5


@dataclass
class Signs:
    """Is the picture bright or dark? Random features whose sign is the answer."""

    model: FeatureReader
    rows: int

    def batch(self, step: int, micro: int) -> tuple[TrainingBatch, int]:
        generator = torch.Generator().manual_seed(100 * step + micro)
        prompts, media = [], []
        for _ in range(self.rows):
            bright = bool(torch.randint(2, (), generator=generator))
            features = torch.rand(3, WIDTH, generator=generator) + 0.5
            media.append([features if bright else -features])
            ids = [1, 0, 0, 0, 9, 6 if bright else 7, 2]
            prompts.append(EncodedPrompt(ids, [False] * 5 + [True] * 2, (Span(0, 1, 3),)))
        made = collate(prompts, media)
        return made, made.num_valid

    def loss(self, batch: TrainingBatch) -> Loss:
        return self.model.loss(batch)

    def evaluate(self) -> Mapping[str, float]:
        return {}


def new_task(recipe: Recipe) -> Signs:
    text = build_section(DecoderConfig, recipe.model.text, "model.text")
    model = FeatureReader(Decoder(text), nn.Linear(WIDTH, text.hidden_size))
    initialise(model, recipe.run.seed, depth=text.num_layers)
    freeze(model, recipe.stage)
    return Signs(model, recipe.run.batch_size)


def held_out(task: Signs) -> float:
    batch, count = task.batch(1000, 0)
    with torch.no_grad():
        return task.loss(batch).total.item() / count


def test_the_recipe_is_followed_to_its_last_step(tmp_path):
    recipe = load_recipe(RECIPE)
    task = new_task(recipe)
    before, start = held_out(task), [p.detach().clone() for p in task.model.parameters()]
    train(task, recipe, tmp_path)
    assert [record["step"] for record in RunLog(tmp_path).records()] == [1, 2, 3, 4, 5, 6]
    assert held_out(task) < before / 2
    assert not any(map(torch.equal, start, task.model.parameters()))  # instruct trains both parts
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    assert kept["step"] == recipe.run.steps
    assert all(torch.equal(kept["model"][n], p) for n, p in task.model.named_parameters())


def test_a_finished_run_is_left_as_it_is(tmp_path):
    recipe = load_recipe(RECIPE)
    first, second = new_task(recipe), new_task(recipe)
    train(first, recipe, tmp_path)
    train(second, recipe, tmp_path)
    assert len(RunLog(tmp_path).records()) == recipe.run.steps
    assert held_out(first) == held_out(second)

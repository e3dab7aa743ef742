import numpy as np
import pytest
import torch

from lapilli.config.model import VisionConfig
from lapilli.train.recipe import OptimRecipe, RunRecipe
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.metrics import RunLog
from pebble.draw import draw, model_pixels
from pebble.recipe import PebbleRecipe
from pebble.regions import LEXICON, region_words
from pebble.sample import sample_scene
from pebble.tower import (
    Joined,
    TowerTask,
    TowerTrainer,
    contrastive,
    fit_naming_head,
    grid_waves,
    shifted,
    whitening_filters,
    word_weights,
)

CONFIG = VisionConfig(
    image_size=32, patch_size=8, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2,
    feature_select="cls_patch",
)  # fmt: skip
RUN = RunRecipe(
    steps=30, batch_size=6, gradient_accumulation_steps=1, log_every=1, evaluate_every=30
)


def pool(number):
    scenes = [sample_scene(seed) for seed in range(number)]
    pixels = np.stack([model_pixels(draw(scene), 32) for scene in scenes])
    words = [np.packbits(region_words(s, 4).reshape(16, -1), axis=-1) for s in scenes]
    captions = np.zeros((number, 5), dtype=np.int64)
    captions[:, :2] = np.arange(1, 2 * number + 1).reshape(number, 2)
    return pixels, np.stack(words), captions


def new_task():
    pixels, words, captions = pool(24)
    parts = Joined(pixels[:4], pixels[4:])
    model = TowerTrainer(CONFIG, 64, 0)
    return TowerTask(model, pixels=parts, words=words, captions=captions, run=RUN, held_out=6)


@pytest.mark.slow
def test_the_loss_falls_and_figures_are_logged(tmp_path):
    recipe = PebbleRecipe(stage="tower", optim=OptimRecipe(lr=3e-3), run=RUN)
    train(new_task(), recipe, tmp_path)
    records = RunLog(tmp_path).records()
    naming = [record["naming"] for record in records if "naming" in record]
    assert sum(naming[-5:]) < sum(naming[:5]) / 2
    assert 0 <= records[-1]["colour"] <= 1


@pytest.mark.slow
def test_batches_are_a_function_of_the_step():
    first, second = new_task(), new_task()
    for name, values in first.batch(3, 0)[0].items():
        assert torch.equal(values, second.batch(3, 0)[0][name])


def test_the_class_token_is_that_of_the_whole_last_layer():
    model = TowerTrainer(CONFIG, 64, 0).eval()
    features = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    stack = model.vision_tower.vision_model
    expected = stack.post_layernorm(stack.encoder.layers[-1](features)[:, 0])
    torch.testing.assert_close(model._class_token(features), expected)


def test_whitened_patches_have_unit_variance_where_there_is_signal():
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    filters = whitening_filters(images, 4, 48)
    patches = torch.nn.functional.conv2d(images, filters, stride=4).transpose(0, 1).flatten(1)
    covariance = torch.cov(patches)
    assert (covariance - torch.eye(48)).abs().max() < 0.05


def test_positions_differ():
    waves = grid_waves(4, 32)
    assert waves.shape == (16, 32)
    distance = torch.cdist(waves, waves) + 9 * torch.eye(16)
    assert distance.min() > 0.5


def test_joined_arrays_are_indexed_as_one():
    whole = np.arange(30, dtype=np.uint8).reshape(10, 3)
    joined = Joined(whole[:3], whole[3:4], whole[4:])
    at = np.array([9, 0, 3, 3, 2])
    assert len(joined) == 10
    assert np.array_equal(joined[at], whole[at])


def test_shifting_repeats_the_edge():
    pixels = torch.arange(400).remainder(251).to(torch.uint8).view(1, 20, 20)
    for seed in range(8):
        down, right = np.random.default_rng(seed).integers(-6, 7, size=2)
        moved = shifted(pixels, np.random.default_rng(seed))
        wide = torch.nn.functional.pad(pixels[None].float(), (6, 6, 6, 6), mode="replicate")[0]
        top, left = 6 - int(down), 6 - int(right)
        assert torch.equal(moved.float(), wide[:, top : top + 20, left : left + 20])


def test_every_word_has_a_weight():
    weights = word_weights()
    assert len(weights) == len(LEXICON)
    assert weights.min() > 0


@pytest.mark.slow
def test_a_naming_head_is_fitted_to_a_tower_that_stays_as_it_is():
    pixels, words, _ = pool(24)
    model = TowerTrainer(CONFIG, 64, 0)
    tower = {name: value.clone() for name, value in model.vision_tower.state_dict().items()}

    def naming():
        features, _ = model.images(torch.from_numpy(pixels))
        logits = model.region_head(features[:, 1:])
        bits = np.unpackbits(words, axis=-1, count=len(LEXICON))
        targets = torch.from_numpy(bits).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        return float(loss.detach())

    before = naming()
    fit_naming_head(model, torch.from_numpy(pixels), words, steps=60)
    assert naming() < before / 4
    after = model.vision_tower.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in tower.items())


def test_a_trained_tower_keeps_its_filters():
    pixels, words, captions = pool(24)
    model = TowerTrainer(CONFIG, 64, 0)
    weight = model.vision_tower.vision_model.embeddings.patch_embedding.weight
    before = weight.clone()
    options = {"words": words, "captions": captions, "run": RUN, "held_out": 6}
    TowerTask(model, pixels=Joined(pixels), fresh=False, **options)
    assert torch.equal(weight, before)
    TowerTask(model, pixels=Joined(pixels), **options)
    assert not torch.equal(weight, before)


def test_contrastive_is_zero_for_perfect_pairs_and_log_n_for_equal_ones():
    scale = torch.tensor(100.0).log()
    assert contrastive(torch.eye(4), 3 * torch.eye(4), scale) < 1e-6
    same = torch.ones(4, 4)
    assert contrastive(same, same, scale).item() == pytest.approx(torch.tensor(4.0).log().item())


def test_contrastive_holds_its_scale():
    torch.manual_seed(0)
    images, texts = torch.randn(4, 8), torch.randn(4, 8)
    huge, most = torch.tensor(50.0), torch.tensor(100.0).log()
    torch.testing.assert_close(contrastive(images, texts, huge), contrastive(images, texts, most))

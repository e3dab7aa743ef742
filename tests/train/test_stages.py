import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from lapilli.config.model import (
    DecoderConfig,
    ImageConfig,
    PixelConfig,
    ProjectorConfig,
    VisionConfig,
)
from lapilli.errors import ConfigError
from lapilli.geometry import ImageSize
from lapilli.lm.decoder import Decoder
from lapilli.lora import adapters
from lapilli.modality.image.image import ImageModality
from lapilli.model import VisionLanguageModel
from lapilli.quant.nf4 import Nf4Linear, RoundedScales
from lapilli.train.recipe import LoraRecipe, ModelRecipe, OptimRecipe, Recipe, RunRecipe
from lapilli.train.stages import choose_trainable, set_up_layers
from lapilli.train.trainer.step import PlainAttention, plain_attention

CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=8, norm_eps=1e-5, rope_theta=1e4, max_positions=64,
)  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
def test_plain_attention_is_its_fused_twin(is_causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator) for _ in range(3))
    fused = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(plain_attention(q, k, v, is_causal=is_causal), fused)


def test_plain_attention_stands_in_only_without_a_mask(monkeypatch):
    monkeypatch.setattr("lapilli.train.trainer.step.plain_attention", refuse)
    masked = torch.ones(2, 2, 4, 4, dtype=torch.bool)
    x = torch.randn(2, 2, 4, 8)
    with PlainAttention():
        nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=masked)
        with pytest.raises(AssertionError):
            nn.functional.scaled_dot_product_attention(x, x, x)


def refuse(*_args, **_options):
    """Stand in for what must not be called."""
    raise AssertionError


def recipe_of(stage="instruct", *, lora=None, tune_tower=False, **run):
    return Recipe(
        stage=stage,
        optim=OptimRecipe(lr=1e-3),
        run=RunRecipe(batch_size=1, **run),
        model=ModelRecipe(tune_tower=tune_tower),
        lora=lora,
    )


def parts(names):
    """language_model, projector, vision_tower, image_newline: whatever the names lie in."""
    known = ("lora_", "vision_tower", "projector", "image_newline", "language_model")
    return {next(part for part in known if part in name) for name in names}


def new_llava(*, num_layers=2, tower_layers=4):
    """A tiny LLaVA of tiles, with a learned row end."""
    torch.manual_seed(0)
    vision = VisionConfig(
        family="clip", hidden_size=16, intermediate_size=32, num_layers=tower_layers, num_heads=2,
        image_size=28, patch_size=14, feature_layer=-2, norm_eps=1e-5, activation="quick_gelu",
    )  # fmt: skip
    image = ImageConfig(
        pixels=PixelConfig(crop_size=ImageSize(28, 28), shortest_edge=28),
        aspect="anyres", merge="spatial_unpad", pinpoints=(ImageSize(28, 56),),
    )  # fmt: skip
    projector = ProjectorConfig(kind="mlp", depth=2, vision_size=16, hidden_size=16)
    seen = ImageModality(image, vision, projector, has_newline=True)
    language_model = Decoder(replace(CONFIG, num_layers=num_layers))
    return VisionLanguageModel(language_model, {"image": seen})


@pytest.fixture
def whole():
    return new_llava()


LORA = LoraRecipe(rank=2, alpha=4.0)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (recipe_of("align"), {"projector", "image_newline"}),
        (recipe_of(), {"projector", "image_newline", "language_model"}),
        (recipe_of(lora=LORA), {"projector", "image_newline", "lora_"}),
        (
            recipe_of(tune_tower=True),
            {"projector", "image_newline", "language_model", "vision_tower"},
        ),
    ],
)
def test_a_recipe_chooses_what_learns(whole, recipe, expected):
    names = choose_trainable(whole, recipe)
    assert parts(names) == expected
    assert set(names) == {n for n, p in whole.named_parameters() if p.requires_grad}


def test_layers_of_the_tower_that_nothing_reads_rest(whole):
    names = choose_trainable(whole, recipe_of(tune_tower=True))
    assert any("encoder.layers.2." in name for name in names)
    assert not any("encoder.layers.3." in name or "post_layernorm" in name for name in names)


def test_adapters_sit_on_all_linear_layers_but_the_head(whole):
    choose_trainable(whole, recipe_of(lora=LORA))
    paths = {path for path, _ in adapters(whole)}
    kinds = {path.rsplit(".", 1)[1] for path in paths}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(paths) == 7 * CONFIG.num_layers


def test_an_adapter_learns_in_float32_beside_narrow_weights(whole):
    whole.bfloat16()
    choose_trainable(whole, recipe_of(lora=LORA))
    dtypes = {p.dtype for n, p in whole.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_packed_base_is_frozen_and_smaller(whole, double_quant):
    lora = LoraRecipe(rank=2, base="nf4", double_quant=double_quant)
    choose_trainable(whole, recipe_of(lora=lora))
    layers = dict(adapters(whole))
    assert len(layers) == 7 * CONFIG.num_layers
    assert all(isinstance(layer.base, Nf4Linear) for layer in layers.values())
    rounded = [isinstance(layer.base.scales, RoundedScales) for layer in layers.values()]
    assert rounded == [double_quant] * len(layers)
    assert isinstance(whole.language_model.lm_head, nn.Linear)


def test_an_adapter_goes_on_over_floats_alone(whole):
    choose_trainable(whole, recipe_of(lora=LORA))
    before = [id(layer) for _, layer in adapters(whole)]
    choose_trainable(whole, recipe_of(lora=LORA))
    assert [id(layer) for _, layer in adapters(whole)] == before
    with pytest.raises(ConfigError, match=r"lora\.base is 'nf4' and the model has an adapter"):
        choose_trainable(whole, recipe_of(lora=LoraRecipe(base="nf4")))


def test_an_unknown_stage_is_refused(whole):
    recipe = recipe_of()
    object.__setattr__(recipe, "stage", "tower")  # as a program without type checks may
    with pytest.raises(ConfigError, match=r"stage 'tower' is unknown: .* align and instruct"):
        choose_trainable(whole, recipe)


@pytest.mark.parametrize("wanted", [True, False])
def test_layers_recompute_as_the_run_says(whole, wanted):
    set_up_layers(whole, recipe_of(gradient_checkpointing=wanted).run)
    tower = whole.modality("image").vision_tower
    assert whole.language_model.gradient_checkpointing is tower.gradient_checkpointing is wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "kind"), [("eager", "packed"), ("inductor", "packed"), ("inductor", "alone")]
)
def test_compiled_layers_give_the_same_loss_and_gradients_from_few_programs(backend, kind):
    """In a process of its own: the checks of annotations cannot be compiled."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.compiled", backend, kind],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_adapter_goes_on_as_it_is_or_is_refused(whole):
    """rank, alpha and targets of a recipe did nothing beside an adapter that was there."""
    choose_trainable(whole, recipe_of(lora=LORA))
    for key, value in (("rank", 5), ("alpha", 99.0), ("targets", ("language_model.nothing",))):
        with pytest.raises(ConfigError, match=rf"lora\.{key}"):
            choose_trainable(whole, recipe_of(lora=replace(LORA, **{key: value})))
    choose_trainable(whole, recipe_of(lora=replace(LORA, dropout=0.25)))
    assert {layer.dropout.p for _, layer in adapters(whole)} == {0.25}

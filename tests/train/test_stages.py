"""What a run starts from, and which parameters its stage trains."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lapilli.checkpoint.export import save_loaded
from lapilli.checkpoint.formats.quantized import written_quantization
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.source import RESULTS
from lapilli.config.model import (
    DecoderConfig,
    ImageConfig,
    PixelConfig,
    ProjectorConfig,
    VisionConfig,
)
from lapilli.errors import (
    ConfigError,
    MissingFileError,
    MissingWeightsError,
    PromptError,
    ShapeMismatchError,
)
from lapilli.geometry import ImageSize
from lapilli.lm.decoder import Decoder
from lapilli.lora import adapter_tensors, adapters
from lapilli.modality.image.image import ImageModality
from lapilli.model import VisionLanguageModel
from lapilli.prompt.choose import template_by_name
from lapilli.quant import QuantConfig
from lapilli.quant.linear import QuantLinear
from lapilli.quant.nf4 import Nf4Linear, RoundedScales
from lapilli.train.data import SampleEncoder
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SaveRecipe,
)
from lapilli.train.results import Results, save_results
from lapilli.train.stages import (
    choose_template,
    choose_trainable,
    for_model,
    load_projector,
    load_start,
    set_up_layers,
)
from lapilli.train.trainer.step import PlainAttention, plain_attention
from tests.checkpoint.conftest import llava  # noqa: F401  fixture
from tests.prompt.test_encode import with_sentinels
from tests.train.data.conftest import goldens  # noqa: F401  fixture
from tests.train.data.test_encoder import golden_sample


def recipe_of(checkpoint, stage="instruct", **given):
    sections = {"model": ModelRecipe(checkpoint=checkpoint), **given}
    run = RunRecipe(batch_size=1, precision=sections.pop("precision", "bfloat16"))
    return Recipe(stage=stage, optim=OptimRecipe(lr=1e-3), run=run, **sections)


LORA = LoraRecipe(rank=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "frozen"),
    [
        ({"lora": LORA}, torch.bfloat16),
        ({"stage": "align"}, torch.bfloat16),
        ({"lora": LORA, "precision": "float32"}, torch.float32),
        ({"lora": LORA, "save": SaveRecipe(merge=True)}, torch.float32),
        ({"stage": "align", "save": SaveRecipe(layout="huggingface")}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_frozen_weights_are_as_narrow_as_the_run_unless_they_are_saved(checkpoint, given, frozen):
    recipe = recipe_of(checkpoint, **given)
    model = load_start(recipe).model
    choose_trainable(model, recipe)
    learned = {p.dtype for p in model.parameters() if p.requires_grad}
    assert learned == {torch.float32}
    assert model.modality("image").vision_tower.vision_model.pre_layrnorm.weight.dtype == frozen


def test_a_tower_that_learns_is_read_in_float32(checkpoint):
    model = ModelRecipe(checkpoint=checkpoint, tune_tower=True)
    loaded = load_start(recipe_of(checkpoint, lora=LORA, model=model))
    dtypes = {n.startswith("language"): p.dtype for n, p in loaded.model.named_parameters()}
    assert dtypes == {True: torch.bfloat16, False: torch.float32}


def test_int4_packs_the_layers_under_the_adapter(llava):  # noqa: F811
    recipe = recipe_of(str(llava), lora=LoraRecipe(rank=2, base="int4"))
    model = load_start(recipe).model
    choose_trainable(model, recipe)
    found = [layer.base for _, layer in adapters(model)]
    assert len(found) == 14
    assert all(isinstance(base, QuantLinear) for base in found)
    assert sorted(base.bits for base in found) == [4] * 12 + [8] * 2  # the values of attention


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA])
def test_a_run_starts_with_the_projector_in_the_folder_of_another(checkpoint, tmp_path, lora):
    own = load_checkpoint(checkpoint).model.modality("image").projector
    drawn = {name: torch.randn_like(p, dtype=torch.float32) for name, p in own.named_parameters()}
    (tmp_path / RESULTS).mkdir()
    saved = {f"model.mm_projector.{name}": tensor for name, tensor in drawn.items()}
    torch.save(saved, tmp_path / RESULTS / "mm_projector.bin")
    model = ModelRecipe(checkpoint=checkpoint, projector=str(tmp_path))
    loaded = load_start(recipe_of(checkpoint, lora=lora, model=model))
    for name, parameter in loaded.model.modality("image").projector.named_parameters():
        assert torch.equal(parameter, drawn[name]), name


def test_a_run_goes_on_with_the_adapter_of_another(checkpoint, tmp_path):
    recipe = recipe_of(checkpoint, lora=LORA)
    first = load_start(recipe)
    choose_trainable(first.model, recipe)
    drawn = adapter_tensors(first.model)
    with torch.no_grad():
        for tensor in drawn.values():
            tensor.normal_()
    save_results(tmp_path, first.model, Results.of(first, recipe))
    model = ModelRecipe(checkpoint=checkpoint, adapter=str(tmp_path))
    recipe = recipe_of(checkpoint, lora=LORA, model=model)
    loaded = load_start(recipe).model
    choose_trainable(loaded, recipe)
    found = adapter_tensors(loaded)
    assert found.keys() == drawn.keys()
    assert all(torch.equal(found[name], drawn[name]) for name in drawn)
    assert all(tensor.requires_grad for tensor in found.values())


def test_a_projector_that_does_not_fit_is_refused(checkpoint, tmp_path):
    model = load_checkpoint(checkpoint, dtype="float32").model
    with pytest.raises(MissingFileError, match=r"no mm_projector\.safetensors or"):
        load_projector(model, tmp_path)
    own = dict(model.modality("image").projector.named_parameters())
    torch.save({"model.mm_projector.weight": torch.ones(2, 2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(MissingWeightsError, match="another projector type"):
        load_projector(model, tmp_path)
    wrong = {f"mm_projector.{name}": torch.ones(3) for name in own}
    torch.save(wrong, tmp_path / "mm_projector.bin")
    with pytest.raises(ShapeMismatchError, match="another tower or language model"):
        load_projector(model, tmp_path)


@pytest.mark.parametrize(
    ("stage", "asked", "name"),
    [("align", "", "plain"), ("instruct", "", "llava_v1"), ("instruct", "llava_v0", "llava_v0")],
)
def test_the_template_is_that_of_the_stage_or_the_recipe(checkpoint, stage, asked, name):
    recipe = recipe_of(checkpoint, stage, data=DataRecipe(template=asked))
    assert choose_template(recipe, load_start(recipe)).name == name


def test_a_template_by_name_puts_the_checkpoints_tokens_around_a_picture(golden, goldens):  # noqa: F811
    """Against labels of the original under mm_use_im_start_end."""
    loaded = load_checkpoint(golden("llava-tiny-im-start-end")[1]["model_path"], dtype="float32")
    compared = 0
    for case in goldens.cases("_labels", "labels"):
        if not case["input"].get("im_start_end"):
            continue
        recipe = recipe_of("", data=DataRecipe(template=case["input"]["version"]))
        tokenizer = goldens.tokenizer(
            case["input"]["tokenizer"], [["<im_patch>"], ["<im_start>", "<im_end>"]]
        )
        sample = golden_sample(case)
        rows = SampleEncoder(tokenizer, choose_template(recipe, loaded), loaded.model)
        prompt = rows.encode_prompt(sample, [1] * len(sample.media))
        assert with_sentinels(prompt) == case["expect"]["input_ids"], case["id"]
        assert prompt.labels == case["expect"]["labels"], case["id"]
        compared += 1
    assert compared >= 3


def test_student_and_teacher_each_have_their_own_tokens_around_a_picture(checkpoint, golden):
    marked = load_checkpoint(golden("llava-tiny-im-start-end")[1]["model_path"], dtype="float32")
    bare, template = load_start(recipe_of(checkpoint)), template_by_name("vicuna_v1")
    assert for_model(template, marked).media_tokens == ("<im_start>", "<im_end>")
    assert for_model(for_model(template, marked), bare) == template


def test_a_template_of_another_base_is_refused(checkpoint):
    recipe = recipe_of(checkpoint, data=DataRecipe(template="chatml_direct"))
    with pytest.raises(ConfigError, match=r"ends turns with '<\|im_end\|>', which is no token"):
        choose_template(recipe, load_start(recipe))
    recipe = recipe_of(checkpoint, data=DataRecipe(template="nothing"))
    with pytest.raises(PromptError, match="no template is called 'nothing'"):
        choose_template(recipe, load_start(recipe))


@pytest.mark.slow
def test_a_template_that_contradicts_the_chat_template_beside_the_checkpoint_is_refused(
    checkpoint, tmp_path
):
    folder = tmp_path / Path(checkpoint).name
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text("{{ '[INST] <<SYS>>' }}")
    for asked in ("vicuna_v1", "llava_v0"):
        recipe = recipe_of(str(folder), data=DataRecipe(template=asked))
        with pytest.raises(
            ConfigError,
            match=rf"'{asked}' is wrong .* take 'llava_llama_2', or leave data\.template out: the "
            "checkpoint asks for 'llava_v1'",
        ):
            choose_template(recipe, load_start(recipe))
    for asked in ("", "llava_v1", "plain", "llava_llama_2"):  # its own, and what fits
        recipe = recipe_of(str(folder), data=DataRecipe(template=asked))
        assert choose_template(recipe, load_start(recipe)).name == (asked or "llava_v1")


def test_no_checkpoint_and_no_pictures_are_refused(golden):
    with pytest.raises(ConfigError, match=r"model\.checkpoint is missing"):
        load_start(recipe_of(None))
    base = str(golden("llava-v1.5-tiny-projector")[1]["model_base"])
    with pytest.raises(ConfigError, match="reads text only"):
        load_start(recipe_of(base))


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


def staged(stage="instruct", *, lora=None, tune_tower=False, **run):
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


ADAPTER = LoraRecipe(rank=2, alpha=4.0)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (staged("align"), {"projector", "image_newline"}),
        (staged(), {"projector", "image_newline", "language_model"}),
        (staged(lora=ADAPTER), {"projector", "image_newline", "lora_"}),
        (
            staged(tune_tower=True),
            {"projector", "image_newline", "language_model", "vision_tower"},
        ),
    ],
)
def test_a_recipe_chooses_what_learns(whole, recipe, expected):
    names = choose_trainable(whole, recipe)
    assert parts(names) == expected
    assert set(names) == {n for n, p in whole.named_parameters() if p.requires_grad}


def test_layers_of_the_tower_that_nothing_reads_rest(whole):
    names = choose_trainable(whole, staged(tune_tower=True))
    assert any("encoder.layers.2." in name for name in names)
    assert not any("encoder.layers.3." in name or "post_layernorm" in name for name in names)


def test_adapters_sit_on_all_linear_layers_but_the_head(whole):
    choose_trainable(whole, staged(lora=ADAPTER))
    paths = {path for path, _ in adapters(whole)}
    kinds = {path.rsplit(".", 1)[1] for path in paths}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(paths) == 7 * CONFIG.num_layers


def test_an_adapter_learns_in_float32_beside_narrow_weights(whole):
    whole.bfloat16()
    choose_trainable(whole, staged(lora=ADAPTER))
    dtypes = {p.dtype for n, p in whole.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_packed_base_is_frozen_and_smaller(whole, double_quant):
    lora = LoraRecipe(rank=2, base="nf4", double_quant=double_quant)
    choose_trainable(whole, staged(lora=lora))
    layers = dict(adapters(whole))
    assert len(layers) == 7 * CONFIG.num_layers
    assert all(isinstance(layer.base, Nf4Linear) for layer in layers.values())
    rounded = [isinstance(layer.base.scales, RoundedScales) for layer in layers.values()]
    assert rounded == [double_quant] * len(layers)
    assert isinstance(whole.language_model.lm_head, nn.Linear)


def test_an_adapter_goes_on_over_floats_alone(whole):
    choose_trainable(whole, staged(lora=ADAPTER))
    before = [id(layer) for _, layer in adapters(whole)]
    choose_trainable(whole, staged(lora=ADAPTER))
    assert [id(layer) for _, layer in adapters(whole)] == before
    with pytest.raises(ConfigError, match=r"lora\.base is 'nf4' and the model has an adapter"):
        choose_trainable(whole, staged(lora=LoraRecipe(base="nf4")))


def test_an_unknown_stage_is_refused(whole):
    recipe = staged()
    object.__setattr__(recipe, "stage", "tower")  # as a program without type checks may
    with pytest.raises(ConfigError, match=r"stage 'tower' is unknown: .* align and instruct"):
        choose_trainable(whole, recipe)


@pytest.mark.parametrize("wanted", [True, False])
def test_layers_recompute_as_the_run_says(whole, wanted):
    set_up_layers(whole, staged(gradient_checkpointing=wanted).run)
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
    choose_trainable(whole, staged(lora=ADAPTER))
    for key, value in (("rank", 5), ("alpha", 99.0), ("targets", ("language_model.nothing",))):
        with pytest.raises(ConfigError, match=rf"lora\.{key}"):
            choose_trainable(whole, staged(lora=replace(ADAPTER, **{key: value})))
    choose_trainable(whole, staged(lora=replace(ADAPTER, dropout=0.25)))
    assert {layer.dropout.p for _, layer in adapters(whole)} == {0.25}


SETTINGS = {"bits": 4, "group_size": 128, "sym": False}


@pytest.fixture(params=["int8", "int4", "awq", "gptq"])
def packed(request, checkpoint, tmp_path):
    """A checkpoint whose config.json says that it is packed; its weights are not looked at."""
    folder = tmp_path / "llava-packed"
    shutil.copytree(checkpoint, folder)
    if request.param in ("int8", "int4"):
        section = written_quantization(QuantConfig(bits=int(request.param[-1])))
    else:
        method = {"gptq": {"desc_act": False}, "awq": {"version": "gemm", "zero_point": True}}
        section = {"quant_method": request.param, **SETTINGS, **method[request.param]}
    content = json.loads((folder / "config.json").read_text("utf-8"))
    content["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("base", ["float", "int4", "nf4"])
def test_an_adapter_on_a_packed_checkpoint_is_refused_at_once(packed, base):
    recipe = recipe_of(packed, lora=LoraRecipe(rank=2, base=base))
    with pytest.raises(ConfigError, match=r"is quantized \(.*\), and an adapter .* float") as told:
        load_start(recipe)
    assert 'lora.base = "int4" or "nf4" packs it while it trains' in str(told.value)


def test_packed_weights_that_would_have_to_learn_are_refused_at_once(packed):
    with pytest.raises(
        ConfigError, match=r"is quantized .* packed weights do not learn: train the"
    ):
        load_start(recipe_of(packed))


def test_a_projector_learns_on_a_packed_checkpoint(llava, tmp_path):  # noqa: F811
    loaded = load_checkpoint(str(llava), device="cpu", dtype="stored", quantization="int8")
    save_loaded(tmp_path / "q", loaded, quantization=loaded.quantization)
    recipe = recipe_of(str(tmp_path / "q"), "align")
    start = load_start(recipe)
    names = choose_trainable(start.model, recipe)
    assert names
    assert all(
        name.startswith(("modalities.image.projector", "modalities.image.image_newline"))
        for name in names
    )
    results = Results.of(start, recipe)
    save_results(tmp_path / "out", start.model, results)
    again = load_checkpoint(str(tmp_path / "out"), device="cpu")
    assert any(isinstance(one, QuantLinear) for one in again.model.modules())

"""Rotated models give the logits that they gave, with flatter activations and rounder weights."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lapilli
from lapilli.checkpoint.load import load_checkpoint
from lapilli.config.model import DecoderConfig, MptConfig, ProjectorConfig, VisionConfig
from lapilli.errors import ConfigError
from lapilli.geometry import ImageSize
from lapilli.lm import Decoder, Mpt
from lapilli.lora import LoraConfig, inject
from lapilli.modality.image.image import ImageModality
from lapilli.modality.image.pixels import PreparedImage
from lapilli.modality.vector import VectorModality
from lapilli.model import VisionLanguageModel
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.quant import QuantConfig, quantize
from lapilli.quant.rotation import Flat, Rotation, check_rotation
from tests.modality.image.build import image_config

TEXT = DecoderConfig(
    vocab_size=101,
    hidden_size=48,  # 16 x 3
    intermediate_size=56,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=128,
)
VISION = VisionConfig(
    image_size=56, patch_size=14, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2
)
MLP = {"kind": "mlp", "depth": 2}
TILED = {"aspect": "anyres", "merge": "spatial_unpad"}


def build(text=None, projector=MLP, image=None, *, has_newline=False):
    """A random model in float32 whose biases and gains are not the neutral ones."""
    torch.manual_seed(0)
    text = dataclasses.replace(TEXT, **(text or {}))
    config = ProjectorConfig(
        vision_size=VISION.hidden_size, hidden_size=text.hidden_size, **projector
    )
    modality = ImageModality(
        image_config(56, **(image or {})), VISION, config, has_newline=has_newline
    )
    model = VisionLanguageModel(Decoder(text), {"image": modality}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif name.startswith("language_model"):
                parameter.normal_(std=0.3)
    return model


def rotate(model, seed=0):
    model = copy.deepcopy(model)
    model.language_model.untie()
    rotation = Rotation(model, seed)
    rotation.ends(model)
    for layer in model.language_model.model.layers:
        rotation.layer(layer)
    return model


def logits_of(model, *, with_picture=True):
    torch.manual_seed(1)
    prompt, media = EncodedPrompt(list(range(3, 20)), [False] * 17, ()), []
    if with_picture:
        tiled = model.modalities["image"].mode.is_tiled
        item = PreparedImage(torch.randn(3 if tiled else 1, 3, 56, 56), ImageSize(90, 50))
        length = model.modalities["image"].num_tokens(item)
        ids = [5, 6, 7, *([0] * length), 8, 9, 10]
        prompt, media = EncodedPrompt(ids, [False] * len(ids), (Span(0, 3, length),)), [item]
    with torch.inference_mode():
        return model.logits(model.forward(model.embed_prompts([prompt], [media])))


def check_same(before, after, limit=1e-4):
    for with_picture in (False, True):
        expected = logits_of(before, with_picture=with_picture)
        found = logits_of(after, with_picture=with_picture)
        assert float((found - expected).norm() / expected.norm()) < limit


@settings(max_examples=40)
@given(width=st.integers(1, 700), seed=st.integers(0, 9))
def test_the_matrices_are_orthogonal_and_flat(width, seed):
    matrix = Flat(width, seed)(torch.eye(width))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width), atol=2e-5, rtol=0)
    assert float(matrix.abs().max()) <= (2 / width) ** 0.5 * 1.001


def test_the_matrix_of_a_power_of_two_is_one_of_hadamard():
    matrix = Flat(512, 3)(torch.eye(512)) * 512**0.5
    assert bool((matrix.abs() - 1).abs().max() < 1e-4)
    assert not torch.equal(matrix, Flat(512, 4)(torch.eye(512)))
    rows = torch.randn(2, 5, 512)
    torch.testing.assert_close(Flat(512, 3)(rows), rows @ matrix / 512**0.5, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 16},
        {"qkv_bias": True},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "num_kv_heads": 2},
        {"qk_norm": True},
        {"norm_offset": 1.0, "embedding_scale": 7.0, "activation": "gelu_tanh"},
        {"logit_softcap": 20.0, "attention_softcap": 30.0, "query_scalar": 24.0},
        {"sliding_window": 5, "full_layers": (1,)},
        {"tie_embeddings": True},
    ],
    ids=lambda text: " ".join(text) or "llama",
)
def test_logits_of_every_kind_of_decoder(text):
    model = build(text)
    if text.get("norm_offset"):  # gains of 1 + weight
        with torch.no_grad():
            for name, parameter in model.language_model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.sub_(0.5)
    check_same(model, rotate(model))


@pytest.mark.parametrize(
    "projector",
    [
        {"kind": "linear"},
        {"kind": "linear", "bias": False},
        MLP,
        {"kind": "mlp", "depth": 3},
        {"kind": "mlp", "depth": 2, "pool": 2, "pool_at": "input"},
        {"kind": "mlp", "depth": 2, "pool": 2, "pool_at": "output"},
        {"kind": "resampler", "depth": 1, "num_queries": 3},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_logits_behind_every_projector(projector):
    model = build(projector=projector)
    check_same(model, rotate(model))


@pytest.mark.parametrize("has_newline", [True, False])
def test_logits_of_tiles(has_newline):
    model = build(image=TILED, has_newline=has_newline)
    check_same(model, rotate(model))


def test_logits_with_a_vector():
    model = build()
    torch.manual_seed(2)
    model.modalities["user"] = VectorModality(
        ProjectorConfig(vision_size=6, hidden_size=48, kind="mlp", depth=2), name="user"
    )
    after = rotate(model)
    prompt = EncodedPrompt([3, 0, 0, 4], [False] * 4, (Span(0, 1, 2, "user"),))
    logits = []
    for one in (model, after):
        item = one.modalities["user"].prepare(torch.randn(2, 6, generator=torch.manual_seed(3)))
        with torch.inference_mode():
            logits.append(one.logits(one.forward(one.embed_prompts([prompt], [[item]]))))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=1e-4)


def test_pebble():
    loaded = load_checkpoint("pebble", device="cpu", dtype="float32")
    after = rotate(loaded.model)
    ids = torch.arange(3, 40)[None]
    found = []
    for one in (loaded.model, after):
        decoder = one.language_model
        with torch.inference_mode():
            hidden = decoder(decoder.embed(ids), position_ids=ids - 3)
            found.append(decoder.logits(hidden))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-4
    pixels = torch.randn(1, 3, *(2 * [loaded.config.vision.image_size]))
    features = []
    for one in (loaded.model, after):
        image = one.modalities["image"]
        with torch.inference_mode():
            features.append(image.embed([PreparedImage(pixels, ImageSize(28, 28))])[0])
    rotation = Flat(features[0].shape[1], 0)
    torch.testing.assert_close(features[1], rotation(features[0]), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_model_that_has_answered_answers_the_same(repository):
    """What the engine prepared of the old weights is made anew."""
    chat = lapilli.load("pebble", device="cpu", dtype="float32")
    question = ("What is in this picture?", str(repository / "examples" / "picture.png"))
    before = chat.ask(*question)
    chat.model.language_model.untie()
    rotation = Rotation(chat.model)
    rotation.ends(chat.model)
    for layer in chat.model.language_model.model.layers:
        rotation.layer(layer)
    seen = []
    hook = chat.model.language_model.lm_head.register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    assert chat.ask(*question) == before
    hook.remove()
    assert seen


def test_views_of_files_are_read_only():
    """Parameters that are mapped from a file are replaced, and the dtype is the file's."""
    loaded = load_checkpoint("pebble", device="cpu", dtype="stored")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    held = dict(loaded.model.state_dict())
    loaded.model.language_model.untie()
    rotation = Rotation(loaded.model)
    rotation.ends(loaded.model)
    rotation.layer(loaded.model.language_model.model.layers[0])
    for name, tensor in held.items():
        assert torch.equal(tensor, before[name]), name
    after = loaded.model.state_dict()
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    layer = "language_model.model.layers.0."
    assert {f"{layer}self_attn.{n}_proj.weight" for n in "qkvo"} <= changed
    assert {f"{layer}mlp.{n}_proj.weight" for n in ("gate", "up", "down")} <= changed
    assert not any(name.startswith("modalities.image.vision_tower") for name in changed)


def test_untying_gives_a_head_of_its_own():
    model = build({"tie_embeddings": True})
    table = model.language_model.model.embed_tokens.weight
    config = model.language_model.untie()
    assert config == model.language_model.config
    assert not config.tie_embeddings
    head = model.language_model.lm_head
    assert torch.equal(head.weight, table)
    assert head.weight.data_ptr() != table.data_ptr()
    assert not head.training
    assert model.language_model.untie() == config
    assert model.language_model.lm_head is head


def kurtosis(x):
    x = x - x.mean()
    return float((x**4).mean() / (x**2).mean() ** 2)


def with_outliers(**options):
    """A model with three channels of the residual stream that are forty times as large."""
    model = build(
        {"hidden_size": 192, "num_heads": 8, "num_kv_heads": 8, "head_dim": 24, **options}
    )
    channels = [5, 70, 131]
    decoder = model.language_model
    with torch.no_grad():
        decoder.model.embed_tokens.weight[:, channels] *= 40
        for layer in decoder.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[channels] *= 10
            layer.self_attn.v_proj.weight[::24] *= 20
    return model


def inputs_of(model):
    """What the layers that are quantized read, by name."""
    found, handles = {}, []
    for name, module in model.language_model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "up_proj", "o_proj")):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, given, name=name: found.__setitem__(name, given[0].detach())
                )
            )
    logits_of(model)
    for handle in handles:
        handle.remove()
    return found


def test_outliers_are_spread():
    model = with_outliers()
    before, after = inputs_of(model), inputs_of(rotate(model))
    assert before.keys() == after.keys()
    for name, x in before.items():
        flat = after[name]
        assert kurtosis(x) > 8
        assert kurtosis(flat) < 3.5, name
        largest = [float((y.abs().amax(-1) / y.pow(2).mean(-1).sqrt()).mean()) for y in (x, flat)]
        assert largest[1] < 0.6 * largest[0]


def test_rounding_costs_less():
    """Weights and activations in 8 bits, the logits against those in float."""
    model = with_outliers()
    exact = logits_of(model)
    errors = []
    for one in (copy.deepcopy(model), rotate(model)):
        quantize(one, QuantConfig(bits=8, head_bits=None))
        errors.append(float((logits_of(one) - exact).norm() / exact.norm()))
    assert errors[1] < 0.85 * errors[0]


def test_another_seed_is_another_rotation():
    model = build()
    weights = [
        rotate(model, seed).language_model.model.layers[0].mlp.up_proj.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_cannot_be_rotated():
    def refused(message, model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ConfigError, match=message):
            check_rotation(model)
        with pytest.raises(ConfigError, match=message):
            Rotation(model)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    mpt = Mpt(MptConfig(vocab_size=50, hidden_size=32, num_layers=1, num_heads=2, max_positions=32))
    refused("mpt models cannot be rotated", VisionLanguageModel(mpt))
    refused("norms behind attention and MLP", build({"post_norms": True, "family": "gemma2"}))
    refused(r"a layer of their own first \(Decoder\.untie\)", build({"tie_embeddings": True}))
    refused(
        "modality 'image' cannot be rotated",
        build({"hidden_size": 32, "head_dim": 8}, {"kind": "identity"}),
    )
    foreign = build()
    foreign.modalities["sound"] = nn.Linear(4, 48)
    refused("modality 'sound' cannot be rotated: .*output_layers", foreign)
    packed = build()
    quantize(packed, QuantConfig(bits=8))
    refused("quantized already", packed)
    adapted = build()
    inject(adapted, LoraConfig(rank=2, alpha=4, targets=("language_model.*.q_proj",)))
    refused("unmerged adapter", adapted)

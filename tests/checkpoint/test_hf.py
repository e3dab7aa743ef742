"""Checkpoints that transformers saves, in every key style, give transformers' logits here."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.write.llava import save_llava
from lapilli.geometry import ImageSize
from lapilli.modality.image.pixels import PreparedImage
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.quant import QuantConfig

VOCABULARY = 120
IMAGE_ID = 100
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXTS = {
    "llama": LlamaConfig(**TEXT),
    "mistral": MistralConfig(**TEXT, sliding_window=None),
    "qwen2": Qwen2Config(**TEXT),
    "tied": LlamaConfig(**TEXT, tie_word_embeddings=True),
}
TOWERS = {"clip": CLIPVisionConfig(**TOWER), "siglip": SiglipVisionConfig(**TOWER)}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def add_tokenizer(path):
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))


def make(path, text, tower, *, is_next=False, strategy="default"):
    """A random model, saved by transformers."""
    torch.manual_seed(0)
    common = {
        "text_config": TEXTS[text],
        "vision_config": TOWERS[tower],
        "image_token_index": IMAGE_ID,
        "vision_feature_select_strategy": strategy,
    }
    if is_next:
        config = LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS)
        model = LlavaNextForConditionalGeneration(config)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**common))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" not in name:
                parameter.normal_(std=0.3)
    model.eval().save_pretrained(path)
    add_tokenizer(path)
    return model


def logits_of(loaded, pixel_values, size, length):
    """Three tokens, the picture, two tokens."""
    ids = [5, 6, 7, *([0] * length), 8, 9]
    prompt = EncodedPrompt(ids, [False] * len(ids), (Span(0, 3, length),))
    batch = loaded.model.embed_prompts([prompt], [[PreparedImage(pixel_values, size)]])
    with torch.no_grad():
        return loaded.model.logits(loaded.model.forward(batch))


def theirs(model, length, **inputs):
    ids = torch.tensor([[5, 6, 7, *([IMAGE_ID] * length), 8, 9]])
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "tower", "strategy"),
    [
        ("llama", "clip", "default"),
        ("mistral", "siglip", "full"),
        ("llama", "siglip", "default"),
        ("qwen2", "clip", "full"),
        ("tied", "clip", "default"),
    ],
)
def test_llava_logits(tmp_path, text, tower, strategy):
    model = make(tmp_path, text, tower, strategy=strategy)
    loaded = load_checkpoint(tmp_path, device="cpu", dtype="float32", strict_config=True)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    length = loaded.config.vision.num_patches
    ours = logits_of(loaded, pixels, ImageSize(28, 28), length)
    torch.testing.assert_close(
        ours, theirs(model, length, pixel_values=pixels), atol=1e-4, rtol=1e-4
    )
    assert loaded.config.tokens.image_id == IMAGE_ID


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_tied_logits_are_packed_as_a_layer_of_their_own(tmp_path, scheme):
    make(tmp_path / "from", "tied", "clip")
    plain = load_checkpoint(tmp_path / "from", device="cpu", dtype="float32")
    table = plain.model.language_model.model.embed_tokens.weight
    packed = load_checkpoint(tmp_path / "from", device="cpu", quantization=scheme)
    decoder = packed.model.language_model
    assert torch.equal(decoder.model.embed_tokens.weight, table)
    assert (decoder.lm_head.bits, decoder.config.tie_embeddings) == (8, False)
    near = decoder.lm_head.kernel().packed.dequantize()
    step = table.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((near - table).abs() <= 0.51 * step).all())
    assert any("a layer of its own" in note for note in packed.report.notes)
    target = tmp_path / "llava-packed"
    quantization = packed.quantization
    save_llava(
        target,
        packed.model,
        packed.config,
        tokenizer_path=packed.tokenizer_path,
        quantization=quantization,
    )
    again = load_checkpoint(target, device="cpu")
    hidden = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = again.model.language_model.logits(hidden)
        assert torch.equal(found, decoder.logits(hidden))
    float_head = QuantConfig(head_bits=None)
    kept = load_checkpoint(tmp_path / "from", device="cpu", quantization=float_head)
    assert kept.model.language_model.config.tie_embeddings


@pytest.mark.slow
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_llava_next_logits(tmp_path, text):
    model = make(tmp_path, text, "clip", is_next=True)
    loaded = load_checkpoint(tmp_path, device="cpu", dtype="float32", strict_config=True)
    size = ImageSize(40, 50)
    tiles = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    prepared = PreparedImage(tiles, size)
    length = loaded.model.modality("image").num_tokens(prepared)
    ours = logits_of(loaded, tiles, size, length)
    expected = theirs(model, length, pixel_values=tiles[None], image_sizes=torch.tensor([[40, 50]]))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def classic(name):
    """Style (ii): what llava-hf published, and what a re-saved hub model keeps."""
    if "vision_tower.vision_model." in name:  # transformers until 5.19 saves it so
        return name
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def nested(name):
    """Style (iii): transformers from 4.52."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return "model." + classic(name)


@pytest.mark.slow
@pytest.mark.parametrize("style", [classic, nested], ids=["classic", "nested"])
def test_key_styles_give_the_same_model(tmp_path, style):
    make(tmp_path, "llama", "clip", is_next=True)
    fresh = load_checkpoint(tmp_path, device="cpu", dtype="float32").model.state_dict()
    fresh = {name: tensor.clone() for name, tensor in fresh.items()}  # no view of the file
    file = tmp_path / "model.safetensors"
    renamed = {style(name): tensor.clone() for name, tensor in load_file(file).items()}
    renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(renamed, file)
    loaded = load_checkpoint(tmp_path, device="cpu", dtype="float32")
    again = loaded.model.state_dict()
    assert fresh.keys() == again.keys()
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)
    assert loaded.report.dropped == ("vision_tower.vision_model.embeddings.position_ids",)


def test_siglip_head_is_dropped(tmp_path):
    make(tmp_path, "llama", "siglip", strategy="full")
    report = load_checkpoint(tmp_path, device="cpu", dtype="float32").report
    # an older transformers saves it under vision_tower.vision_model
    assert any(name.endswith(".head.probe") for name in report.dropped)
    assert report.unexpected == ()


def test_preprocessing_of_processor_config(tmp_path):
    make(tmp_path, "llama", "clip")
    image = {
        "image_processor_type": "LlavaImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.5, 0.5, 0.5],
        "do_pad": True,
    }
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": image}))
    config = load_checkpoint(tmp_path, device="cpu", dtype="float32").config
    assert config.image.aspect == "pad"
    assert config.image.pixels.mean == (0.5, 0.5, 0.5)


def test_plain_language_model(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(TEXTS["llama"]).eval()
    model.save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    loaded = load_checkpoint(tmp_path, device="cpu", dtype="float32", strict_config=True)
    ids = [5, 6, 7, 8]
    batch = loaded.model.embed_prompts([EncodedPrompt(ids, [False] * 4)])
    with torch.no_grad():
        ours = loaded.model.logits(loaded.model.forward(batch))
        expected = model(input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert loaded.config.vision is None


def test_language_model_of_another_family_goes_through_transformers(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GPTNeoXConfig(**sizes, intermediate_size=64, vocab_size=VOCABULARY, eos_token_id=3)
    model = GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    loaded = load_checkpoint(tmp_path, device="cpu", dtype="float32")
    ids = [5, 6, 7, 8]
    batch = loaded.model.embed_prompts([EncodedPrompt(ids, [False] * 4)])
    with torch.no_grad():
        ours = loaded.model.logits(loaded.model.forward(batch))
        expected = model(input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert loaded.config.tokens.eos_ids == (3,)
    assert "through the library transformers" in loaded.report.notes[0]


@pytest.mark.slow
def test_packed_rows_without_a_token_stay(tmp_path):
    """llava-hf tables have more rows than their tokenizers; our own layout cuts float ones."""
    source, target = tmp_path / "source", tmp_path / "llava-packed"
    make(source, "llama", "clip")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    tokenizer.save(str(source / "tokenizer.json"))
    made = load_checkpoint(source, device="cpu", quantization="int4")
    save_llava(
        target,
        made.model,
        made.config,
        tokenizer_path=made.tokenizer_path,
        quantization=made.quantization,
        template="vicuna_v1",
    )
    back = load_checkpoint(target, device="cpu")
    assert back.config.text.vocab_size == VOCABULARY
    pixels, size = torch.randn(1, 3, 28, 28), ImageSize(28, 28)
    ours, again = logits_of(made, pixels, size, 4), logits_of(back, pixels, size, 4)
    assert torch.equal(ours, again)
    inside = load_file(target / "model.safetensors")
    assert not [name for name in inside if "vision" in name]  # beside, and only there

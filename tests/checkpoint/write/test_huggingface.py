"""What is saved in the layout of Hugging Face answers in transformers as it did here."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import lapilli
from lapilli import Message
from lapilli.checkpoint.export import export_checkpoint
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.tokenizer import load_tokenizer, save_tokenizer_with
from lapilli.checkpoint.write.huggingface import save_hf
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.lora import LoraConfig, inject, merge
from lapilli.quant import QuantConfig, quantize
from lapilli.train.build import replace_projector
from tests.integration.oracle import picture
from tests.modality.declared import tiny_language_model

VARIANTS = ["llava-v1.5-tiny-pad", "llava-v1.6-vicuna-tiny-336", "llava-v1.6-mistral-tiny"]
PICTURES = [picture(60, 40, 1), picture(28, 90, 2)]


def saved(path, loaded, **options):
    save_hf(
        path,
        loaded.model,
        loaded.config,
        tokenizer=loaded.tokenizer,
        tokenizer_path=loaded.tokenizer_path,
        template=loaded.template.template.name,
        **options,
    )
    return path


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, golden, tmp_path_factory):
    """The checkpoint in its own layout and, saved again, in the other."""
    _, built, _ = golden(request.param)
    loaded = load_checkpoint(built["model_path"], device="cpu", dtype="float32")
    path = saved(tmp_path_factory.mktemp("hf") / "saved", loaded)
    chat = lapilli.load(built["model_path"], device="cpu", dtype="float32")
    return chat, path


def logits_of(chat, messages):
    ready = chat.encode(messages)
    with torch.inference_mode():
        batch = chat.model.embed_prompts([ready.encoded], [ready.media])
        return ready, chat.model.logits(chat.model(batch))[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_transformers_computes_the_same(pair, number):
    chat, path = pair
    pictures = PICTURES[:number]
    model = AutoModelForImageTextToText.from_pretrained(path, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    ready, expected = logits_of(chat, [Message.user("Why?", *pictures)])
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": "Why?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=pictures or None, return_tensors="pt")
    ids = list(ready.encoded.input_ids)
    image_id = json.loads((path / "config.json").read_text())["image_token_index"]
    for span in ready.encoded.spans:
        ids[span.start : span.start + span.length] = [image_id] * span.length
    assert inputs["input_ids"][0].tolist() == ids
    with torch.inference_mode():
        found = model(**inputs).logits[0]
    rows = expected.shape[-1]
    assert found.shape[-1] > rows
    torch.testing.assert_close(found[:, :rows], expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_it_is_read_back_here(pair):
    before, path = pair
    after = lapilli.load(str(path), device="cpu", dtype="float32", strict_config=True)
    assert after.template.name == before.template.name
    messages = [Message.user("Why?", *PICTURES)]
    _, expected = logits_of(before, messages)
    _, found = logits_of(after, messages)
    rows = expected.shape[-1]
    torch.testing.assert_close(found[:, :rows], expected, atol=1e-5, rtol=0)


def test_a_plain_language_model_is_saved_as_it_is(tmp_path):
    loaded = load_checkpoint(tiny_language_model(tmp_path / "plain"), device="cpu", dtype="float32")
    with torch.no_grad():
        loaded.model.language_model.model.norm.weight.mul_(2)  # as if it had learned
    path = saved(tmp_path / "saved", loaded)
    again = load_checkpoint(path, device="cpu", dtype="float32")
    expected = loaded.model.state_dict()
    assert expected.keys() == again.model.state_dict().keys()
    assert all(torch.equal(one, expected[name]) for name, one in again.model.state_dict().items())
    assert again.tokenizer.encode("a boat") == loaded.tokenizer.encode("a boat")


def test_ordinary_added_tokens_stay_ordinary(conformance, tmp_path):
    """What added_tokens.json lists is cut out of typed text before and after, special or not."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    model = conformance / "assets" / "open" / "tokenizer.model"
    (source / "tokenizer.model").write_bytes(model.read_bytes())
    added = {"<loc1>": 1000, "   ": 1001, "<im_start>": 1002}
    (source / "added_tokens.json").write_text(json.dumps(added))
    before = load_tokenizer(source, fast=False)
    before.add_tokens(["<im_start>"], special=True)
    save_tokenizer_with(out, source, before, "<image>", processor="LlavaProcessor")
    after = load_tokenizer(out, fast=True)
    text = "at <loc1>,   or <im_start> there</s>"
    for literal in ([], [(0, len(text))]):
        expected = before.encode(text, literal=literal)
        assert after.encode(text, literal=literal) == expected
        assert {1000, 1001} <= set(expected)
        assert (1002 in expected) == (2 in expected) == (not literal)


def test_new_rows_are_the_mean_of_the_others(pair):
    before, path = pair
    after = load_checkpoint(path, device="cpu", dtype="float32")
    old, new = (
        model.state_dict()["language_model.model.embed_tokens.weight"]
        for model in (before.model, after.model)
    )
    assert len(new) == len(old) + 1
    torch.testing.assert_close(new[-1], old.mean(dim=0))


def test_an_adapter_is_folded_in_and_stays(golden, tmp_path):
    _, built, _ = golden(VARIANTS[0])
    loaded = load_checkpoint(built["model_path"], device="cpu", dtype="float32")
    inject(loaded.model, LoraConfig(rank=2, alpha=6, targets=("language_model.*.q_proj",)))
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    path = saved(tmp_path / "saved", loaded)
    assert any("lora_B" in name for name, _ in loaded.model.named_parameters())
    merge(loaded.model)
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    after = load_checkpoint(path, device="cpu", dtype="float32").model.state_dict()
    torch.testing.assert_close(after[name], loaded.model.state_dict()[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("llava-mpt-tiny", "no mpt language model"),
        ("llava-tiny-identity", "projector 'identity', only 'mlp2x_gelu': keep the original's"),
        ("llava-v1.6-tiny-anyres-flat", "'anyres' with mm_patch_merge_type 'flat'"),
        ("llava-tiny-im-start-end", "no <im_start>"),
    ],
)
def test_models_that_the_layout_cannot_hold_are_refused(golden, tmp_path, variant, message):
    _, built, _ = golden(variant)
    loaded = load_checkpoint(built["model_path"], device="cpu", dtype="float32")
    with pytest.raises(UnsupportedModelError, match=message):
        saved(tmp_path / "saved", loaded)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pool2x2_mlp2x_gelu", "mlp2x_gelu_pool2x2", "resampler4"])
def test_projectors_that_join_features_are_refused(tmp_path, name):
    replace_projector("pebble", tmp_path / "llava", projector=name)
    with pytest.raises(
        UnsupportedModelError, match=rf"projector '{name}', .*save\.layout = \"llava"
    ):
        export_checkpoint(str(tmp_path / "llava"), tmp_path / "out", layout="huggingface")
    loaded = load_checkpoint(tmp_path / "llava", device="cpu")
    with pytest.raises(UnsupportedModelError, match=f"projector '{name}'"):
        saved(tmp_path / "out", loaded)
    assert not (tmp_path / "out").exists()


def test_packed_weights_are_refused(golden, tmp_path):
    _, built, _ = golden(VARIANTS[0])
    loaded = load_checkpoint(built["model_path"], device="cpu", dtype="float32")
    quantize(loaded.model, QuantConfig(bits=8, group_size=32))
    with pytest.raises(ConfigError, match="the model is quantized"):
        saved(tmp_path / "saved", loaded)

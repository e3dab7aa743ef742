import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lapilli.checkpoint.load import load_checkpoint
from lapilli.compat.builder import load_pretrained_model
from lapilli.compat.mm_utils import process_images
from lapilli.errors import MissingFileError, UnsupportedModelError
from tests.compat.conftest import MakeCheckpoint
from tests.integration.oracle import make_oracle, picture


def test_the_tuple_of_the_original(loaded: tuple[Any, Any, Any, int]) -> None:
    tokenizer, model, processor, context_len = loaded
    assert (len(tokenizer), processor.crop_size["height"], context_len) == (1000, 56, 2048)
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.mm_projector_type == "mlp2x_gelu"


@pytest.mark.parametrize("bits", ["load_8bit", "load_4bit"])
def test_quantized_loading_is_refused(bits: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{bits} is not there yet"):
        load_pretrained_model("anywhere", None, "llava", **{bits: True})


@pytest.mark.parametrize("name", ["quantization_config", "overwrite_config"])
def test_options_that_would_change_the_answer_are_refused(
    make_checkpoint: MakeCheckpoint, name: str
) -> None:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    with pytest.raises(UnsupportedModelError, match=name):
        load_pretrained_model(path, None, "llava", **{name: {"load_in_4bit": True}})
    # As later versions of the original are called, and with nothing to change.
    options = {"multimodal": True, "attn_implementation": "sdpa", name: None}
    assert load_pretrained_model(path, None, "llava", **options)[1].device.type


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "tokenizer_kind"),
    [
        (None, "LlavaMistralForCausalLM", "LlamaTokenizerFast"),
        ("my-model", "LlavaMistralForCausalLM", "LlamaTokenizerFast"),
        ("llava-v1.6-mistral-7b", "LlavaMistralForCausalLM", "LlamaTokenizerFast"),
        ("llava-my-tune", "LlavaLlamaForCausalLM", "LlamaTokenizer"),
    ],
)
def test_a_name_with_llava_decides_as_in_the_original(
    make_checkpoint: MakeCheckpoint, name: str | None, kind: str, tokenizer_kind: str
) -> None:
    path = make_checkpoint("llava-v1.6-mistral-tiny")["model_path"]
    tokenizer, model, _, _ = load_pretrained_model(path, None, name, device="cpu")
    assert (type(model).__name__, type(tokenizer).__name__) == (kind, tokenizer_kind)


@pytest.mark.slow
def test_a_sliding_window_is_forgotten(conformance: Any, tmp_path: Any) -> None:
    from tests.conformance.checkpoints import load_maker

    path = conformance / "cases/open/llava-v1.6-mistral-tiny/spec.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["lm"]["sliding_window"] = 8
    made = load_maker(conformance).build(spec, str(tmp_path), None, str(conformance / "assets"))
    _, model, _, _ = load_pretrained_model(made["model_path"], None, None, device="cpu")
    assert model.config.sliding_window == 8
    assert model.model.config.sliding_window is None
    assert load_checkpoint(made["model_path"]).config.text.sliding_window == 8


def test_the_dtype_may_be_asked_for(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    _, model, _, _ = load_pretrained_model(
        path, None, "llava", device_map={"": "cpu"}, torch_dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    assert model.get_vision_tower().dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "place",
    [
        {"device_map": "cuda:0"},
        {"device_map": {"": 0}},
        {"device_map": {"": "cuda:1"}},
        {"device_map": None},
        {"device": "cuda:0"},
        {"device": torch.device("cuda", 1)},
    ],
    ids=str,
)
def test_every_name_of_a_gpu_that_is_not_there_is_the_cpu(
    make_checkpoint: MakeCheckpoint, place: dict[str, Any]
) -> None:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    assert load_pretrained_model(path, None, "llava", **place)[1].device.type == "cpu"


def test_a_class_of_transformers_reads_float32_unless_it_is_told(
    make_checkpoint: MakeCheckpoint,
) -> None:
    from llava.model import LlavaLlamaForCausalLM

    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    assert json.loads((Path(path) / "config.json").read_text("utf-8"))["torch_dtype"] == "float16"
    model = AutoModelForCausalLM.from_pretrained(path)
    model.get_vision_tower().load_model()
    assert (model.dtype, model.get_vision_tower().dtype) == (torch.float32, torch.float32)
    assert LlavaLlamaForCausalLM.from_pretrained(path, torch_dtype=None).dtype == torch.float32
    half = LlavaLlamaForCausalLM.from_pretrained(path, torch_dtype=torch.bfloat16, device_map=0)
    assert half.dtype == torch.bfloat16


def test_the_config_of_mpt_is_read_as_it_is_published(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint("llava-mpt-tiny")["model_path"]
    model = AutoModelForCausalLM.from_pretrained(path)
    assert type(model).__name__ == "LlavaMptForCausalLM"
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 3)


def test_a_missing_directory_is_named(tmp_path: Any) -> None:
    with pytest.raises(MissingFileError, match=r"config\.json is missing"):
        load_pretrained_model(str(tmp_path), None, "llava", device="cpu")


def test_a_plain_language_model_is_transformers_own(make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint("llava-v1.5-tiny-lora")["model_base"]
    tokenizer, model, processor, _ = load_pretrained_model(base, None, "vicuna", device="cpu")
    assert processor is None
    assert type(model) is LlamaForCausalLM
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape == (1, ids.shape[1] + 3)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, 64),
        ({"_from_model_config": True, "eos_token_id": 2}, 64),
        ({"eos_token_id": 2, "temperature": 0.9, "do_sample": True}, 20),
    ],
)
def test_what_generation_starts_from(
    make_checkpoint: MakeCheckpoint, tmp_path: Any, file: dict[str, Any] | None, expected: int
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(make_checkpoint("llava-v1.5-tiny-pad")["model_path"], folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_length": 64}), "utf-8")
    (folder / "generation_config.json").unlink()
    if file is not None:
        (folder / "generation_config.json").write_text(json.dumps(file), "utf-8")
    model = load_pretrained_model(str(folder), None, "llava", device="cpu")[1]
    assert model.generation_config.max_length == expected
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("text", "tower", "next_"), [("llama", "clip", True), ("mistral", "siglip", False)]
)
def test_a_checkpoint_of_hugging_face_sees_what_lapilli_sees(
    tmp_path: Path, text: str, tower: str, next_: bool
) -> None:
    make_oracle(tmp_path / "hf", next_=next_, text=text, tower=tower)
    image = load_checkpoint(tmp_path / "hf", device="cpu", dtype=torch.float32).model.modality(
        "image"
    )
    _, model, processor, _ = load_pretrained_model(str(tmp_path / "hf"), None, None, device="cpu")
    for size in ((60, 40), (31, 90), (200, 47)):
        shown = picture(*size, 1)
        pixels = process_images([shown], processor, model.config)
        found = model.prepare_inputs_labels_for_multimodal(
            torch.tensor([[-200, 5]]), None, None, None, None, pixels, [size]
        )[4]
        expected = image.embed([image.prepare(shown)])[0]
        torch.testing.assert_close(found[0, :-1], expected, atol=1e-5, rtol=0)

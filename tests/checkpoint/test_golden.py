"""Every golden checkpoint through our loader: hashes, sizes, the sum of every parameter."""

import pytest
import torch

from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.read.plan import make_plan

VARIANTS = [
    "llava-llama-2-tiny-chat",
    "llava-mpt-tiny",
    "llava-tiny-identity",
    "llava-tiny-im-start-end",
    "llava-tiny-linear-square",
    "llava-tiny-vocab-resize",
    "llava-v1.5-tiny-last-cls",
    "llava-v1.5-tiny-leftpad",
    "llava-v1.5-tiny-lora",
    "llava-v1.5-tiny-pad",
    "llava-v1.5-tiny-projector",
    "llava-v1.5-tiny-truncate",
    "llava-v1.6-mistral-tiny",
    "llava-v1.6-tiny-anyres-flat",
    "llava-v1.6-tiny-anyres-spatial",
    "llava-v1.6-vicuna-tiny-336",
]
RTOL = 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_load(golden, variant):
    _, built, case = golden(variant)
    expect = case["expect"]
    assert built["hashes"] == expect["hashes"]
    loaded = load_checkpoint(
        built["model_path"],
        base=built["model_base"],
        device="cpu",
        dtype="float32",
        strict_config=True,
    )
    keymap = make_plan(built["model_path"], base=built["model_base"]).keymap
    state = {keymap.to_foreign(name): t for name, t in loaded.model.state_dict().items()}
    assert state.keys() == expect["params"].keys()
    for name, numbers in expect["params"].items():
        tensor = state[name].double()
        size = numbers["abs_sum"]
        assert list(tensor.shape) == numbers["shape"], name
        assert float(tensor.sum()) == pytest.approx(numbers["sum"], abs=RTOL * max(size, 1)), name
        assert float(tensor.abs().sum()) == pytest.approx(size, rel=RTOL), name
    assert loaded.tokenizer.vocab_size == expect["len_tokenizer"]
    assert loaded.config.context_length == expect["context_len"]
    assert loaded.config.text.vocab_size == expect["embed_shape"][0]
    crop = expect["crop_size"]
    assert loaded.config.image.pixels.crop_size == (crop["height"], crop["width"])
    assert loaded.config.image.pixels.shortest_edge == expect["size"]["shortest_edge"]
    assert list(loaded.config.image.pixels.mean) == expect["image_mean"]
    assert loaded.config.vision.hidden_size == expect["vision_hidden"]
    grid = loaded.config.vision.grid
    assert grid.rows * grid.columns == expect["num_patches"]
    assert loaded.report.missing == loaded.report.unexpected == ()
    assert not any(parameter.is_meta for parameter in loaded.model.parameters())
    assert not loaded.model.training


def test_same_dtype_is_a_view_of_the_file(golden):
    _, built, _ = golden("llava-v1.6-vicuna-tiny-336")
    model = load_checkpoint(built["model_path"], device="cpu", dtype="bfloat16").model
    weights = model.language_model.model
    storages = {weights.layers[i].mlp.up_proj.weight.untyped_storage().data_ptr() for i in (0, 1)}
    assert len(storages) == 1
    assert weights.norm.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_lora_kept_beside_the_weights_gives_the_same_output(golden):
    _, built, _ = golden("llava-v1.5-tiny-lora")
    place = {"base": built["model_base"], "device": "cpu", "dtype": "float32"}
    merged = load_checkpoint(built["model_path"], **place).model.language_model
    kept = load_checkpoint(built["model_path"], **place, merge_lora=False).model.language_model
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)[None]
    one = merged.forward(x, position_ids=positions)
    two = kept.forward(x, position_ids=positions)
    assert hasattr(kept.model.layers[0].self_attn.q_proj, "lora_A")
    assert not hasattr(merged.model.layers[0].self_attn.q_proj, "lora_A")
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["llava-v1.5-tiny-lora", "llava-v1.5-tiny-projector"])
def test_base_is_taken_from_what_the_checkpoint_names(golden, variant):
    _, built, _ = golden(variant)
    if variant.endswith("lora"):
        plan = make_plan(built["model_path"])
        assert str(plan.base_path) == built["model_base"]
    else:
        with pytest.raises(FileNotFoundError, match="does not name the language model"):
            make_plan(built["model_path"])

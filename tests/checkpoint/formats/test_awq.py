"""Published AWQ and GPTQ weights: the same integers, packed anew; what does not fit is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import lapilli
from lapilli.checkpoint.formats.awq import PublishedLinear, in_tiles, published_format
from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.write.llava import save_llava
from lapilli.errors import (
    CheckpointError,
    ConfigError,
    MissingWeightsError,
    ShapeMismatchError,
)
from lapilli.geometry import ImageSize
from lapilli.modality.image.pixels import PreparedImage
from lapilli.nn.linear import KeptLinear
from lapilli.quant import QuantConfig
from lapilli.quant.linear import QuantLinear, StoredEmbedding
from tests.checkpoint.published import (
    awq,
    awq_tensors,
    convert,
    drawn,
    gptq,
    gptq_tensors,
    llm_awq_tensors,
    make_llava,
    multiplied_out,
    of_text_layers,
)
from tests.checkpoint.test_hf import classic, logits_of, nested

IDS = torch.arange(3, 15)[None]
LAYER = "language_model.model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def pebble(tmp_path_factory):
    """pebble in AWQ and as float: original layout, tower beside, one kind of layer left float."""
    source = Path(lapilli.__file__).parent / "pebble"

    def chosen(name):
        return of_text_layers(name) and "down_proj" not in name and "mm_projector" not in name

    section = awq(32, modules_to_not_convert=["down_proj", "mm_projector"])
    return convert(source, tmp_path_factory.mktemp("pebble"), section, chosen=chosen)


def load(path, **options):
    return load_checkpoint(path, device="cpu", dtype="float32", **options)


def text_logits(model):
    language_model = model.language_model
    with torch.inference_mode():
        hidden = language_model(language_model.embed(IDS), position_ids=IDS)
        return language_model.logits(hidden)


def weight_only(model):
    """The same model without rounding of activations."""
    for path, layer in packed_layers(model).items():
        model.set_submodule(path, QuantLinear(layer.packed, weight_only=True))
    return model


def packed_layers(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}


def check(packed_path, float_path, picture_logits):
    """Weights bit for bit; logits without and with rounding of activations."""
    ours, expected = load(packed_path), load(float_path)
    layers = packed_layers(ours.model)
    assert layers
    for path, layer in layers.items():
        assert torch.equal(layer.packed.dequantize(), expected.model.get_submodule(path).weight)
    exact = picture_logits(expected)
    rounded = picture_logits(ours)
    assert float((rounded - exact).norm() / exact.norm()) < 0.02
    weight_only(ours.model)
    torch.testing.assert_close(picture_logits(ours), exact, atol=1e-4, rtol=1e-4)
    return ours


def with_picture(loaded):
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return logits_of(loaded, pixels, ImageSize(28, 28), loaded.config.vision.num_patches)


@pytest.mark.slow
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
def test_awq_of_every_group_size(llava, tmp_path, group):
    def chosen(name):  # AWQ needs whole groups
        return of_text_layers(name) and (group != 256 or "down_proj" in name)

    paths = convert(llava, tmp_path, awq(group), chosen=chosen)
    loaded = check(*paths, with_picture)
    layers = packed_layers(loaded.model)
    assert len(layers) == (2 if group == 256 else 14)
    assert {layer.group_size for layer in layers.values()} == {
        min(group, 128) if group > 0 else 128
    }
    assert isinstance(loaded.model.language_model.lm_head, nn.Linear)
    assert loaded.report.missing == loaded.report.unexpected == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{"backend": "llm-awq", "version": "gemv"}, {"version": "gemv_fast"}]
)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq_in_the_layout_of_llm_awq(llava, tmp_path, group, more):
    paths = convert(llava, tmp_path, awq(group, **more), chosen=of_text_layers)
    loaded = check(*paths, with_picture)
    assert len(packed_layers(loaded.model)) == 14
    assert loaded.report.missing == loaded.report.unexpected == ()


def test_nibbles_in_the_order_of_llm_awq():
    """Numbers that llm-awq itself packed."""
    rows, inputs = torch.meshgrid(torch.arange(8), torch.arange(128), indexing="ij")
    values = (7 * rows + 5 * inputs + inputs // 8 + inputs // 64) % 16
    zeros, scales = np.zeros((1, 8), dtype=int), np.ones((1, 8), dtype=np.float16)
    stored = llm_awq_tensors(values.numpy().T, zeros, scales, 128)["qweight"]
    words = stored.numpy().view(np.uint16)
    known = {(0, 0): 0xB290, (0, 1): 0x07E5, (0, 8): 0xF6D4, (0, 16): 0x2907, (0, 63): 0x7E5C}
    known |= {(0, 64): 0x4B29, (1, 0): 0x7E5C, (1, 127): 0xC3A1}
    assert {at: int(words[at]) for at in known} == known
    assert words.sum(dtype=np.int64) == 8379776
    assert torch.equal(in_tiles(stored), values.to(torch.uint8))


@pytest.mark.parametrize(("made", "said"), [(128, 256), (256, 128)])
def test_groups_of_another_size_than_config_json_says(made, said):
    form = published_format(awq(said, backend="llm-awq"))
    nibbles, zeros, scales = drawn(1024, 16, made, 0)
    stored = llm_awq_tensors(nibbles, zeros, scales, made)
    layer = PublishedLinear(
        LAYER, nn.Linear(1024, 16, bias=False, device="meta"), form, zeros="scaled_zeros"
    )
    last = stored.popitem()
    for name, tensor in stored.items():
        layer.add(name, tensor)
    expected = f"{1024 // made} groups, expected {1024 // said} of {said} inputs"
    with pytest.raises(CheckpointError, match=expected):
        layer.add(*last)


def test_inputs_that_are_no_whole_groups():
    form = published_format(awq(128, backend="llm-awq"))
    with pytest.raises(ShapeMismatchError, match="192 inputs, but llm-awq packs them in tiles"):
        PublishedLinear(LAYER, nn.Linear(192, 16, device="meta"), form)


def test_scaled_zeros_that_are_no_whole_numbers():
    form = published_format(awq(backend="llm-awq"))
    nibbles, zeros, scales = drawn(128, 16, 128, 0)
    stored = llm_awq_tensors(nibbles, zeros + 0.4, scales, 128)
    linear = nn.Linear(128, 16, bias=False, device="meta")
    layer = PublishedLinear(LAYER, linear, form, zeros="scaled_zeros")
    last = stored.popitem()
    for name, tensor in stored.items():
        layer.add(name, tensor)
    with pytest.raises(CheckpointError, match="no whole numbers from 0 to 15"):
        layer.add(*last)


@pytest.mark.slow
@pytest.mark.parametrize("style", [classic, nested], ids=["classic", "nested"])
def test_awq_of_llava_next_in_every_key_style(tmp_path, style):
    (tmp_path / "source").mkdir()
    make_llava(tmp_path / "source", is_next=True)
    section = awq(modules_to_not_convert=None)
    paths = convert(
        tmp_path / "source", tmp_path / "out", section, chosen=of_text_layers, rename=style
    )

    def tiled(loaded):
        tiles = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(1))
        size = ImageSize(40, 50)
        image = loaded.model.modality("image")
        length = image.num_tokens(PreparedImage(tiles, size))
        return logits_of(loaded, tiles, size, length)

    check(*paths, tiled)


@pytest.mark.slow
def test_awq_in_the_original_layout(pebble):
    loaded = check(*pebble, lambda loaded: text_logits(loaded.model))
    assert len(packed_layers(loaded.model)) == 30
    assert isinstance(loaded.model.get_submodule(LAYER.replace("up_proj", "down_proj")), nn.Linear)
    picture = str(Path(lapilli.__file__).parents[2] / "examples" / "picture.png")
    answers = [
        lapilli.load(source, device="cpu").ask("What is in this picture?", picture)
        for source in ("pebble", str(pebble[0]))
    ]
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        gptq(),
        gptq(32, checkpoint_format="gptq_v2"),
        gptq(sym=True),
        gptq(64, sym=True, format="gptq"),
        gptq(-1, desc_act=True),
    ],
    ids=["v1", "v2", "symmetric", "new", "one group"],
)
def test_gptq(llava, tmp_path, section):
    zero_points = not section["sym"]
    paths = convert(llava, tmp_path, section, chosen=of_text_layers, zero_points=zero_points)
    loaded = check(*paths, with_picture)
    assert all((m.zeros is not None) == zero_points for m in packed_layers(loaded.model).values())


@pytest.mark.slow
@settings(max_examples=40)
@example(inputs=8, outputs=1032, group=32, method="awq", seed=0)
@example(inputs=8, outputs=8, group=-1, method="gptq", seed=0)
@given(
    inputs=st.integers(1, 20).map(lambda n: 8 * n),
    outputs=st.integers(1, 150).map(lambda n: 8 * n),
    group=st.sampled_from([32, 64, 128, 256, -1]),
    method=st.sampled_from(["awq", "gptq"]),
    seed=st.integers(0, 99),
)
def test_any_shape_is_bit_equal(inputs, outputs, group, method, seed):
    width = inputs if group < 0 else group
    integers = drawn(inputs, outputs, width, seed)
    section = awq(group) if method == "awq" else gptq(group)
    parts = awq_tensors(*integers) if method == "awq" else gptq_tensors(*integers, width)
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    form = published_format(section)
    layer = PublishedLinear("a.b", linear, form, has_order=method == "gptq")
    for kind in list(parts)[1:]:
        assert layer.add(kind, parts[kind]) is None
    found = layer.add("qweight", parts["qweight"])
    assert torch.equal(found.dequantize(), multiplied_out(*integers, width))


def test_a_biased_layer_keeps_its_bias():
    linear = nn.Linear(32, 16, device="meta")
    layer = PublishedLinear("a.b", linear, published_format(awq(32)))
    assert "bias" in layer.state_dict()
    with pytest.raises(CheckpointError, match=r"a\.b\.bias is not zero"):
        layer.check_bias(torch.ones(16))
    layer.check_bias(torch.zeros(16))


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_of_gptq(llava, tmp_path, value):
    packed, _ = convert(llava, tmp_path, gptq(), chosen=of_text_layers)
    file = packed / "model.safetensors"
    tensors = load_file(file)
    before = load(packed)
    name = next(name for name in tensors if name.endswith("1.mlp.up_proj.qweight"))
    tensors[name.replace("qweight", "bias")] = torch.full((256,), value, dtype=torch.float16)
    save_file(tensors, file)
    if value:
        with pytest.raises(CheckpointError, match=r"up_proj\.bias is not zero"):
            load(packed)
    else:
        assert torch.equal(text_logits(load(packed).model), text_logits(before.model))


def test_one_unpacked_layer_is_held_at_a_time(packed_llava, monkeypatch):
    waiting = []
    add = PublishedLinear.add

    def spy(self, name, tensor):
        assert set(waiting) <= {self.path}
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view of the file
        waiting.append(self.path)
        found = add(self, name, tensor)
        if found is not None:
            waiting.clear()
        return found

    monkeypatch.setattr(PublishedLinear, "add", spy)
    load(packed_llava)
    assert waiting == []


@pytest.mark.slow
def test_a_section_in_a_file_of_its_own(packed_llava, tmp_path):
    path = tmp_path / "old"
    shutil.copytree(packed_llava, path)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingWeightsError, match="have no parameter"):
        load(path)
    section = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (path / "quant_config.json").write_text(json.dumps(section))
    assert torch.equal(text_logits(load(path).model), text_logits(load(packed_llava).model))


@pytest.mark.slow
def test_int4_packs_the_layers_that_awq_leaves_float(pebble, packed_llava):
    plain = load(packed_llava)
    assert plain.quantization == QuantConfig(group_size=64, levels="zeros", head_bits=None)
    assert not isinstance(plain.model.language_model.model.embed_tokens, StoredEmbedding)
    head = plain.model.language_model.lm_head
    assert isinstance(head, KeptLinear)
    assert head.weight.dtype == torch.float16
    more = load(packed_llava, quantization="int4", quantize_tower=True)
    assert more.quantization == QuantConfig(group_size=64, levels="zeros", quantize_tower=True)
    assert more.model.language_model.lm_head.bits == 8
    assert more.model.modalities.image.projector[0].bits == 8
    assert isinstance(more.model.language_model.model.embed_tokens, StoredEmbedding)
    layer, same = (m.model.get_submodule(LAYER).packed.data for m in (plain, more))
    assert torch.equal(layer, same)
    exact = QuantConfig(group_size=64, levels="zeros", mode="weight_only", head_bits=None)
    found = text_logits(load(packed_llava, quantization=exact).model)
    assert torch.equal(found, text_logits(weight_only(plain.model)))
    # What the files leave float is rounded when it is asked for.
    rest = load(pebble[0], quantization="int4").model
    assert rest.get_submodule(LAYER.replace("up_proj", "down_proj")).bits == 4


@pytest.mark.slow
def test_inspection(packed_llava, llava):
    found = inspect_checkpoint(packed_llava)
    assert found.quantization == "AWQ, 4 bits, groups of 64, zero points"
    assert found.missing == found.unexpected == ()
    assert found.parameters == inspect_checkpoint(llava).parameters
    assert "AWQ, 4 bits, groups of 64, zero points" in found.to_text()
    assert inspect_checkpoint(llava).quantization == ""
    assert str(published_format(gptq(-1, sym=True))) == (
        "GPTQ, 4 bits, one group per output, symmetric"
    )


@pytest.mark.slow
def test_saved_in_our_own_format(packed_llava, pebble, tmp_path):
    for options in ({}, {"quantization": "int4"}):
        made = load(packed_llava, **options)
        path = tmp_path / f"llava-{len(options)}"
        with pytest.raises(ConfigError, match="is quantized: save it with the QuantConfig"):
            save_llava(path, made.model, made.config)
        save_llava(
            path,
            made.model,
            made.config,
            tokenizer_path=made.tokenizer_path,
            quantization=made.quantization,
        )
        back = load(path)
        assert back.quantization == made.quantization
        assert torch.equal(text_logits(back.model), text_logits(made.model))
    partly = load(pebble[0])
    with pytest.raises(ConfigError, match="down_proj is float, but the QuantConfig says in 4 bits"):
        save_llava(tmp_path / "x", partly.model, partly.config, quantization=partly.quantization)


@pytest.mark.slow
def test_a_projector_on_an_awq_language_model(pebble, tmp_path):
    packed, _ = pebble
    whole = load(packed)
    path = tmp_path / "projector"
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    shutil.copytree(packed, path)
    (path / "model.safetensors").unlink()
    (path / "config.json").write_text(json.dumps(config))
    every = load_file(packed / "model.safetensors")
    save_file(
        {name: x for name, x in every.items() if "mm_projector" in name},
        path / "mm_projector.safetensors",
    )
    found = load(path, base=str(packed))
    assert torch.equal(text_logits(found.model), text_logits(whole.model))
    assert inspect_checkpoint(path, base=str(packed)).quantization.startswith("AWQ")


@pytest.mark.slow
def test_a_packed_output_layer(llava, tmp_path):
    def chosen(name):
        return of_text_layers(name) or name.endswith("lm_head.weight")

    section = awq(modules_to_not_convert=None)
    packed, plain = convert(llava, tmp_path, section, chosen=chosen)
    loaded = check(packed, plain, with_picture)
    assert loaded.model.language_model.lm_head.bits == 4
    assert loaded.quantization.head_bits == 4
    assert load(packed, quantization="int4").quantization.head_bits == 4

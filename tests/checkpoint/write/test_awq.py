"""AWQ that is written here: the known words, what comes back, and what transformers makes of it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import AwqConfig

import lapilli
from lapilli.checkpoint.formats.awq import in_tiles, interleave, interleaved, tile
from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.checkpoint.load import STORED, load_checkpoint
from lapilli.checkpoint.write.awq import FORMS, save_awq, stored_parts, unfit_layers, verify_written
from lapilli.checkpoint.write.files import Deferred, value
from lapilli.errors import CheckpointError, ConfigError
from lapilli.geometry import ImageSize
from lapilli.kernels.packing import Packed, block_bias, by_block, pack4
from lapilli.modality.image.pixels import PreparedImage
from lapilli.quant import QuantConfig, quantize
from lapilli.quant.linear import QuantLinear
from lapilli.quant.quantize import round_weight
from lapilli.train.build import replace_projector
from tests.checkpoint.published import (
    TEXT,
    awq_tensors,
    drawn,
    llm_awq_tensors,
    make_llava,
    multiplied_out,
)
from tests.checkpoint.test_hf import VOCABULARY, add_tokenizer, logits_of, theirs

IDS = torch.arange(3, 15)[None]
UP = "language_model.model.layers.1.mlp.up_proj"
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings"),
)
BIASED = Qwen2Config(**{key: TEXT.to_dict()[key] for key in SIZES})


@pytest.fixture(scope="module")
def sources(tmp_path_factory, llava):
    """Checkpoints to quantize, by name; `biased` ones have biases in attention."""
    folder = tmp_path_factory.mktemp("sources")
    found = {"llava": llava}
    for name in ("biased", "next", "plain", "plain biased", "tied"):
        found[name] = folder / name
        found[name].mkdir()
    make_llava(found["biased"], text=BIASED)
    make_llava(found["next"], is_next=True)
    torch.manual_seed(0)
    tied = Qwen2Config(**{**BIASED.to_dict(), "tie_word_embeddings": True})
    for name, model in (
        ("plain", LlamaForCausalLM(TEXT)),
        ("plain biased", Qwen2ForCausalLM(BIASED)),
        ("tied", Qwen2ForCausalLM(tied)),
    ):
        model.bfloat16().save_pretrained(found[name])
        add_tokenizer(found[name])
    for name in ("biased", "plain biased", "tied"):
        draw_biases(found[name] / "model.safetensors")
    return found


def draw_biases(file):
    torch.manual_seed(1)
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            tensors[name] = torch.randn_like(tensor)
    save_file(tensors, file, metadata={"format": "pt"})


def packed(source, group, form="gemm", dtype=STORED):
    """A checkpoint with packed layers, those left float that the form cannot hold."""
    loaded = load_checkpoint(source, device="cpu", dtype=dtype)
    config = QuantConfig(levels="zeros", group_size=group, head_bits=None)
    unfit = unfit_layers(loaded.model, form, group)
    for path, layer in list(loaded.model.language_model.named_modules(prefix="language_model")):
        if isinstance(layer, nn.Linear) and path not in unfit and "lm_head" not in path:
            made = QuantLinear(round_weight(layer.weight, layer.bias, 4, config))
            loaded.model.set_submodule(path, made)
    return loaded


def layers(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}


def section(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def text_logits(model):
    language_model = model.language_model
    with torch.inference_mode():
        hidden = language_model(language_model.embed(IDS), position_ids=IDS)
        return language_model.logits(hidden)


def packed_of(integers, group, bias=None):
    nibbles, zeros, scales = (torch.from_numpy(x) for x in integers)
    return Packed(
        pack4(nibbles.t().contiguous().to(torch.uint8)),
        by_block(scales.t()),
        by_block(zeros.t().to(torch.uint8)),
        block_bias(bias),
        nibbles.shape[1],
        nibbles.shape[0],
        group,
        4,
    )


def test_words_of_autoawq():
    assert interleave(torch.arange(8, dtype=torch.uint8)[:, None]).tolist() == [[0x75316420]]


def test_words_of_llm_awq():
    """Numbers that llm-awq itself packed."""
    rows, inputs = torch.meshgrid(torch.arange(8), torch.arange(128), indexing="ij")
    values = (7 * rows + 5 * inputs + inputs // 8 + inputs // 64) % 16
    words = tile(values.to(torch.uint8)).numpy().view(np.uint16)
    known = {(0, 0): 0xB290, (0, 1): 0x07E5, (0, 8): 0xF6D4, (0, 16): 0x2907, (0, 63): 0x7E5C}
    known |= {(0, 64): 0x4B29, (1, 0): 0x7E5C, (1, 127): 0xC3A1}
    assert {at: int(words[at]) for at in known} == known
    assert words.shape == (2, 128)
    assert words.sum(dtype=np.int64) == 8379776


@settings(max_examples=40)
@example(inputs=2, outputs=1, group=64, form="llm-awq", has_bias=True, seed=0)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 40),
    group=st.sampled_from([32, 64, 128]),
    form=st.sampled_from(FORMS),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_is_what_the_descriptions_say(inputs, outputs, group, form, has_bias, seed):
    inputs, outputs = inputs * max(group, 64), 8 * outputs
    integers = drawn(inputs, outputs, group, seed)
    if form == "gemm":
        expected, inverse = awq_tensors(*integers), interleaved
    else:
        expected, inverse = llm_awq_tensors(*integers, group), in_tiles
    bias = torch.randn(outputs) if has_bias else None
    if has_bias:
        expected["bias"] = bias.half()
    found = stored_parts(packed_of(integers, group, bias), form)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        made = value(tensor)
        assert (made.dtype, made.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(made, expected[name]), name
    assert torch.equal(inverse(value(found["qweight"])).long(), torch.from_numpy(integers[0]).t())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llava", "biased", "next", "plain", "plain biased"])
def test_what_is_written_comes_back(sources, tmp_path, name, form, group):
    loaded = packed(sources[name], group, form)
    save_awq(tmp_path / "llava-awq", loaded, form=form, group_size=group)
    verify_written(tmp_path / "llava-awq", loaded)
    back = load_checkpoint(tmp_path / "llava-awq", device="cpu", dtype=STORED)
    assert back.report.missing == back.report.unexpected == ()
    ours, theirs = layers(loaded.model), layers(back.model)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 14
    for path, layer in ours.items():
        assert torch.equal(layer.qweight, theirs[path].qweight)
        assert torch.equal(layer.zeros, theirs[path].zeros)
        assert torch.equal(layer.scales, theirs[path].scales)
        if "biased" in name and path.endswith("q_proj"):
            assert torch.equal(layer.plain_bias.half(), theirs[path].plain_bias.half())
            assert bool(theirs[path].plain_bias.any())
    before, after = loaded.model.state_dict(), back.model.state_dict()
    for kept, tensor in before.items():
        if kept.rpartition(".")[0] not in ours:
            rows = len(tensor) if tensor.ndim else None  # the image token may be a row more
            assert torch.equal(tensor, after[kept][:rows]), kept
            assert tensor.dtype == after[kept].dtype
    hf = "hf_llava_next" if name == "next" else "hf_llava"
    assert back.config.layout == ("text" if "plain" in name else hf if form == "gemm" else "llava")
    found = section(tmp_path / "llava-awq")
    assert (found["quant_method"], found["bits"], found["group_size"]) == ("awq", 4, group)
    version = ("gemm", None) if form == "gemm" else ("gemv", "llm-awq")
    assert (found["version"], found.get("backend")) == version


def test_a_model_that_hugging_face_has_no_layout_for(tmp_path):
    """gemm in the original's layout; pebble's down_proj has no whole groups and stays float."""
    replace_projector("pebble", tmp_path / "llava", projector="pool2x2_mlp2x_gelu")
    loaded = packed(tmp_path / "llava", 32)
    save_awq(tmp_path / "llava-awq", loaded, form="gemm", group_size=32)
    verify_written(tmp_path / "llava-awq", loaded)
    back = load_checkpoint(tmp_path / "llava-awq", device="cpu")
    assert back.config.layout == "llava"
    assert isinstance(back.model.get_submodule(UP.replace("up_proj", "down_proj")), nn.Linear)
    assert section(tmp_path / "llava-awq")["modules_to_not_convert"] == [
        "vision_tower",
        "mm_projector",
        "lm_head",
        "mlp.down_proj",
    ]
    assert inspect_checkpoint(tmp_path / "llava-awq").quantization.startswith("AWQ, 4 bits")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_pebble_answers_as_it_did_in_memory(repository, tmp_path, form):
    loaded = packed("pebble", 32, form)
    save_awq(tmp_path / "llava-awq", loaded, form=form, group_size=32)
    picture = str(repository / "examples" / "picture.png")
    answers = [
        lapilli.load(source, device="cpu").ask("What is in this picture?", picture)
        for source in ("pebble", str(tmp_path / "llava-awq"))
    ]
    assert answers[0] == answers[1]


def test_one_float_layer_of_a_kind_is_named_by_its_number(sources, tmp_path):
    loaded = packed(sources["llava"], 64)
    linear = nn.Linear(128, 256, bias=False).half()
    loaded.model.set_submodule(UP, linear)
    save_awq(tmp_path / "out", loaded, form="gemm", group_size=64)
    assert section(tmp_path / "out")["modules_to_not_convert"][-1] == "layers.1.mlp.up_proj"
    back = load_checkpoint(tmp_path / "out", device="cpu", dtype=STORED).model
    assert torch.equal(back.get_submodule(UP).weight, linear.weight)
    assert len(layers(back)) == 13


def taken(path):
    """The linear layers that transformers would replace, of a model on the meta device."""
    config = AutoConfig.from_pretrained(path)
    build = AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        build = AutoModelForImageTextToText
    found = dict(config.quantization_config)
    del config.quantization_config
    with torch.device("meta"):
        model = build.from_config(config)
    parsed = AwqConfig.from_dict(found)
    floats = [*parsed.modules_to_not_convert]
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(name, floats)
    }
    return parsed, layers


@pytest.mark.parametrize("name", ["llava", "biased", "plain", "tied"])
@pytest.mark.parametrize("group", [32, 128])
def test_transformers_would_build_these_layers(sources, tmp_path, name, group):
    save_awq(tmp_path / "out", packed(sources[name], group), form="gemm", group_size=group)
    parsed, expected = taken(tmp_path / "out")
    assert (parsed.bits, parsed.group_size, parsed.zero_point) == (4, group, True)
    assert parsed.format == "gemm"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    # How transformers 5 renames the tensors of older files.
    start = ("language_model.model.", "model.language_model.")
    renamed = {k.replace(*start) if "plain" not in name else k: t for k, t in tensors.items()}
    assert {k.removesuffix(".qweight") for k in renamed if k.endswith("qweight")} == set(expected)
    for path, layer in expected.items():
        inputs, outputs = layer.in_features, layer.out_features
        shapes = {
            "qweight": ((inputs, outputs // 8), torch.int32),
            "qzeros": ((inputs // group, outputs // 8), torch.int32),
            "scales": ((inputs // group, outputs), torch.float16),
        }
        if layer.bias is not None:
            shapes["bias"] = ((outputs,), torch.float16)
        found = {
            k.rpartition(".")[2]: (tuple(t.shape), t.dtype)
            for k, t in renamed.items()
            if k.startswith(f"{path}.")
        }
        assert found == shapes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


def unpacked(words):
    """The nibbles of AutoAWQ's words, read off their description one by one."""
    out = np.zeros((words.shape[0], 8 * words.shape[1]), dtype=np.int64)
    for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        out[:, column::8] = (words.numpy().view(np.uint32) >> np.uint32(4 * i)) & 15
    return out


@pytest.mark.parametrize("name", ["llava", "biased", "next"])
def test_transformers_computes_the_same_of_the_unpacked_files(sources, tmp_path, name):
    """Its own AWQ layers need a GPU: the files are multiplied out for its float model."""
    save_awq(tmp_path / "packed", packed(sources[name], 64), form="gemm", group_size=64)
    shutil.copytree(tmp_path / "packed", tmp_path / "float")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    floats = {k: t.float() for k, t in tensors.items() if t.dtype != torch.int32}
    for key in [key for key in tensors if key.endswith(".qweight")]:
        path = key.removesuffix(".qweight")
        nibbles, zeros = (unpacked(tensors[f"{path}.{kind}"]) for kind in ("qweight", "qzeros"))
        scales = floats.pop(f"{path}.scales").numpy()
        floats[f"{path}.weight"] = multiplied_out(nibbles, zeros, scales, 64)
    save_file(floats, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    other = AutoModelForImageTextToText.from_pretrained(tmp_path / "float", dtype="float32").eval()
    exact = QuantConfig(group_size=64, levels="zeros", mode="weight_only", head_bits=None)
    loaded = load_checkpoint(tmp_path / "packed", device="cpu", dtype="float32", quantization=exact)
    generator = torch.Generator().manual_seed(1)
    if name == "next":
        pixels, size = torch.randn(5, 3, 28, 28, generator=generator), ImageSize(40, 50)
        more = {"pixel_values": pixels[None], "image_sizes": torch.tensor([size])}
    else:
        pixels, size = torch.randn(1, 3, 28, 28, generator=generator), ImageSize(28, 28)
        more = {"pixel_values": pixels}
    length = loaded.model.modality("image").num_tokens(PreparedImage(pixels, size))
    torch.testing.assert_close(
        logits_of(loaded, pixels, size, length),
        theirs(other, length, **more),
        atol=1e-4,
        rtol=1e-3,
    )


def test_transformers_finds_backend_llm_awq(sources, tmp_path):
    loaded = packed(sources["plain"], 64, "llm-awq")
    save_awq(tmp_path / "out", loaded, form="llm-awq", group_size=64)
    parsed, _ = taken(tmp_path / "out")
    assert parsed.format == "llm-awq"


def test_a_head_that_was_the_embedding(sources, tmp_path):
    """Untied since: config.json says so and the head has the dtype of the embedding."""
    loaded = packed(sources["tied"], 64)
    decoder = loaded.model.language_model
    decoder.lm_head = nn.Linear(128, VOCABULARY, bias=False)
    with torch.no_grad():
        decoder.lm_head.weight.copy_(2 * decoder.model.embed_tokens.weight.float())
    config = replace(loaded.config, text=replace(loaded.config.text, tie_embeddings=False))
    save_awq(tmp_path / "out", loaded, form="gemm", group_size=64, config=config)
    back = load_checkpoint(tmp_path / "out", device="cpu", dtype=STORED).model.language_model
    assert not back.config.tie_embeddings
    assert torch.equal(back.lm_head.weight, 2 * back.model.embed_tokens.weight)
    assert back.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_groups_of_zeros(form):
    """A row of scales that are all zero would be one of padding."""
    integers = drawn(256, 16, 64, 0)
    integers[2][1] = 0
    integers[2][2, 3] = 0
    before = packed_of(integers, 64)
    parts = {name: value(part) for name, part in stored_parts(before, form).items()}
    if form == "llm-awq":
        nibbles = in_tiles(parts["qweight"]).float()
        scales, zeros = (parts[name][:4].float() for name in ("scales", "scaled_zeros"))
        assert bool(scales.all())
        found = nibbles * scales.t().repeat_interleave(64, 1) + zeros.t().repeat_interleave(64, 1)
        torch.testing.assert_close(found, multiplied_out(*integers, 64), atol=1e-4, rtol=0)
        assert not bool(found[:, 64:128].any())
        assert not bool(found[3, 128:192].any())
    else:
        assert torch.equal(parts["scales"], torch.from_numpy(integers[2]))


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_with_groups_of_zeros(sources, tmp_path, form):
    loaded = packed(sources["llava"], 64, form)
    layer = layers(loaded.model)[UP]
    layer.scales[:, 1] = 0
    save_awq(tmp_path / "llava", loaded, form=form, group_size=64)
    verify_written(tmp_path / "llava", loaded)


def test_layers_of_three_bits(sources, tmp_path):
    loaded = packed(sources["llava"], 32)
    for layer in layers(loaded.model).values():
        layer.qweight.bitwise_and_(0x77)
    save_awq(tmp_path / "out", loaded, form="gemm", group_size=32)
    verify_written(tmp_path / "out", loaded)


def test_a_changed_layer_is_found(sources, tmp_path):
    loaded = packed(sources["biased"], 64)
    save_awq(tmp_path / "out", loaded, form="gemm", group_size=64)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.layers.1.mlp.up_proj.scales"][1, 7] *= 2
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"1\.mlp\.up_proj differs by up to 0\.\d+"):
        verify_written(tmp_path / "out", loaded)
    tensors["language_model.model.layers.1.mlp.up_proj.scales"][1, 7] /= 2
    tensors["language_model.model.layers.0.self_attn.q_proj.bias"][3] += 0.5
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"0\.self_attn\.q_proj differs by up to 0\.5"):
        verify_written(tmp_path / "out", loaded)


def test_an_old_folder_stays_until_the_new_one_is_whole(sources, tmp_path, monkeypatch):
    loaded = packed(sources["llava"], 64)
    save_awq(tmp_path / "out", loaded, form="gemm", group_size=64)
    with pytest.raises(CheckpointError, match="is there already"):
        save_awq(tmp_path / "out", loaded, form="gemm", group_size=64)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / ".out.part").mkdir()  # of a process that was killed
    layer = layers(loaded.model)[UP]
    layer.scales.mul_(2)

    def fail(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("lapilli.checkpoint.write.huggingface.write_hf_preprocessor", fail)
        with pytest.raises(RuntimeError, match="killed"):
            save_awq(tmp_path / "out", loaded, form="gemm", group_size=64, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    save_awq(
        tmp_path / "out",
        loaded,
        form="gemm",
        group_size=64,
        overwrite=True,
        extra={"README.md": "a card"},
    )
    verify_written(tmp_path / "out", loaded)
    assert (tmp_path / "out" / "README.md").read_text() == "a card"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_tensors_are_made_when_they_are_written(sources, monkeypatch, tmp_path):
    """One repacked tensor is held at a time."""
    made = []
    monkeypatch.setattr(
        "lapilli.checkpoint.write.files.value",
        lambda t: made.append(t) or value(t),
    )
    loaded = packed(sources["llava"], 64)
    save_awq(tmp_path / "out", loaded, form="gemm", group_size=64)
    deferred = [t for t in made if isinstance(t, Deferred) and t.dtype == torch.int32]
    assert len(deferred) == 2 * 14


def test_what_cannot_be_written(sources, tmp_path):
    def refused(message, loaded, form="gemm", group=64):
        with pytest.raises(ConfigError, match=message):
            save_awq(tmp_path / "out", loaded, form=form, group_size=group)
        assert not (tmp_path / "out").exists()

    source = sources["llava"]
    plain = load_checkpoint(source, device="cpu", dtype=STORED)
    refused("the model is not quantized", plain)
    good = packed(source, 64)
    refused("form 'gguf' is unknown: choose from gemm, llm-awq", good, "gguf")
    refused("AWQ groups of 256: choose 32, 64 or 128", good, group=256)
    refused("groups of 64, expected 128", good, group=128)
    for options, message in (
        ({"levels": "nonlinear", "value_bits": 4}, "nonlinear levels, AWQ has zero points"),
        ({"levels": "symmetric"}, "symmetric levels, AWQ has zero points"),
        ({"levels": "zeros", "value_bits": 8}, "v_proj is in 8 bits, AWQ has 4: .*value_bits=4"),
        ({"levels": "zeros", "head_bits": 8}, "lm_head is packed"),
        ({"levels": "zeros", "quantize_tower": True}, "packed: AWQ files have the output layer"),
    ):
        loaded = load_checkpoint(source, device="cpu", dtype=STORED)
        quantize(loaded.model, QuantConfig(**{"group_size": 64, "head_bits": None, **options}))
        refused(message, loaded)
    layers(good.model)[UP].scales[0, 0, 0] = 30000
    refused(r"up_proj has scales or a bias of 4\.5e\+05, beyond float16", good, "llm-awq")
    layers(good.model)[UP].scales[0, 0, 0] = float("nan")
    refused("beyond float16", good)


@pytest.mark.parametrize(
    ("form", "size", "group", "message"),
    [
        ("gemm", (96, 16), 64, "96 inputs, but gemm with groups of 64 packs multiples of 64"),
        ("gemm", (64, 12), 64, "12 outputs, but gemm with groups of 64 packs multiples of 8"),
        ("llm-awq", (96, 16), 32, "96 inputs, but llm-awq with groups of 32 .* multiples of 64"),
        ("llm-awq", (128, 12), 64, "12 outputs, but llm-awq"),
    ],
)
def test_layers_that_a_form_cannot_hold(sources, tmp_path, form, size, group, message):
    loaded = packed(sources["llava"], group, form)
    linear = nn.Linear(*size, bias=False)
    loaded.model.set_submodule(UP, linear)
    assert list(unfit_layers(loaded.model, form, group)) == [UP]
    config = QuantConfig(levels="zeros", group_size=group)
    loaded.model.set_submodule(UP, QuantLinear(round_weight(linear.weight, None, 4, config)))
    with pytest.raises(ConfigError, match=f"up_proj has {message}.*: leave it float"):
        save_awq(tmp_path / "out", loaded, form=form, group_size=group)


def test_logits_are_those_of_the_model_in_memory(sources, tmp_path):
    """Loaded in float32, written as the files were; only biases are rounded."""
    loaded = packed(sources["plain biased"], 64, dtype="float32")
    save_awq(tmp_path / "out", loaded, form="gemm", group_size=64)
    stored = load_checkpoint(tmp_path / "out", device="cpu", dtype=STORED).model
    assert stored.language_model.lm_head.weight.dtype == torch.bfloat16
    after = load_checkpoint(tmp_path / "out", device="cpu", dtype="float32").model
    torch.testing.assert_close(text_logits(after), text_logits(loaded.model), atol=1e-3, rtol=1e-3)

"""Rounding: how far packed weights may be off. The pass: which layers, what is refused."""

import pytest
import torch
from torch import nn

import lapilli
from lapilli.errors import ConfigError
from lapilli.kernels.packing import Packed
from lapilli.lora import LoraConfig, inject
from lapilli.quant import QuantConfig, quant_config, quantize
from lapilli.quant.linear import QuantLinear
from lapilli.quant.quantize import bits_of, describe, round4, round8, round_weight


def weights(rows: int = 40, inputs: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def test_int8_is_within_half_a_step() -> None:
    weight = weights()
    back = round8(weight, None).dequantize()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((back - weight).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("levels", ["symmetric", "zeros"])
def test_int4_is_within_half_a_step(group: int, levels: str) -> None:
    weight = weights()
    config = QuantConfig(group_size=group, levels=levels, search=False)
    back = round4(weight, None, config).dequantize()
    for begin in range(0, weight.shape[1], group):
        old, new = weight[:, begin : begin + group], back[:, begin : begin + group]
        if levels == "symmetric":  # the largest weight of the other sign may be a whole step away
            step = old.abs().amax(dim=1, keepdim=True) / 8
            assert bool(((new - old).abs() <= step * 1.01).all())
        else:
            span = old.amax(1, keepdim=True).clamp(min=0) - old.amin(1, keepdim=True).clamp(max=0)
            assert bool(((new - old).abs() <= span / 15 * 1.01).all())


def test_the_search_lowers_the_error() -> None:
    weight = weights(64, 512)
    error = [
        float(
            (
                round4(weight, None, QuantConfig(levels="symmetric", search=search)).dequantize()
                - weight
            )
            .square()
            .mean()
        )
        for search in (False, True)
    ]
    assert error[1] < 0.97 * error[0]


@pytest.mark.parametrize("levels", ["symmetric", "zeros", "nonlinear"])
def test_zeros_and_constants_are_kept(levels: str) -> None:
    weight = torch.zeros(16, 96)
    weight[1] = 0.25
    weight[2] = -0.25
    back = round4(weight, None, QuantConfig(group_size=64, levels=levels)).dequantize()
    assert torch.equal(back[0], torch.zeros(96))
    assert torch.allclose(back[1:3], weight[1:3], rtol=1e-3)


def test_a_bias_is_kept() -> None:
    bias = torch.randn(40)
    assert torch.equal(round8(weights(), bias).plain_bias, bias)
    assert torch.equal(
        round4(weights(), bias.half(), QuantConfig()).plain_bias, bias.half().float()
    )


def test_too_large_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights above 65504 x 8 do not fit into 4 bits"):
        round4(torch.full((16, 32), 1e6), None, QuantConfig(levels="symmetric"))


def test_int8_is_packed_where_the_weight_is() -> None:
    weight = torch.empty(20, 96, device="meta")
    packed = round8(weight, weight[:, 0])
    assert {part.device.type for part in (packed.data, packed.scales, packed.bias)} == {"meta"}


@pytest.mark.parametrize("bits", [4, 8])
def test_the_default_dtype_of_a_program_does_not_count(bits: int) -> None:
    weight = torch.randn(48, 64)
    expected = round_weight(weight, None, bits, QuantConfig(bits=bits))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = round_weight(weight, None, bits, QuantConfig(bits=bits))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.scales.dtype == expected.scales.dtype
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.data, expected.data)


class Whole(nn.Module):
    """The shape of a VisionLanguageModel: names are what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.ModuleDict(
            {
                "layers": nn.ModuleList([nn.Linear(64, 48), nn.LayerNorm(48)]),
                "embed": nn.Embedding(10, 64),
                "lm_head": nn.Linear(48, 20, bias=False),
            }
        )
        self.modalities = nn.ModuleDict({"image": nn.Linear(8, 64)})


def test_language_model_in_4_head_in_8_tower_as_it_is() -> None:
    model = Whole()
    before = model.language_model["layers"][0].weight.nbytes
    report = quantize(model, QuantConfig())
    assert report.bits == {"language_model.layers.0": 4, "language_model.lm_head": 8}
    assert report.num_bytes_before == before + 20 * 48 * 4
    assert report.num_bytes < report.num_bytes_before / 2
    assert type(model.modalities["image"]) is nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tied_embeddings_are_named_in_the_report() -> None:
    model = Whole()
    assert quantize(model, QuantConfig()).notes == ()
    tied = Whole()
    del tied.language_model["lm_head"]
    (note,) = quantize(tied, QuantConfig(head_bits=4)).notes
    assert "made of the embedding table" in note
    assert "head_bits 4 changes nothing" in note
    tied = Whole()
    del tied.language_model["lm_head"]
    assert quantize(tied, QuantConfig(head_bits=None)).notes == ()


def test_the_group_size_follows_the_bits_wherever_it_is_not_given() -> None:
    assert QuantConfig(bits=8) == quant_config("int8")
    assert QuantConfig(bits=4) == quant_config("int4")
    assert (QuantConfig(bits=8).group_size, QuantConfig(bits=4).group_size) == (32, 64)
    assert QuantConfig(bits=4, levels="symmetric").group_size == 128
    assert describe(QuantConfig(bits=8)) == "8 bits, groups of 32, dynamic"
    assert describe(QuantConfig(levels="zeros")) == "4 bits, groups of 128, zero points, dynamic"


def test_the_tower_when_asked() -> None:
    model = Whole()
    report = quantize(model, QuantConfig(quantize_tower=True))
    assert report.bits["modalities.image"] == 8


def test_outputs_stay_close_and_state_comes_back() -> None:
    torch.manual_seed(0)
    model = Whole()
    x = torch.randn(5, 64)
    expected = model.language_model["layers"][0](x).detach()
    quantize(model, QuantConfig(bits=8))
    layer = model.language_model["layers"][0]
    assert isinstance(layer, QuantLinear)
    found = layer(x)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert sorted(state) == ["packed_bias", "qweight", "scales"]
    layer.load_state_dict(state, assign=True)  # other memory: the native description is made anew
    del state
    assert torch.equal(layer(x), found)
    assert isinstance(layer.packed, Packed)
    assert "bits=8" in repr(layer)


def test_twice_is_refused() -> None:
    model = Whole()
    quantize(model, QuantConfig())
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(model, QuantConfig())


def test_an_adapter_goes_on_afterwards_not_before() -> None:
    model = Whole()
    inject(model, LoraConfig(rank=2, alpha=2, targets=("language_model.layers.0",)))
    with pytest.raises(ConfigError, match="unmerged adapter"):
        quantize(model, QuantConfig())
    model = Whole()
    quantize(model, QuantConfig())
    report = inject(model, LoraConfig(rank=2, alpha=2, targets=("language_model.layers.0",)))
    assert report.paths == ("language_model.layers.0",)


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no linear layer lies under language_model\."):
        quantize(nn.Sequential(nn.Linear(4, 4)), QuantConfig())


def test_names_of_schemes() -> None:
    assert quant_config("int8").bits == 8
    assert quant_config("int4", quantize_tower=True).quantize_tower
    with pytest.raises(ConfigError, match="quantize='int3' is unknown: choose int8, int4"):
        quant_config("int3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be 4 or 8, found 3"),
        ({"group_size": 100}, "group_size must be 32, 64 or 128, found 100"),
        ({"mode": "static"}, "mode must be dynamic or weight_only"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**options)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_pebble_answers_as_before(bits: int) -> None:
    picture = lapilli.__path__[0] + "/../../examples/picture.png"
    plain = lapilli.load("pebble")
    expected = plain.ask("What is in this picture?", picture)
    quantize(plain.model, QuantConfig(bits=bits))
    plain.reset()
    assert plain.ask("What is in this picture?", picture) == expected


def test_values_are_kept_in_8_bits() -> None:
    config = QuantConfig()
    for path in ("language_model.model.layers.0.self_attn.v_proj", "language_model.lm_head"):
        assert bits_of(path, config) == 8
    assert bits_of("language_model.model.layers.0.self_attn.k_proj", config) == 4
    named = "4 bits, groups of 64, nonlinear levels, values in 8 bits, dynamic"
    assert describe(config) == named
    alike = QuantConfig(value_bits=4)
    assert bits_of("language_model.model.layers.0.self_attn.v_proj", alike) == 4
    linear = QuantConfig(levels="symmetric")
    assert bits_of("language_model.model.layers.0.self_attn.v_proj", linear) == 4
    with pytest.raises(ConfigError, match="value_bits must be 4 or 8, found 5"):
        QuantConfig(value_bits=5)

"""The pass: which layers, what is reported, what is refused."""

import pytest
import torch
from torch import nn

import lapilli
from lapilli.errors import ConfigError
from lapilli.kernels.packing import Packed
from lapilli.lora import LoraConfig, inject
from lapilli.quant import QuantConfig, quant_config, quantize
from lapilli.quant.config import describe
from lapilli.quant.linear import QuantLinear


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
    assert "embeddings are tied" in note
    assert "head_bits 4 changes nothing" in note
    tied = Whole()
    del tied.language_model["lm_head"]
    assert quantize(tied, QuantConfig(head_bits=None)).notes == ()


def test_the_group_size_follows_the_bits_wherever_it_is_not_given() -> None:
    assert QuantConfig(bits=8) == quant_config("int8")
    assert QuantConfig(bits=4) == quant_config("int4")
    assert (QuantConfig(bits=8).group_size, QuantConfig(bits=4).group_size) == (32, 128)
    assert describe(QuantConfig(bits=8)) == "8 bits, groups of 32, dynamic"
    assert describe(QuantConfig(symmetric=False)) == "4 bits, groups of 128, zero points, dynamic"


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

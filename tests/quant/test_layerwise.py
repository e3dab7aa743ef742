"""A decoder, layer after layer: never worse than plain rounding, and handed on as it should be."""

import pytest
import torch

import lapilli
from lapilli.config.model import MptConfig
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.lm import Mpt
from lapilli.lora import LoraConfig, inject
from lapilli.model import VisionLanguageModel
from lapilli.quant import QuantConfig, quantize
from lapilli.quant.activations import Rounding
from lapilli.quant.layerwise import METHODS, decoder_of, quantize_layer, round_layer
from lapilli.quant.linear import QuantLinear
from tests.quant.decoders import samples_of, small_decoder

CONFIGS = [QuantConfig(), QuantConfig(levels="zeros", group_size=32, mode="weight_only")]


def logits(decoder, samples):
    return torch.cat(
        [
            decoder.logits(decoder(one.hidden, position_ids=torch.arange(len(one))[None]))[0]
            for one in samples
        ]
    )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("method", list(METHODS))
@torch.no_grad()
def test_logits_are_closer_than_those_of_plain_rounding(method: str, config: QuantConfig) -> None:
    decoder, plain = small_decoder(num_kv_heads=2), small_decoder(num_kv_heads=2)
    start = samples_of(decoder, (60, 50, 60, 60, 60))
    truth, samples = logits(decoder, start), samples_of(decoder, (60, 50, 60, 60, 60))
    rounding = Rounding(config)
    for index in range(3):
        report = quantize_layer(decoder, index, samples, method, rounding)
        round_layer(plain, index, rounding)
        assert report.index == index
        assert report.error <= report.error_before
        assert report.is_plain == (report.error == report.error_before)
    errors = [float((logits(one, start) - truth).square().mean()) for one in (plain, decoder)]
    assert errors[1] < errors[0]
    packed = [module for module in decoder.modules() if isinstance(module, QuantLinear)]
    assert len(packed) == 21
    assert {module.weight_only for module in packed} == {config.mode == "weight_only"}


@torch.no_grad()
def test_what_is_handed_on() -> None:
    zeros = QuantConfig(levels="zeros", group_size=32)
    for method, config, is_packed in (
        ("awq-clip", zeros, False),
        ("awq", zeros, True),
        ("gptq", zeros, True),
    ):
        decoder = small_decoder()
        samples, before = samples_of(decoder), samples_of(decoder)
        whole = small_decoder()
        quantize_layer(decoder, 0, samples, method, Rounding(config))
        layer = (decoder if is_packed else whole).layer(0)
        for sample, old in zip(samples, before, strict=True):
            table, mask = whole.layer_context(0, torch.arange(len(old))[None], torch.float32)
            assert torch.allclose(sample.hidden, layer(old.hidden, table, mask, None), atol=1e-5)


def test_norms_keep_the_format_of_the_files() -> None:
    decoder = small_decoder().bfloat16()
    quantize_layer(decoder, 0, samples_of(decoder), "awq", Rounding(QuantConfig()))
    assert decoder.layer(0).input_layernorm.weight.dtype == torch.bfloat16
    assert decoder.layer(1).self_attn.q_proj.weight.dtype == torch.bfloat16


def test_a_method_that_makes_it_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(calibration):
        calibration.layer.mlp.up_proj.weight.data *= 3
        calibration.rounding.pack_layer(calibration.layer)
        return {}

    method = METHODS["awq"]
    monkeypatch.setitem(METHODS, "awq", type(method)(spoil, in_turn=False))
    decoder, plain = small_decoder(), small_decoder()
    report = quantize_layer(decoder, 1, samples_of(decoder), "awq", Rounding(QuantConfig()))
    round_layer(plain, 1, Rounding(QuantConfig()))
    assert report.is_plain
    mine, theirs = decoder.layer(1).state_dict(), plain.layer(1).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_models_that_cannot_be_done_are_refused() -> None:
    chat = lapilli.load("pebble", device="cpu", dtype="float32")
    adapted = lapilli.load("pebble", device="cpu", dtype="float32").model
    inject(adapted, LoraConfig(rank=2, alpha=4, targets=("language_model.*.q_proj",)))
    with pytest.raises(ConfigError, match=r"layer 0: self_attn.q_proj is no plain linear layer"):
        decoder_of(adapted)
    quantize(chat.model, QuantConfig())
    with pytest.raises(ConfigError, match="quantized already"):
        decoder_of(chat.model)


def test_other_decoders_are_refused() -> None:
    config = MptConfig(
        vocab_size=20,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        max_positions=32,
    )
    with pytest.raises(UnsupportedModelError, match="choose the method rtn"):
        decoder_of(VisionLanguageModel(Mpt(config)))

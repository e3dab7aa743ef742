"""AWQ: the search of the reference, scales that change nothing, and clipping that helps."""

import copy

import pytest
import torch

from lapilli.quant import QuantConfig
from lapilli.quant.activations import SHARED_INPUTS, CalibrationLayer, Rounding, linear_of
from lapilli.quant.awq import (
    SHARES,
    apply_scales,
    clip,
    quantize_by_awq,
    quantize_by_clipping,
    scaled_inputs,
    scales_of,
    search_scales,
)
from tests.quant.decoders import samples_of, small_decoder

WITHOUT_ROUNDED_ACTIVATIONS = QuantConfig(levels="zeros", group_size=32, mode="weight_only")


def observed(config: QuantConfig = WITHOUT_ROUNDED_ACTIVATIONS, **more) -> CalibrationLayer:
    decoder = small_decoder(**more)
    calibration = CalibrationLayer(decoder, 1, samples_of(decoder), Rounding(config))
    calibration.observe()
    return calibration


def reference_rounding(weight: torch.Tensor, group: int) -> torch.Tensor:
    """awq.md section 3, with ranges that contain 0, and scales in float16 as files have them."""
    groups = weight.view(len(weight), -1, group)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    scale = ((high - low).clamp(min=1e-5) / 15).half().float()
    zero = (-(low / scale).round()).clamp(0, 15)
    stored = ((groups / scale).round() + zero).clamp(0, 15)
    return ((stored - zero) * scale).view_as(weight)


def test_dequantized_weights_are_those_of_the_formula() -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    packed = Rounding(WITHOUT_ROUNDED_ACTIVATIONS).pack("mlp.up_proj", weight, None)
    assert torch.allclose(packed.dequantize(), reference_rounding(weight, 32), atol=1e-4)


def test_scales_are_powers_around_one() -> None:
    mean = torch.tensor([0.0, 0.25, 1.0, 16.0])
    assert torch.equal(scales_of(mean, 0.0), torch.ones(4))
    found = scales_of(mean, 0.5)
    assert torch.allclose(found / found[2], torch.tensor([1e-4, 0.5, 1.0, 4.0]))
    assert float(found.max() * found.min()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("name", list(SHARED_INPUTS))
def test_the_search_finds_what_the_reference_finds(name: str) -> None:
    calibration = observed()
    scaled = next(one for one in scaled_inputs(calibration.layer) if one.name == name)
    found, scales = search_scales(calibration, scaled)
    seen = calibration.seen[name]
    losses = []
    for share in SHARES:
        tried = scales_of(seen.mean, share)
        twin = copy.copy(calibration)
        twin.layer = copy.deepcopy(calibration.layer)
        for one in SHARED_INPUTS[name]:
            weight = linear_of(twin.layer, one).weight
            weight.data = reference_rounding(weight.data * tried, 32) / tried
        pairs = [
            (calibration.inspect(scaled.inspected, x), twin.inspect(scaled.inspected, x))
            for x in seen.kept
        ]
        losses.append(sum(float((a - b).square().sum()) for a, b in pairs))
    assert found == pytest.approx(SHARES[losses.index(min(losses))])
    assert torch.allclose(scales, scales_of(seen.mean, found))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_kv_heads": 2, "qkv_bias": True, "output_bias": True},
        {"num_kv_heads": 1, "mlp_bias": True, "norm_offset": 1.0, "embedding_scale": 2.0},
        {"post_norms": True, "activation": "gelu_tanh", "norm_offset": 1.0, "qk_norm": True},
    ],
    ids=str,
)
def test_scales_change_nothing_of_the_float_layer(shape: dict) -> None:
    calibration = observed(**shape)
    generator = torch.Generator().manual_seed(3)
    for scaled in scaled_inputs(calibration.layer):
        width = linear_of(calibration.layer, scaled.name).in_features
        scales = torch.rand(width, generator=generator) * 3 + 0.2
        if scaled.name == "self_attn.o_proj":  # one for each key-value head's channels
            heads = calibration.layer.self_attn.v_proj.out_features // 16
            scales = scales.view(heads, -1, 16)[:, :1].expand(-1, 4 // heads, -1).flatten()
        apply_scales(calibration, scaled, scales)
    assert calibration.error(calibration.layer) < 1e-8


def test_gains_that_files_hold_in_bfloat16_change_nothing_either() -> None:
    calibration = observed()
    calibration.stored = torch.bfloat16
    scaled = scaled_inputs(calibration.layer)[0]
    apply_scales(calibration, scaled, torch.rand(64) * 3 + 0.2)
    gain = calibration.layer.input_layernorm.weight
    assert torch.equal(gain, gain.bfloat16().float())
    assert calibration.error(calibration.layer) < 1e-8


def test_a_gain_of_zero_stays_zero() -> None:
    calibration = observed()
    calibration.layer.input_layernorm.weight.data[7] = 0
    apply_scales(calibration, scaled_inputs(calibration.layer)[0], torch.rand(64) + 0.5)
    assert calibration.layer.input_layernorm.weight[7] == 0
    assert bool(torch.isfinite(calibration.layer.self_attn.q_proj.weight).all())


def test_inputs_are_seen_as_they_are_behind_the_scales() -> None:
    calibration = observed()
    scales = torch.rand(64) + 0.5
    before = [x.clone() for x in calibration.seen["mlp.gate_proj"].kept]
    apply_scales(calibration, scaled_inputs(calibration.layer)[2], scales)
    again = CalibrationLayer.__new__(CalibrationLayer)
    for name in ("_decoder", "index", "samples", "rounding", "_weights", "searched", "layer"):
        setattr(again, name, getattr(calibration, name))
    again.seen, again.outputs = {}, []
    again.observe()
    pairs = zip(again.seen["mlp.gate_proj"].kept, before, strict=True)
    assert all(torch.allclose(new, old / scales, atol=1e-5) for new, old in pairs)
    mean = calibration.seen["mlp.gate_proj"].mean
    assert torch.allclose(mean, again.seen["mlp.gate_proj"].mean, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [WITHOUT_ROUNDED_ACTIVATIONS, QuantConfig(levels="symmetric", group_size=32)],
    ids=str,
)
def test_clipping_lowers_the_error_of_the_products(config: QuantConfig) -> None:
    calibration = observed(config)
    name = "mlp.down_proj"
    linear = linear_of(calibration.layer, name)
    linear.weight.data[:, 3] *= 6  # which the rest of its groups pays for
    x = torch.cat(calibration.seen[name].kept)
    x[:, 3] *= 0.01
    calibration.seen[name].kept = [x]
    weight = linear.weight.data.clone()
    errors = []
    for _ in range(2):
        packed = calibration.rounding.pack(name, linear.weight, None)
        missed = (packed.dequantize() - weight) @ calibration.rounding.seen(x).t()
        errors.append(float(missed.square().sum()))
        clip(calibration, name)
    assert bool((linear.weight.abs() <= weight.abs() + 1e-6).all())
    assert errors[1] < errors[0]


def test_queries_and_keys_are_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = []
    monkeypatch.setattr("lapilli.quant.awq.clip", lambda _layer, name: clipped.append(name))
    quantize_by_clipping(observed())
    assert clipped == [
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]


@pytest.mark.parametrize(
    "config", [QuantConfig(), QuantConfig(levels="zeros", group_size=32)], ids=str
)
def test_rounding_in_turn_is_closer_than_clipping(config: QuantConfig) -> None:
    errors = []
    for quantize in (quantize_by_clipping, quantize_by_awq):
        decoder = small_decoder(num_kv_heads=2)
        samples = samples_of(decoder, (60, 50, 60, 60))
        calibration = CalibrationLayer(decoder, 1, samples, Rounding(config))
        calibration.observe(gram=quantize is quantize_by_awq)
        shares = quantize(calibration)
        assert any(shares.values())
        errors.append(calibration.error(calibration.layer))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("config", [WITHOUT_ROUNDED_ACTIVATIONS, QuantConfig()], ids=str)
def test_channels_that_stick_out_are_rounded_better(config: QuantConfig) -> None:
    calibration = observed(config, num_kv_heads=2)
    before = calibration.error(calibration.rounded_to_nearest())
    shares = quantize_by_clipping(calibration)
    assert set(shares) == set(SHARED_INPUTS)
    assert any(shares.values())
    assert calibration.error(calibration.layer) < 0.9 * before


def test_positions_count_by_their_weights() -> None:
    """Weights of all but text make a search that sees text alone."""
    decoder = small_decoder()
    samples = samples_of(decoder)
    weights = {"self_attn": (1.0, 0.0), "mlp": (1.0, 0.0)}
    weighted = CalibrationLayer(decoder, 1, samples, Rounding(WITHOUT_ROUNDED_ACTIVATIONS), weights)
    weighted.observe()
    scaled = scaled_inputs(weighted.layer)[3]
    alone = copy.copy(weighted)
    alone.seen = copy.deepcopy(weighted.seen)
    is_text = [~sample.is_picture for sample in samples]
    kept = alone.seen[scaled.name].kept
    alone.seen[scaled.name].kept = [x[text] for x, text in zip(kept, is_text, strict=True)]
    alone._weights = None
    alone.weight_of = lambda _part: [torch.ones(int(text.sum()), 1) for text in is_text]
    assert search_scales(weighted, scaled)[0] == search_scales(alone, scaled)[0]
    assert [float(one[0]) for one in weighted.weight_of("mlp.down_proj")] == [0.0] * 4


def test_layers_that_stay_floats_are_not_scaled() -> None:
    decoder = small_decoder()
    rounding = Rounding(WITHOUT_ROUNDED_ACTIVATIONS, floats=frozenset({"mlp.down_proj"}))
    calibration = CalibrationLayer(decoder, 1, samples_of(decoder), rounding)
    calibration.observe(gram=True)
    shares = quantize_by_awq(calibration)
    assert "mlp.down_proj" not in shares
    assert isinstance(calibration.layer.mlp.down_proj, torch.nn.Linear)
    assert not isinstance(calibration.layer.mlp.up_proj, torch.nn.Linear)

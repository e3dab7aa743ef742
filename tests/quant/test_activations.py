"""What is seen of a layer is what its linear layers are given."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.errors import ConfigError
from lapilli.kernels.packing import rounded
from lapilli.quant import QuantConfig
from lapilli.quant.activations import (
    SHARED_INPUTS,
    CalibrationLayer,
    Rounding,
    Sample,
    linear_of,
    searched,
)
from tests.quant.decoders import samples_of, small_decoder

ROUNDING = Rounding(QuantConfig())


def given_to_layers(decoder, samples):
    """Every linear layer's inputs, by its name, of a plain run of the first layer."""
    found = defaultdict(list)
    layer = decoder.layer(0)
    for names in SHARED_INPUTS.values():
        for name in names:
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _module, inputs, name=name: found[name].append(inputs[0][0])
            )
    for sample in samples:
        table, mask = decoder.layer_context(0, torch.arange(len(sample))[None], torch.float32)
        layer(sample.hidden, table, mask, None)
    return found


def test_means_and_moments_are_those_of_all_positions() -> None:
    decoder = small_decoder(qkv_bias=True, num_kv_heads=2)
    samples = samples_of(decoder)
    calibration = CalibrationLayer(decoder, 0, samples, ROUNDING)
    calibration.observe(gram=True)
    plain = given_to_layers(decoder, samples)
    for first, names in SHARED_INPUTS.items():
        seen = calibration.seen[first]
        for name in names:
            every = torch.cat(plain[name])
            assert torch.allclose(seen.mean, every.abs().mean(dim=0), rtol=1e-4)
            sums = rounded(every, 64).t() @ rounded(every, 64)
            assert torch.allclose(seen.gram, sums, rtol=1e-3, atol=1e-3 * sums.abs().max())
            assert all(map(torch.allclose, seen.kept, plain[name]))


def test_outputs_are_those_of_the_layer_with_its_window() -> None:
    decoder = small_decoder(sliding_window=8)
    samples = samples_of(decoder, (40,))
    calibration = CalibrationLayer(decoder, 0, samples, ROUNDING)
    calibration.observe()
    decoder.model.layers = decoder.model.layers[:1]
    decoder.model.norm = torch.nn.Identity()
    expected = decoder(samples[0].hidden, position_ids=torch.arange(40)[None])
    assert torch.allclose(calibration.outputs[0], expected, atol=1e-5)


def test_the_model_is_left_as_it_is() -> None:
    decoder = small_decoder()
    before = {name: one.clone() for name, one in decoder.state_dict().items()}
    calibration = CalibrationLayer(decoder, 1, samples_of(decoder), ROUNDING)
    calibration.observe()
    linear_of(calibration.layer, "mlp.up_proj").weight.data.zero_()
    assert all(torch.equal(before[name], one) for name, one in decoder.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_activation_that_is_no_number_names_layer_and_sample(bad: float) -> None:
    decoder = small_decoder()
    samples = samples_of(decoder)
    samples[2].hidden[0, 3, 5] = bad
    calibration = CalibrationLayer(decoder, 1, samples, ROUNDING)
    with pytest.raises(ConfigError, match=r"layer 1 makes NaN or infinity of calibration sample 2"):
        calibration.observe()


def test_an_error_of_nothing_changed_is_zero() -> None:
    decoder = small_decoder()
    calibration = CalibrationLayer(decoder, 0, samples_of(decoder), ROUNDING)
    calibration.observe()
    assert calibration.error(calibration.layer) < 1e-9
    assert calibration.error(calibration.rounded_to_nearest()) > 1e-4


@given(st.lists(st.integers(1, 900), min_size=1, max_size=40), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_kept_samples_are_some_and_not_too_many(lengths: list[int], most: int) -> None:
    sizes = [(size, torch.zeros(size, dtype=torch.bool)) for size in lengths]
    samples = [Sample(torch.zeros(1, size, 1), no, no, no.long()) for size, no in sizes]
    found = searched(samples, most)
    assert found
    assert found == sorted(set(found))
    total = sum(lengths[at] for at in found)
    assert total <= most or len(found) == 1
    if sum(lengths) <= most:
        assert found == list(range(len(lengths)))


def test_a_packed_layer_is_refused() -> None:
    decoder = small_decoder()
    Rounding(QuantConfig()).pack_layer(decoder.layer(0))
    with pytest.raises(ConfigError, match="packed already"):
        linear_of(decoder.layer(0), "mlp.up_proj")


def test_three_bits_are_of_the_layers_in_four() -> None:
    rounding = Rounding(QuantConfig(levels="zeros", group_size=32, value_bits=8), bits=3)
    assert rounding.bits_of("self_attn.v_proj") == 8
    assert rounding.bits_of("mlp.up_proj") == 3
    packed = rounding.pack("mlp.up_proj", torch.randn(16, 64), None)
    assert packed.bits == 4
    assert len(packed.dequantize()[0, :32].unique()) <= 8


def test_second_moments_count_positions_by_their_weights() -> None:
    decoder = small_decoder()
    samples = samples_of(decoder)
    weights = {"self_attn": (1.0, 0.0), "mlp": (4.0, 0.0)}
    rounding = Rounding(QuantConfig(mode="weight_only"))
    calibration = CalibrationLayer(decoder, 0, samples, rounding, weights)
    calibration.observe(gram=True)
    plain = given_to_layers(decoder, samples)
    for name, factor in (("self_attn.o_proj", 1.0), ("mlp.down_proj", 4.0)):
        pairs = zip(plain[name], samples, strict=True)
        text = torch.cat([x[~sample.is_picture] for x, sample in pairs])
        expected = factor * text.t() @ text
        gram = calibration.seen[name].gram
        assert torch.allclose(gram, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

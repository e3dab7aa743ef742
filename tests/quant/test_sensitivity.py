"""MBQ's weights are the gradients of the whole model's loss, by kind of position."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from lapilli.errors import ConfigError
from lapilli.quant import sensitivity
from lapilli.quant.sensitivity import sensitivities
from tests.quant.decoders import samples_of, small_decoder


def keep(updates, _module, _inputs, out):
    out.retain_grad()
    updates.append(out)


def by_autograd(decoder, samples):
    """Mean |gradient| of every update, of one run of the whole model per sample."""
    decoder.requires_grad_(True)
    sums = torch.zeros(len(decoder.model.layers), 2, 2)
    counts = torch.zeros(2)
    for sample in samples:
        updates = []
        hooks = [
            part.register_forward_hook(partial(keep, updates))
            for layer in decoder.model.layers
            for part in (layer.self_attn, layer.mlp)
        ]
        hidden = decoder(sample.hidden, position_ids=torch.arange(len(sample))[None])
        scores = decoder.logits(hidden)[0, :-1][sample.counts[1:]]
        functional.cross_entropy(scores, sample.ids[1:][sample.counts[1:]]).backward()
        for hook in hooks:
            hook.remove()
        for at, update in enumerate(updates):
            size = update.grad[0].abs().mean(-1)
            sums[at // 2, at % 2, 0] += size[~sample.is_picture].sum()
            sums[at // 2, at % 2, 1] += size[sample.is_picture].sum()
        counts += torch.tensor([(~sample.is_picture).sum(), sample.is_picture.sum()])
    decoder.requires_grad_(False)
    return sums / counts


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_kv_heads": 2, "tie_embeddings": True, "sliding_window": 9},
        {"post_norms": True, "logit_softcap": 5.0, "norm_offset": 1.0, "embedding_scale": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kept_bytes", [1 << 30, 1])
def test_weights_are_the_gradients(shape: dict, kept_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(sensitivity, "KEPT_BYTES", kept_bytes)
    decoder = small_decoder(**shape)
    samples = samples_of(decoder)
    told = []
    found = sensitivities(decoder, samples, done=lambda *so_far: told.append(so_far))
    expected = by_autograd(decoder, samples)
    for index, one in enumerate(found):
        for part, name in enumerate(("self_attn", "mlp")):
            assert torch.allclose(torch.tensor(one[name]), expected[index, part], rtol=1e-3)
    assert told[-1] == (4, 4)
    assert all(
        torch.equal(a.hidden, b.hidden) for a, b in zip(samples, samples_of(decoder), strict=True)
    )


def test_a_model_in_bfloat16_has_weights_too() -> None:
    decoder = small_decoder().bfloat16()
    found = sensitivities(decoder, samples_of(decoder))
    assert all(value > 0 for one in found[:-1] for pair in one.values() for value in pair)
    # Nothing comes behind the last layer that could see what it makes of a picture's positions.
    assert all(pair[0] > 0 and pair[1] == 0 for pair in found[-1].values())


def test_samples_without_pictures_or_answers_are_refused() -> None:
    decoder = small_decoder()
    samples = samples_of(decoder)
    for sample in samples:
        sample.counts = torch.zeros_like(sample.counts)
    with pytest.raises(ConfigError, match="samples with answers"):
        sensitivities(decoder, samples)
    for sample in samples:
        sample.is_picture = torch.zeros_like(sample.is_picture)
    with pytest.raises(ConfigError, match="no calibration sample has a picture"):
        sensitivities(decoder, samples)

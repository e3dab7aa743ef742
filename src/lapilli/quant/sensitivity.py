"""How much the loss feels positions of text and of features, by their gradients: MBQ's weights.

    sample --layers, their inputs kept--> loss --layers once more, backwards--> |gradient|

One layer is in float32 at a time. Source: Li et al. 2025, MBQ (arXiv 2412.19509), section 3.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

from lapilli.errors import ConfigError
from lapilli.kernels.layer import rms_norm
from lapilli.lm.decoder import Decoder, DecoderLayer
from lapilli.quant.activations import (
    ATTENTION,
    MLP,
    Sample,
    check_finite,
    float_copy,
    run_layer,
)
from lapilli.shapes import Float, Tensor

KEPT_BYTES = 1 << 30
"""Inputs of layers that are kept for the way back: so many samples go together."""

Weights = dict[str, tuple[float, float]]
"""Of attention and MLP: the mean gradient at positions of text, and at those of features."""


def sensitivities(
    decoder: Decoder,
    samples: Sequence[Sample],
    *,
    done: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[Weights]:
    """Return the mean |gradient| of the updates of every layer's attention and MLP.

    Args:
        decoder: as its files have it.
        samples: before the first layer; they are left as they are.
        done: told how many samples of how many.

    Raises:
        ConfigError: no sample has a position of features, or none that the loss counts.
    """
    if not any(bool(sample.is_picture.any()) for sample in samples):
        raise ConfigError(
            "mbq weighs text against pictures, and no calibration sample has a picture: give "
            "samples with pictures, or choose awq"
        )
    if not any(bool(sample.counts[1:].any()) for sample in samples):
        raise ConfigError("mbq needs calibration samples with answers: no position counts")
    num_layers = len(decoder.model.layers)
    totals = torch.zeros(num_layers, 2, 2, dtype=torch.float64)  # layer, part, kind
    counts = torch.zeros(2, dtype=torch.float64)
    finished = 0
    for part in _parts(samples, num_layers):
        for sample in part:
            counts += torch.tensor([(~sample.is_picture).sum(), sample.is_picture.sum()])
        totals += _gradients(decoder, part, finished)
        finished += len(part)
        done(finished, len(samples))
    if not bool(torch.isfinite(totals).all()):
        raise ConfigError(
            "the gradients of the calibration samples are NaN or infinite: the weights are damaged"
        )
    means = (totals / counts.clamp(min=1)).tolist()
    return [{ATTENTION: tuple(one[0]), MLP: tuple(one[1])} for one in means]


def _parts(samples: Sequence[Sample], num_layers: int) -> Iterator[Sequence[Sample]]:
    """Yield runs of samples whose kept inputs fit into memory."""
    size = max(sample.hidden.nbytes for sample in samples) * num_layers
    at_once = max(1, KEPT_BYTES // size)
    for first in range(0, len(samples), at_once):
        yield samples[first : first + at_once]


def _gradients(decoder: Decoder, samples: Sequence[Sample], first: int) -> Float[Tensor, "L 2 2"]:
    """Return the sums of mean |gradient| over positions of text and of features.

    `first` is the number of the first sample among all.
    """
    num_layers = len(decoder.model.layers)
    device = samples[0].hidden.device
    kept: list[list[Tensor]] = []
    hidden = [sample.hidden for sample in samples]
    with torch.no_grad():
        for index in range(num_layers):
            layer = float_copy(decoder.layer(index), device)
            kept.append(hidden)
            hidden = [run_layer(decoder, index, layer, x) for x in hidden]
            for number, x in enumerate(hidden, start=first):
                check_finite(x, index, number)
    pairs = zip(hidden, samples, strict=True)
    gradients = [_of_loss(decoder, x, sample) for x, sample in pairs]
    found = torch.zeros(num_layers, 2, 2, dtype=torch.float64)
    for index in reversed(range(num_layers)):
        layer = float_copy(decoder.layer(index), device)
        for number, x in enumerate(kept.pop()):
            gradients[number], updates = _backwards(decoder, index, layer, x, gradients[number])
            is_picture = samples[number].is_picture
            for part, gradient in enumerate(updates):
                size = gradient[0].abs().mean(dim=-1)
                found[index, part, 0] += float(size[~is_picture].sum())
                found[index, part, 1] += float(size[is_picture].sum())
    return found


def _of_loss(decoder: Decoder, hidden: Tensor, sample: Sample) -> Tensor:
    """Return the gradient of the mean loss of a sample's counted tokens at its last states."""
    x = hidden.detach().requires_grad_()
    counts = sample.counts[1:]
    if not bool(counts.any()):
        return torch.zeros_like(hidden)
    norm = decoder.model.norm
    last = rms_norm(x, norm.weight.float(), norm.eps, norm.offset)[0, :-1][counts]
    is_tied = decoder.config.tie_embeddings
    head = decoder.model.embed_tokens.weight if is_tied else decoder.lm_head.weight
    scores = functional.linear(last, head.to(x))
    cap = decoder.config.logit_softcap
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    loss = functional.cross_entropy(scores, sample.ids[1:][counts])
    return torch.autograd.grad(loss, x)[0]


def _backwards(
    decoder: Decoder, index: int, layer: DecoderLayer, x: Tensor, gradient: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the gradients of a layer's input, and of the updates of attention and MLP."""
    updates: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[object, object, Tensor], None]:
        return lambda _module, _given, out: updates.__setitem__(name, out)

    names = (ATTENTION, MLP)
    handles = [layer.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    x = x.detach().requires_grad_()
    try:
        out = run_layer(decoder, index, layer, x)
    finally:
        for handle in handles:
            handle.remove()
    before, attention, mlp = torch.autograd.grad(
        out, (x, updates[ATTENTION], updates[MLP]), grad_outputs=gradient
    )
    return before, (attention, mlp)

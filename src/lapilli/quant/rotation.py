"""Rotations folded into weights: they spread outlier channels over all others, at no cost later.

    R1    hidden states x of the residual stream become x R: embeddings, projectors and the layers
          that write to the stream are rotated, those that read it are rotated back
    R2    values of attention v become v Q, head by head: o_proj takes them rotated

A norm commutes with R only without its gain, so gains go into the layers behind the norms first.
Q and R are products of Hadamard and Hartley matrices, whose entries are about equally large, with
random signs before: a channel of any size is spread over all of them.

Source: Ashkboos et al. 2024 (QuaRot, arXiv 2404.00456) section 4; Liu et al. 2024 (SpinQuant,
    arXiv 2405.16406) section 3, names R1 and R2.
Note: QuaRot has rotations at run time too, inside of the MLP and of attention; these are left out.
    Widths that are no power of two take known Hadamard matrices there, a Hartley transform here.
"""

from collections.abc import Callable
from math import pi

import torch
from torch import nn

from lapilli.errors import ConfigError
from lapilli.lm import Decoder
from lapilli.lm.decoder import DecoderLayer
from lapilli.model import VisionLanguageModel
from lapilli.nn.layers import RMSNorm
from lapilli.quant.linear import QuantLinear
from lapilli.shapes import Float, Tensor

_FACTOR = 6  # a Hadamard matrix of 2^k is a product of ones of at most 2^6 = 64 rows
_ROWS = 256  # of a weight, rotated at once: they stay in the cache


class Flat:
    """An orthogonal matrix of a width, of about equally large entries, applied without making it.

    Args:
        width: 2^k m with m odd: a Hadamard matrix of 2^k, Kronecker a discrete Hartley transform of
            m, behind a diagonal of signs.
        seed: of the signs.
    """

    def __init__(self, width: int, seed: int) -> None:
        odd = width
        powers = 0
        while odd % 2 == 0:
            odd, powers = odd // 2, powers + 1
        sizes = [min(_FACTOR, powers - done) for done in range(0, powers, _FACTOR)]
        self.factors = [_hadamard(size) for size in sizes]
        if odd > 1:
            self.factors.append(_hartley(odd))
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1

    def __call__(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return x times the matrix, in float32."""
        y = x.float() * self.signs.to(x.device)
        after = y.shape[-1]
        for factor in self.factors:  # each one along an axis of its own
            size = len(factor)
            after //= size
            matrix = factor.to(x.device)  # symmetric
            y = y.reshape(-1, size) @ matrix if after == 1 else matrix @ y.reshape(-1, size, after)
        return y.reshape(x.shape)


def _hadamard(power: int) -> Float[Tensor, "n n"]:
    """Return Sylvester's matrix of 2^power rows, made orthogonal."""
    matrix: Tensor = torch.ones(1, 1)
    for _ in range(power):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.mul(matrix, len(matrix) ** -0.5)


def _hartley(size: int) -> Float[Tensor, "n n"]:
    """Return the discrete Hartley transform, cos + sin of 2 pi j k / n over the root of n."""
    index = torch.arange(size, dtype=torch.float64)
    angles = 2 * pi / size * (torch.outer(index, index) % size)
    found: Tensor = (angles.cos() + angles.sin()) / size**0.5
    return found.float()


def check_rotation(model: VisionLanguageModel) -> None:
    """Check that the rotations can be folded into the weights of a model.

    Raises:
        ConfigError: another decoder, norms behind attention and MLP, logits that are made of the
            embedding, a modality that does not end in linear layers, adapters, or packed layers.
    """
    decoder = _decoder(model)
    if decoder.config.post_norms:
        raise ConfigError(
            f"{decoder.config.family} models cannot be rotated: the gains of the norms behind "
            "attention and MLP belong to single channels and fold into no layer"
        )
    if decoder.cross_attention:
        raise ConfigError(
            "a model with gated cross-attention cannot be rotated: its blocks read the hidden "
            "states that would be rotated"
        )
    if decoder.config.tie_embeddings:
        raise ConfigError(
            "the logits are made of the embedding, and a rotation changes the two differently: "
            "give them a layer of their own first (Decoder.untie)"
        )
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ConfigError("the model is quantized already: rotate it before")
    if any(name.endswith(".lora_A.weight") for name, _ in model.named_parameters()):
        raise ConfigError("the model has an unmerged adapter: lapilli.lora.merge(model) first")
    for name, modality in model.modalities.items():
        if not _output_layers(modality):
            raise ConfigError(
                f"the modality {name!r} cannot be rotated: its features do not come from a linear "
                "layer of a projector (output_layers)"
            )


def _decoder(model: VisionLanguageModel) -> Decoder:
    decoder = model.language_model
    if not isinstance(decoder, Decoder):
        raise ConfigError(
            f"{decoder.config.family} models cannot be rotated: only decoders with RMS norms can"
        )
    return decoder


def _output_layers(modality: nn.Module) -> list[nn.Linear]:
    found = getattr(modality, "output_layers", None)
    return [] if found is None else list(found())


class Rotation:
    """The rotations of one model, folded into its ends and into its layers, each of them once.

    Parameters are replaced, never written to: they may be views of files. Computed in float32 and
    stored in the dtype that they have.

    Args:
        model: unquantized.
        seed: of the random signs.

    Raises:
        ConfigError: see `check_rotation`.
    """

    def __init__(self, model: VisionLanguageModel, seed: int = 0) -> None:
        check_rotation(model)
        config = _decoder(model).config
        self._stream = Flat(config.hidden_size, seed)
        self._head = Flat(config.head_dim, seed + 1)
        self._head_dim = config.head_dim

    def ends(self, model: VisionLanguageModel) -> None:
        """Rotate embeddings, projectors and the output layer, with the gain of the last norm."""
        decoder = _decoder(model)
        _replace(decoder.model.embed_tokens, "weight", self._stream)
        for modality in model.modalities.values():
            for layer in _output_layers(modality):
                self._write(layer)
            if getattr(modality, "image_newline", None) is not None:
                _replace(modality, "image_newline", self._stream)
        self._read(decoder.model.norm, decoder.lm_head)

    def layer(self, layer: DecoderLayer) -> None:
        """Rotate one layer; the gains of its two norms go into the layers behind them."""
        attention, mlp = layer.self_attn, layer.mlp
        self._read(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        self._read(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        _by_column(attention.v_proj, self._by_head)
        _replace(attention.o_proj, "weight", self._by_head)
        self._write(attention.o_proj)
        self._write(mlp.down_proj)

    def _by_head(self, x: Float[Tensor, "n heads"]) -> Float[Tensor, "n heads"]:
        """Return rows of all heads, one after the other, with each head rotated alike.

        As every head has the same rotation, it does not matter which query heads share values.
        """
        return self._head(x.reshape(-1, self._head_dim)).reshape(x.shape)

    def _read(self, norm: RMSNorm, *layers: nn.Linear) -> None:
        """Make layers read rotated vectors, and give them the gain of the norm before them."""
        gain = norm.weight.detach().float() + norm.offset
        for layer in layers:
            _replace(layer, "weight", lambda rows: self._stream(rows * gain))
        neutral = torch.full_like(norm.weight, 1.0 - norm.offset)
        norm.weight = nn.Parameter(neutral, norm.weight.requires_grad)

    def _write(self, layer: nn.Linear) -> None:
        """Make a layer write rotated vectors."""
        _by_column(layer, self._stream)


Rows = Callable[[Tensor], Tensor]


def _replace(module: nn.Module, name: str, rotate: Rows) -> None:
    """Put the rotated rows of a parameter in its place."""
    old = module.get_parameter(name)
    new = torch.empty_like(old, memory_format=torch.contiguous_format)
    rows, target = old.detach().reshape(-1, old.shape[-1]), new.view(-1, old.shape[-1])
    for start in range(0, len(rows), _ROWS):
        target[start : start + _ROWS] = rotate(rows[start : start + _ROWS].float())
    setattr(module, name, nn.Parameter(new, old.requires_grad))


def _by_column(layer: nn.Linear, rotate: Rows) -> None:
    """Rotate the outputs of a layer: the columns of its weight, and its bias."""
    old = layer.weight
    new = torch.empty_like(old, memory_format=torch.contiguous_format)
    for start in range(0, old.shape[1], _ROWS):
        columns = old.detach()[:, start : start + _ROWS]
        new[:, start : start + _ROWS] = rotate(columns.float().t().contiguous()).t()
    layer.weight = nn.Parameter(new, old.requires_grad)
    if layer.bias is not None:
        _replace(layer, "bias", rotate)

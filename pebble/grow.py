"""A larger language model and projector that begin as a smaller one's function.

wider    every channel stands there w times: x -> [x, x]. A matrix that reads copies has w blocks
         of columns, which sum to the smaller matrix: W / 2 + N and W / 2 - N, with noise N.
deeper   layers 0, 1, .. become 0, 0', 1, 1', ..: the primed one is a copy that adds nothing yet,
         o_proj and down_proj being zero.

Copies get equal inputs, so the noise N cancels whatever its size. A norm sees the mean square that
it saw before, and a copied head looks where its first one looks: the function is the same. But
activations would take up half of the room, and only training would fill the rest, slowly. So a
smaller noise that does not cancel can be added, as `spread`: copies part at once, and what little
the answers lose by it is learned again.

Source: Chen et al. 2016 (Net2Net, arXiv 1511.05641), section 2; Chen et al. 2022 (bert2BERT, arXiv
2110.07143), section 3; Wu et al. 2024 (LLaMA Pro, arXiv 2401.02415), section 3.2.
"""

from dataclasses import dataclass, fields, replace
from typing import Final, cast

import torch
from torch import nn

from lapilli.config.model import DecoderConfig
from lapilli.errors import ConfigError
from lapilli.lm.decoder import Decoder
from lapilli.shapes import Float, Tensor

# Against the blocks W / w. A matrix then varies about like a fresh one of its own width.
NOISE: Final = 1.0
SPREAD: Final = 0.5
_ENDS: Final = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # of the residual branches


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Fields of DecoderConfig in which a language model grows: all others stay."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    num_layers: int


_FIELDS: Final = tuple(field.name for field in fields(Sizes))


def check_growth(small: DecoderConfig, large: DecoderConfig) -> None:
    """Check that a language model can grow into another.

    Raises:
        ConfigError: the widths are not all multiplied by one whole number, the layers not by a
            whole number, something else differs, or the smaller one is of another kind.
    """
    times = large.hidden_size // small.hidden_size
    sizes = {name: getattr(large, name) for name in _FIELDS}
    for name, size in sizes.items():
        if name != "num_layers" and size != times * getattr(small, name):
            raise ConfigError(
                f"model.text.{name} is {size} where {getattr(small, name)} grows: "
                f"expected {max(times, 1)} times as much, as model.text.hidden_size has"
            )
    if large.num_layers < 1 or large.num_layers % small.num_layers:
        raise ConfigError(
            f"model.text.num_layers is {large.num_layers}: expected a multiple of the "
            f"{small.num_layers} that grow"
        )
    if small.tie_embeddings or small.qk_norm:
        raise ConfigError(
            "a language model grows that has a head of its own and no norm of queries and keys, as "
            f"pebble; found {small}"
        )
    expected = replace(small, **sizes)
    if expected != large:
        raise ConfigError(
            f"a language model grows in {', '.join(_FIELDS)} alone; "
            f"found {large}, expected {expected}"
        )


def grow_language_model(
    small: Decoder, config: DecoderConfig, seed: int, *, noise: float = NOISE, spread: float = 0.0
) -> Decoder:
    """Return a language model of these sizes with the smaller one's logits.

    Args:
        small: what grows.
        config: sizes of the larger one.
        seed: of the noise.
        noise: its standard deviation against that of the blocks of columns that it is added to.
        spread: the same of noise that does not cancel.

    Raises:
        ConfigError: see `check_growth`.
    """
    check_growth(small.config, config)
    times = config.hidden_size // small.config.hidden_size
    each = config.num_layers // small.config.num_layers
    widen = _Widening(noise, spread, torch.Generator().manual_seed(seed))
    grown, found = Decoder(config), small.state_dict()
    with torch.no_grad():
        for name, value in grown.state_dict().items():
            source, is_added = _source(name, each)
            if is_added and source.endswith(_ENDS):
                value.zero_()
            elif source.endswith("embed_tokens.weight"):  # what it holds are outputs
                value.copy_(widen(found[source].T, times, 1).T)
            elif value.ndim == 1:
                value.copy_(found[source].repeat(times))
            else:
                rows = value.shape[0] // found[source].shape[0]  # 1 of the head's tokens
                value.copy_(widen(found[source], rows, times))
    return grown


def grow_projector(
    small: nn.Sequential,
    large: nn.Sequential,
    seed: int,
    *,
    noise: float = NOISE,
    spread: float = 0.0,
) -> None:
    """Give a projector of more channels the smaller one's function, each channel several times.

    Args:
        small: linear, GELU, linear.
        large: the same with a whole multiple of its hidden and output channels; set in place.
        seed: of the noise.
        noise: see `grow_language_model`.
        spread: see there too.
    """
    widen = _Widening(noise, spread, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for before, after in zip(small, large, strict=True):
            if not isinstance(before, nn.Linear):
                continue
            after = cast(nn.Linear, after)
            rows = after.out_features // before.out_features
            columns = after.in_features // before.in_features
            after.weight.copy_(widen(before.weight, rows, columns))
            after.bias.copy_(before.bias.repeat(rows))


def _source(name: str, each: int) -> tuple[str, bool]:
    """Return the name in the smaller model, and whether its layer was there already."""
    head, layers, rest = name.partition("model.layers.")
    if not layers:
        return name, False
    number, _, inner = rest.partition(".")
    return f"{head}{layers}{int(number) // each}.{inner}", int(number) % each > 0


@dataclass(frozen=True, slots=True)
class _Widening:
    """Matrices that make copies of the outputs from copies of the inputs."""

    noise: float
    spread: float
    generator: torch.Generator

    def __call__(self, weight: Float[Tensor, "O I"], rows: int, columns: int) -> Tensor:
        """Return the matrix of `rows` and `columns` copies, [rows O, columns I]."""
        shape = (rows * weight.shape[0], columns, weight.shape[1])
        blocks: Tensor = weight.repeat(rows, columns).view(shape) / columns
        deviation = float(weight.std()) / columns
        if columns > 1:
            drawn = torch.randn(blocks.shape, generator=self.generator)
            # Less their mean they sum to nothing; the factor gives back the variance it takes.
            drawn = (drawn - drawn.mean(1, keepdim=True)) * (columns / (columns - 1)) ** 0.5
            blocks = blocks + self.noise * deviation * drawn
        if rows * columns > 1:
            drawn = torch.randn(blocks.shape, generator=self.generator)
            blocks = blocks + self.spread * deviation * drawn
        return blocks.flatten(1)

"""Projectors: from the width of an encoder's features to that of the language model.

    linear, mlp, identity    [.., E] -> [.., D]        every feature by itself
    pooled mlp               [N, P, E] -> [N, P / k^2, D]
    resampler                [N, P, E] -> [N, m, D]    learned queries that attend to the features

Where features are joined, [n P, E] (the tiles of a picture one after the other) is taken too.
"""

from math import gcd
from typing import Literal

import torch
from torch import nn

from lapilli.config.model import ProjectorConfig, VisionConfig
from lapilli.config.projector import RESAMPLER_EXPANSION, tile_features
from lapilli.errors import ConfigError, FusionError
from lapilli.geometry import Grid
from lapilli.nn.attention import attend_all
from lapilli.nn.layers import MLP, build_activation
from lapilli.shapes import Float, Tensor

_HEAD_WIDTH = 64


def as_tiles(features: Float[Tensor, "*n E"], positions: int) -> Float[Tensor, "N P E"]:
    """Return features tile by tile: [N, P, E] as it is, [N P, E] cut.

    Raises:
        FusionError: not a whole number of tiles.
    """
    length = features.shape[-2]
    if features.ndim == 3 and length == positions:
        return features
    if features.ndim != 2 or length % positions or not length:
        raise FusionError(
            f"the projector joins the {positions} features of a tile, got features of shape "
            f"{list(features.shape)}: expected [tiles, {positions}, width], or [n, width] with n a "
            f"multiple of {positions}"
        )
    return features.reshape(-1, positions, features.shape[-1])


class ResamplerLayer(nn.Module):
    """Attention of queries to the features and to each other, then an mlp, each after its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // gcd(width, _HEAD_WIDTH)
        self.query_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, RESAMPLER_EXPANSION * width, activation="gelu")

    def forward(
        self, queries: Float[Tensor, "N m D"], features: Float[Tensor, "N P D"]
    ) -> Float[Tensor, "N m D"]:
        """Return the queries after this layer."""
        asking = self.query_norm(queries)
        seen = torch.cat((self.feature_norm(features), asking), dim=1)
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.q_proj(asking), self.k_proj(seen), self.v_proj(seen))
        )
        queries = queries + self.o_proj(attend_all(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = queries + self.mlp(self.mlp_norm(queries))
        return out


class Resampler(nn.Module):
    """A projector of m learned queries that attend to the features of a tile, however many.

    Args:
        config: `num_queries` positions come out of `depth` layers.
        positions: features of a tile, so that several tiles in one row can be told apart; None:
            what is given as [n, E] is one item.

    Source: Alayrac et al. 2022 (Flamingo), section 3.1 and its appendix: keys and values of the
        features and of the queries, no positions of their own on the features (a tower's features
        carry theirs). Ning et al. 2024 (User-LLM): the same layers between an encoder of events
        and a language model.
    Note: heads are 64 wide, or the largest divisor of the width that 64 has too.
    """

    def __init__(self, config: ProjectorConfig, *, positions: int | None = None) -> None:
        super().__init__()
        width = config.hidden_size
        self.positions = positions
        self.input_proj = nn.Linear(config.vision_size, width)
        self.queries = nn.Parameter(torch.randn(config.num_queries, width) * width**-0.5)
        self.layers = nn.ModuleList(ResamplerLayer(width) for _ in range(config.depth))
        self.output_norm = nn.LayerNorm(width)
        self.output_proj = nn.Linear(width, width)

    def forward(self, features: Float[Tensor, "*n E"]) -> Float[Tensor, "*m D"]:
        """Return num_queries features of every tile: [N, P, E] -> [N, m, D], [n, E] -> [.., D].

        Raises:
            FusionError: no whole number of tiles.
        """
        tiles = features if features.ndim > 2 else as_tiles(features, self._length(features))
        seen = self.input_proj(tiles)
        x = self.queries.expand(len(tiles), -1, -1)
        for layer in self.layers:
            x = layer(x, seen)
        out: Tensor = self.output_proj(self.output_norm(x))
        return out if features.ndim > 2 else out.flatten(0, 1)

    def _length(self, features: Tensor) -> int:
        return self.positions or len(features)


def average_neighbours(
    features: Float[Tensor, "N P E"], grid: Grid, side: int
) -> Float[Tensor, "N P2 E"]:
    """Return the mean of every square of side x side neighbours of a grid that lies row by row."""
    rows, columns = grid.rows // side, grid.columns // side
    number, _, width = features.shape
    squares = features.reshape(number, rows, side, columns, side, width)
    return squares.mean(dim=(2, 4)).flatten(1, 2)


class PooledMLP(nn.Sequential):
    """An mlp with the mean of neighbours before or after it; parameters named as without.

    Weights of an mlp fit as they are. Before costs 1 / side^2 of the work; after leaves means of
    what the mlp has made of each feature, which is what a language model has learnt to read.
    """

    def __init__(
        self, *layers: nn.Module, grid: Grid, side: int, at: Literal["input", "output"]
    ) -> None:
        super().__init__(*layers)
        self.grid, self.side, self.at = grid, side, at

    def forward(self, features: Float[Tensor, "*n E"]) -> Float[Tensor, "*m D"]:
        """Return fewer and wider features.

        Raises:
            FusionError: no whole number of tiles.
        """
        x = as_tiles(features, self.grid.rows * self.grid.columns)
        if self.at == "input":
            x = average_neighbours(x, self.grid, self.side)
        for layer in self:
            x = layer(x)
        if self.at == "output":
            x = average_neighbours(x, self.grid, self.side)
        return x if features.ndim > 2 else x.flatten(0, 1)


def build_projector(config: ProjectorConfig, vision: VisionConfig | None = None) -> nn.Module:
    """Build the module; parameters `weight` for linear, `0.weight`, `2.weight`, ... for mlp.

    Args:
        config: kind and widths.
        vision: the tower that the features come from; only what joins neighbours needs it, and a
            resampler then takes tiles that lie one after the other.

    Source: LLaVA multimodal_projector/builder.py (linear, mlpNx_gelu with the exact GELU,
        identity).

    Raises:
        ConfigError: an unknown kind, an identity between different widths, or neighbours that no
            tower puts side by side.
    """
    first, width = config.vision_size, config.hidden_size
    if config.kind == "linear":
        return nn.Linear(first, width, bias=config.bias)
    if config.kind == "identity":
        if first != width:
            raise ConfigError(
                f"an identity projector cannot turn features of width {first} into {width}: "
                "use linear or mlpNx_gelu"
            )
        return nn.Identity()
    if config.kind == "resampler":
        return Resampler(config, positions=vision.num_patches if vision else None)
    if config.kind != "mlp":
        raise ConfigError(
            f"projector kind {config.kind!r} is unknown: linear, mlp, identity, resampler"
        )
    layers: list[nn.Module] = [nn.Linear(first, width, bias=config.bias)]
    for _ in range(1, config.depth):
        layers += [
            build_activation(config.activation),
            nn.Linear(width, width, bias=config.bias),
        ]
    if config.pool == 1:
        return nn.Sequential(*layers)
    if vision is None:
        raise ConfigError(
            f"a projector that averages {config.pool}x{config.pool} neighbours needs features that "
            "lie on a tower's grid: use a resampler for other vectors"
        )
    tile_features(vision, config)  # refuses a grid that cannot be divided
    return PooledMLP(*layers, grid=vision.grid, side=config.pool, at=config.pool_at)


def output_layers(projector: nn.Module) -> list[nn.Linear]:
    """Return the linear layers that write a projector's output; none where no layer does.

    What is behind them are means of neighbours, if anything.
    """
    last = projector
    if isinstance(projector, Resampler):
        last = projector.output_proj
    elif isinstance(projector, nn.Sequential):
        last = projector[-1]
    return [last] if isinstance(last, nn.Linear) else []

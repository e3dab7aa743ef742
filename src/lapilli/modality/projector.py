"""From an encoder's width to the language model's; knows configurations, no features' origin.

    linear, mlp, identity    [.., E] -> [.., D]       every feature for itself
    pooled mlp               [N, P, E] -> [N, P / k^2, D]
    resampler                [N, P, E] -> [N, m, D]    projector_resample.py

Where features are joined, [n P, E] (the tiles of a picture one after the other) is taken too.
"""

from typing import Literal

from torch import nn

from lapilli.config.model import ProjectorConfig, VisionConfig
from lapilli.config.projector import tile_features
from lapilli.errors import ConfigError
from lapilli.geometry import Grid
from lapilli.modality.projector_resample import Resampler, as_tiles
from lapilli.nn.activation import build_activation
from lapilli.shapes import Float, Tensor


def average_neighbours(
    features: Float[Tensor, "N P E"], grid: Grid, side: int
) -> Float[Tensor, "N P2 E"]:
    """The mean of every square of side x side neighbours of a grid that lies row by row."""
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
        """Fewer and wider features.

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
    """The module; parameters `weight` for linear, `0.weight`, `2.weight`, ... for mlp.

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

"""Names of projectors in config.json, and the features that each leaves of a tile; no torch.

    mlp2x_gelu               as the original: every feature becomes one position
    pool2x2_mlp2x_gelu       the mean of 2x2 neighbours, then the mlp: a quarter of the positions
    mlp2x_gelu_pool2x2       the mlp, then the mean
    resampler144             144 learned queries look at all features of a tile
    resampler144x2           the same with two layers

The names after the first are ours: the original's loader refuses them ("Unknown projector type")
instead of running the tower's features through the wrong projector.
"""

import re
from dataclasses import dataclass

from lapilli.config.model import ProjectorConfig, VisionConfig
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.geometry import Grid

RESAMPLER_EXPANSION = 4
"""Width of the mlp of a resampler's layer, in widths of its queries."""
KINDS = (
    "linear, mlpNx_gelu, identity, poolKxK_mlpNx_gelu, mlpNx_gelu_poolKxK, resamplerM, resamplerMxN"
)
_MLP = re.compile(
    r"(?:pool(?P<before>[1-9]\d{0,4})x(?P=before)_)?"
    r"mlp(?P<depth>[1-9]\d{0,4})x_gelu"
    r"(?:_pool(?P<after>[1-9]\d{0,4})x(?P=after))?"
)
_RESAMPLER = re.compile(r"resampler(?P<queries>[1-9]\d{0,4})(?:x(?P<depth>[1-9]\d{0,4}))?")


@dataclass(frozen=True, slots=True)
class TileFeatures:
    """Features of one tile as the language model gets them.

    Attributes:
        side: of the tile in pixels.
        grid: their rows and columns; None where they do not lie on a grid.
        reason: why they do not.
    """

    side: int
    number: int
    grid: Grid | None
    reason: str = ""


def tile_features(vision: VisionConfig, projector: ProjectorConfig | None = None) -> TileFeatures:
    """Return the number of features of one tile, behind the projector where one is given.

    Raises:
        ConfigError: the projector cannot pool what the tower leaves.
    """
    grid: Grid | None = vision.grid
    reason = ""
    if vision.num_patches != vision.grid.rows * vision.grid.columns:
        grid = None
        reason = (
            f"{vision.feature_select!r} keeps the class token ({vision.num_patches} features of "
            f"{vision.grid.rows}x{vision.grid.columns} patches)"
        )
    if projector is None or not projector.joins:
        return TileFeatures(vision.image_size, vision.num_patches, grid, reason)
    if projector.kind == "resampler":
        reason = f"a resampler's {projector.num_queries} features have no place in the picture"
        return TileFeatures(vision.image_size, projector.num_queries, None, reason)
    side = projector.pool
    if grid is None:
        raise ConfigError(f"a projector cannot average {side}x{side} neighbours: {reason}")
    if grid.rows % side or grid.columns % side:
        raise ConfigError(
            f"a projector cannot average {side}x{side} neighbours of {grid.rows}x{grid.columns} "
            f"patches: {side} must divide both"
        )
    pooled = Grid(grid.rows // side, grid.columns // side)
    return TileFeatures(vision.image_size, pooled.rows * pooled.columns, pooled)


def parse_projector(name: str, *, vision_size: int, hidden_size: int) -> ProjectorConfig:
    """Return the projector that `mm_projector_type` names.

    Raises:
        ConfigError: an identity between different widths.
        UnsupportedModelError: a name that is none of these.
    """
    if name in ("linear", "identity"):
        if name == "identity" and vision_size != hidden_size:
            raise ConfigError(
                f"config.json: mm_projector_type is 'identity', but the tower has width "
                f"{vision_size} and the language model {hidden_size}"
            )
        return ProjectorConfig(
            kind="linear" if name == "linear" else "identity",
            vision_size=vision_size,
            hidden_size=hidden_size,
            depth=int(name == "linear"),
        )
    if found := _MLP.fullmatch(name):
        before, after = int(found["before"] or 1), int(found["after"] or 1)
        if before == 1 or after == 1:
            return ProjectorConfig(
                kind="mlp",
                vision_size=vision_size,
                hidden_size=hidden_size,
                depth=int(found["depth"]),
                pool=before * after,
                pool_at="output" if after > 1 else "input",
            )
    if found := _RESAMPLER.fullmatch(name):
        return ProjectorConfig(
            kind="resampler",
            vision_size=vision_size,
            hidden_size=hidden_size,
            depth=int(found["depth"] or 1),
            num_queries=int(found["queries"]),
        )
    raise UnsupportedModelError(
        f"config.json: mm_projector_type {name!r} is not supported, choose from {KINDS}"
    )


def projector_name(projector: ProjectorConfig) -> str:
    """Return `mm_projector_type` of a projector; the way back of `parse_projector`.

    Raises:
        UnsupportedModelError: without bias or with another activation than the original's.
    """
    if projector.kind == "resampler":
        layers = f"x{projector.depth}" if projector.depth > 1 else ""
        return f"resampler{projector.num_queries}{layers}"
    if projector.kind != "mlp":
        return projector.kind
    if not projector.bias or projector.activation != "gelu":
        raise UnsupportedModelError(
            "the original layout has no projector without bias or with another activation than gelu"
        )
    name, pool = f"mlp{projector.depth}x_gelu", f"pool{projector.pool}x{projector.pool}"
    if projector.pool == 1:
        return name
    return f"{pool}_{name}" if projector.pool_at == "input" else f"{name}_{pool}"

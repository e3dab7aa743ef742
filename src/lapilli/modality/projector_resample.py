"""Any number of features as a fixed number: learned queries that look at them.

    features [N, P, E] --linear--> [N, P, D] --.
    queries  [m, D] ------> layers of cross-attention, mlp ------> norm, linear ------> [N, m, D]

Knows no tower and no language model.
"""

from math import gcd

import torch
from torch import nn

from lapilli.config.model import ProjectorConfig
from lapilli.config.operations import RESAMPLER_EXPANSION
from lapilli.errors import FusionError
from lapilli.nn.attention import attend_all
from lapilli.nn.mlp import MLP
from lapilli.shapes import Float, Tensor

_HEAD_WIDTH = 64


def as_tiles(features: Float[Tensor, "*n E"], positions: int) -> Float[Tensor, "N P E"]:
    """Features tile by tile: [N, P, E] as it is, [N P, E] cut.

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
    """Queries look at the features and at each other, then an mlp; each with its norm before."""

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
        """The queries after this layer."""
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
    """m learned queries read the features of a tile, whatever their number.

    Args:
        config: `num_queries` positions come out, `depth` layers look.
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
        """num_queries features of every tile: [N, P, E] -> [N, m, D], [n, E] -> [.., D].

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

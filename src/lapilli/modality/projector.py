"""From an encoder's width to the language model's; knows neither of the two."""

from torch import nn

from lapilli.config.model import ProjectorConfig
from lapilli.errors import ConfigError
from lapilli.nn.activation import build_activation


def build_projector(config: ProjectorConfig) -> nn.Module:
    """The module; parameters `weight` for linear, `0.weight`, `2.weight`, ... for mlp, none else.

    Source: LLaVA multimodal_projector/builder.py (linear, mlpNx_gelu with the exact GELU,
    identity).

    Raises:
        ConfigError: an unknown kind, or an identity between different widths.
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
    if config.kind != "mlp":
        raise ConfigError(f"projector kind {config.kind!r} is unknown: linear, mlp, identity")
    layers: list[nn.Module] = [nn.Linear(first, width, bias=config.bias)]
    for _ in range(1, config.depth):
        layers += [
            build_activation(config.activation),
            nn.Linear(width, width, bias=config.bias),
        ]
    return nn.Sequential(*layers)

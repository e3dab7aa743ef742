"""Configuration of quantization."""

from dataclasses import dataclass

from lapilli.errors import ConfigError
from lapilli.kernels.packing import BITS, GROUPS

MODES = ("dynamic", "weight_only")
# The group size of each number of bits where none is asked for. Finer activations at 8 bits cost
# nothing for one token; none of 500 answers of pebble changed.
GROUP_SIZES = {8: 32, 4: 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """The way in which the linear layers of a model are stored and computed.

    Attributes:
        bits: 8: one scale per output channel; 4: one scale per group of inputs.
        group_size: 32, 64 or 128 inputs that share a scale: of the weights at 4 bits, of the
            activations that are rounded on the fly at both. 0 stands for 32 at 8 bits and 128 at 4.
        symmetric: 4 bits without zero points.
        mode: "dynamic" rounds activations to 8 bits by token and group, so that products are
            integers; "weight_only" keeps them in float32.
        head_bits: bits of the layer that gives the logits, which are the most sensitive; None: it
            stays float. A model with tied embeddings has no such layer: its table stays float.
        quantize_tower: the vision tower and the projector too, in 8 bits.
        search: at 4 bits, look for the scale with the least squared error instead of the one that
            just covers the largest weight.

    Raises:
        ConfigError: a number that there are no kernels for.
    """

    bits: int = 4
    group_size: int = 0
    symmetric: bool = True
    mode: str = "dynamic"
    head_bits: int | None = 8
    quantize_tower: bool = False
    search: bool = True

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("head_bits", self.head_bits)):
            if bits not in BITS and not (name == "head_bits" and bits is None):
                raise ConfigError(f"{name} must be 4 or 8, found {bits}")
        if self.group_size == 0:
            object.__setattr__(self, "group_size", GROUP_SIZES[self.bits])
        if self.group_size not in GROUPS:
            raise ConfigError(f"group_size must be 32, 64 or 128, found {self.group_size}")
        if self.mode not in MODES:
            raise ConfigError(f"mode must be dynamic or weight_only, found {self.mode!r}")


def describe(config: QuantConfig) -> str:
    """Return how weights are stored in the words of reports: bits, groups, zero points, mode."""
    zeros = "" if config.bits == 8 else ", symmetric" if config.symmetric else ", zero points"
    return f"{config.bits} bits, groups of {config.group_size}{zeros}, {config.mode}"


def quant_config(scheme: str | QuantConfig, *, quantize_tower: bool = False) -> QuantConfig:
    """Return the configuration that a name stands for.

    Raises:
        ConfigError: no scheme has this name.
    """
    if isinstance(scheme, QuantConfig):
        return scheme
    match scheme:
        case "int8":
            return QuantConfig(bits=8, quantize_tower=quantize_tower)
        case "int4":
            return QuantConfig(bits=4, quantize_tower=quantize_tower)
    raise ConfigError(f"quantize={scheme!r} is unknown: choose int8, int4 or a QuantConfig")

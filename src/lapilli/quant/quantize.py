"""The quantization pass: linear layers of a plain model replaced by packed ones."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lapilli.errors import ConfigError
from lapilli.kernels.packing import Packed
from lapilli.quant.config import QuantConfig
from lapilli.quant.linear import QuantLinear
from lapilli.quant.rounding import round4, round8
from lapilli.shapes import Tensor

LANGUAGE_MODEL = "language_model."
HEAD = ".lm_head"
SEEN = ("modalities.",)  # towers and projectors


@dataclass(frozen=True, slots=True)
class QuantReport:
    """The outcome of a quantization pass.

    Attributes:
        bits: of every replaced layer, by full path, in the order of the model.
        num_bytes: of the packed layers.
        num_bytes_before: of the same layers as they were.
        notes: what was asked for and could not be done, one sentence each.
    """

    bits: dict[str, int]
    num_bytes: int
    num_bytes_before: int
    notes: tuple[str, ...] = ()


def bits_of(path: str, config: QuantConfig) -> int | None:
    """Return the bits in which the linear layer of this path is stored; None: as it is."""
    if path.startswith(LANGUAGE_MODEL):
        if not path.endswith(HEAD):
            return config.bits
        return None if config.head_bits is None else max(config.head_bits, config.bits)
    if config.quantize_tower and path.startswith(SEEN):
        return 8
    return None


def notes_on(paths: Iterable[str], config: QuantConfig) -> tuple[str, ...]:
    """Return what `config` asks for and a model with linear layers of these paths cannot have."""
    has_head = any(path.startswith(LANGUAGE_MODEL) and path.endswith(HEAD) for path in paths)
    if has_head or config.head_bits is None:
        return ()
    return (
        "the logits stay float: the embeddings are tied, so the logits are made of the embedding "
        f"table, and head_bits {config.head_bits} changes nothing",
    )


def round_weight(weight: Tensor, bias: Tensor | None, bits: int, config: QuantConfig) -> Packed:
    """Return one weight, packed."""
    if bits == 8:
        return round8(weight, bias, config.group_size)
    return round4(weight, bias, config)


def quantize(model: nn.Module, config: QuantConfig) -> QuantReport:
    """Quantize the linear layers of `model` to 4 or 8 bits; the model is changed in place.

    The language model's layers, and with `quantize_tower` those of towers and projectors; norms
    and embeddings stay. Every parameter that is left is frozen: packed layers have no gradients.

    Args:
        model: a VisionLanguageModel without adapters.
        config: see QuantConfig.

    Raises:
        ConfigError: the model is quantized already, has adapters, or nothing in it is a target.
    """
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ConfigError("the model is quantized already: load it again to quantize it otherwise")
    if any(name.endswith(".lora_A.weight") for name, _ in model.named_parameters()):
        raise ConfigError("the model has an unmerged adapter: lapilli.lora.merge(model) first")
    done: dict[str, int] = {}
    after = before = 0
    # The modules are looked up by name one at a time: a list of them would keep every old weight.
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for path in paths:
        bits = bits_of(path, config)
        if bits is None:
            continue
        old = model.get_submodule(path)
        if not isinstance(old, nn.Linear):
            continue
        packed = round_weight(old.weight, old.bias, bits, config)
        layer = QuantLinear(packed, weight_only=config.mode == "weight_only")
        model.set_submodule(path, layer.train(old.training))
        done[path] = bits
        before += old.weight.nbytes
        after += packed.num_bytes
    if not done:
        raise ConfigError(f"no linear layer lies under {LANGUAGE_MODEL}: is this a whole model?")
    model.requires_grad_(False)
    return QuantReport(done, after, before, notes_on(paths, config))

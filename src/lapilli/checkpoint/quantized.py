"""Quantization on the side of the files: layers packed while they are read, packed files read back.

    Packing(model, config)                   every weight is rounded as it comes and let go
    Packing(model, config, stored=True)      the files hold packed layers: views, nothing computed

config.json names what the files hold:  "quantization_config": {"quant_method": "lapilli", ...}
"""

import math
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from lapilli.config.model import ModelConfig
from lapilli.config.reader import JsonObject, is_object
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.quant import QuantConfig
from lapilli.quant.choose import Choices
from lapilli.quant.embedding import StoredEmbedding
from lapilli.quant.linear import QuantLinear, empty_packed
from lapilli.quant.quantize import SEEN, bits_of, round_weight

KEY = "quantization_config"
METHOD = "lapilli"
LARGE = 500_000_000  # multiply-adds of a layer from which the number format of a tower counts
EMBEDDINGS = "language_model.model.embed_tokens"
OUTPUT = "language_model.lm_head"


def stored_quantization(raw: JsonObject) -> QuantConfig | None:
    """How the weights of a checkpoint are packed; None where they are not.

    Raises:
        UnsupportedModelError: packed by another library.
        ConfigError: packed in a way that this version does not know.
    """
    found = raw.get(KEY)
    if not is_object(found):
        return None
    method = found.get("quant_method")
    if method != METHOD:
        raise UnsupportedModelError(
            f"config.json: weights quantized by {method!r} cannot be read: take the checkpoint "
            "before quantization and load it with quantize='int8' or 'int4'"
        )
    options = {str(key): value for key, value in found.items() if key != "quant_method"}
    known = asdict(QuantConfig()).keys()
    if options.keys() != known:
        raise ConfigError(
            f"config.json: {KEY} has the keys {', '.join(sorted(options))}, this version reads "
            f"{', '.join(sorted(known))}"
        )
    return QuantConfig(**options)  # type: ignore[arg-type]  # checked by QuantConfig itself


def written_quantization(config: QuantConfig) -> dict[str, object]:
    """The same as it stands in config.json."""
    return {"quant_method": METHOD, **asdict(config)}


def refuse_unknown_packing(
    model: nn.Module, config: QuantConfig | None, dtype: torch.dtype | None
) -> None:
    """A model is written as packed if and only if it is.

    Raises:
        ConfigError: not so, or another number format is asked for.
    """
    packed = any(isinstance(module, QuantLinear) for module in model.modules())
    if packed and config is None:
        raise ConfigError("the model is quantized: save it with the QuantConfig it was made with")
    if config is not None and not packed:
        raise ConfigError("the model is not quantized: save it without a QuantConfig")
    if packed and dtype is not None:
        raise ConfigError("a quantized model is saved as it is, without dtype")


def faster_tower_dtype(config: ModelConfig, choices: Choices) -> torch.dtype | None:
    """The number format in which a vision tower is faster on this CPU; None where it is small.

    It is measured once per machine: bfloat16 is five times as fast as float32 on one
    CPU and seven times as slow on another.
    """
    vision = config.vision
    if vision is None:
        return None
    shape = (vision.intermediate_size, vision.hidden_size, vision.num_patches + 1)
    return choices.float_dtype(shape) if math.prod(shape) > LARGE else None


class Packing:
    """The linear layers of a model without memory, replaced by packed ones.

    Args:
        model: built on the meta device, not filled yet.
        config: which layers, and how.
        stored: the files hold packed layers already.
        tower_dtype: of towers and projectors that stay floats; None: as the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        config: QuantConfig,
        *,
        stored: bool = False,
        tower_dtype: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self._tower_dtype = tower_dtype
        self._config = config
        self._biases: dict[str, Tensor] = {}
        self._bits: dict[str, int] = {}
        self._as_stored: set[str] = set()
        linears = [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear]
        for path, linear in linears:
            bits = bits_of(path, config)
            if bits is None:
                continue
            if not stored:
                self._bits[path] = bits
                continue
            packed = empty_packed(linear, bits, config.group_size, symmetric=config.symmetric)
            layer = QuantLinear(packed, weight_only=config.mode == "weight_only")
            model.set_submodule(path, layer)
            self._as_stored |= {f"{path}.{name}" for name in layer.state_dict()}
        self._keep_embeddings()

    def _keep_embeddings(self) -> None:
        """The vocabulary stays as stored, unless the logits are made of it too."""
        paths = {path for path, _ in self._model.named_modules()}
        if EMBEDDINGS in paths and OUTPUT in paths:
            weight = self._model.get_submodule(EMBEDDINGS).get_parameter("weight")
            self._model.set_submodule(EMBEDDINGS, StoredEmbedding(weight.detach()))
            self._as_stored.add(f"{EMBEDDINGS}.weight")

    def takes(self, name: str) -> bool:
        """Whether a tensor is packed instead of assigned."""
        return name.rpartition(".")[0] in self._bits

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype | None:
        """The number format to read a tensor in; None: as it is stored."""
        if name in self._as_stored:
            return None
        if self.takes(name):
            return torch.float32
        is_seen = self._tower_dtype is not None and name.startswith(SEEN)
        return self._tower_dtype if is_seen else dtype

    def take(self, name: str, tensor: Tensor) -> None:
        """Round a weight and put its layer into the model; keep a bias until the end."""
        path, _, kind = name.rpartition(".")
        if kind == "bias":
            self._biases[path] = tensor
            return
        packed = round_weight(tensor, None, self._bits[path], self._config)
        layer = QuantLinear(packed, weight_only=self._config.mode == "weight_only")
        self._model.set_submodule(path, layer)

    def finish(self, device: torch.device) -> Mapping[str, Tensor]:
        """State of the layers that were packed, by full name, biases in place."""
        state: dict[str, Tensor] = {}
        for path in self._bits:
            layer = self._model.get_submodule(path)
            if isinstance(layer, QuantLinear):
                layer.set_bias(self._biases.get(path))
                layer.to(device)
                state |= {f"{path}.{name}": part for name, part in layer.state_dict().items()}
        self._model.requires_grad_(False)
        return state

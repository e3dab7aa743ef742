"""Quantized checkpoints: layers packed while they are read, and packed layers of the files.

    LayerQuantizer(model, config)            every weight is rounded as it is read
    LayerQuantizer(..., stored=True)         the files hold packed layers, which stay views
    LayerQuantizer(..., published=format)    layers of AWQ or GPTQ are repacked

config.json names the format of the files:  "quantization_config": {"quant_method": "lapilli", ...}
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lapilli.checkpoint.formats.awq import (
    ADVICE,
    NAMES,
    PublishedFormat,
    PublishedLinear,
    is_published,
    published_format,
)
from lapilli.checkpoint.source import read_optional_json
from lapilli.config.model import ModelConfig
from lapilli.config.reader import JsonObject, in_file, is_object, shown
from lapilli.errors import CheckpointError, ConfigError, ConfigFileError, UnsupportedModelError
from lapilli.kernels.packing import empty_packed
from lapilli.nn.linear import KeptLinear
from lapilli.quant import QuantConfig
from lapilli.quant.autotune import Choices
from lapilli.quant.linear import QuantLinear, StoredEmbedding
from lapilli.quant.quantize import SEEN, bits_of, describe, notes_on, round_weight

KEY = "quantization_config"
METHOD = "lapilli"
LARGE = 500_000_000  # multiply-adds of a layer from which the dtype of a tower matters
EMBEDDINGS = "language_model.model.embed_tokens"
OUTPUT = "language_model.lm_head"
# Files of older releases with the settings of AWQ and GPTQ, instead of config.json.
BESIDE = {"awq": "quant_config.json", "gptq": "quantize_config.json"}


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """Quantization format of the weights of a checkpoint.

    Attributes:
        config: of the layers as they are loaded by default.
        published: AWQ or GPTQ; None: lapilli's own format.
    """

    config: QuantConfig
    published: PublishedFormat | None = None

    def __str__(self) -> str:
        if self.published is not None:
            return str(self.published)
        return f"lapilli, {describe(self.config)}"

    def check_request(self, asked: QuantConfig, what: Path) -> None:
        """Check that the requested quantization is that of the files, so none is rounded twice.

        AWQ and GPTQ leave activations and some layers open; those the caller may choose.

        Raises:
            ConfigError: it is another one.
        """
        own = self.config
        if self.published is None:
            if asked == own:
                return
            advice = "load it as it is"
        elif (asked.bits, asked.group_size, asked.levels) != (4, own.group_size, own.levels):
            advice = (
                "load it as it is, or with quantize='int4' or QuantConfig(bits=4, "
                f"group_size={own.group_size}, levels={own.levels!r}, ...) to pack the rest too"
            )
        else:
            return
        raise ConfigError(
            f"{what} is quantized already ({self}): {advice}, or quantize the checkpoint that it "
            "was made from"
        )


def with_quantization_file(raw: JsonObject, path: Path) -> JsonObject:
    """Return config.json with the quantization settings of a file beside it, if there is one.

    Raises:
        ConfigFileError: config.json has settings that are no object.
    """
    if _settings(raw) is not None:
        return raw
    for method, name in BESIDE.items():
        found = read_optional_json(path / name)
        if found is not None:
            return {**raw, KEY: {"quant_method": method, **found}}
    return raw


def is_packed_here(raw: JsonObject) -> bool:
    """Return whether a checkpoint is in lapilli's own quantized format."""
    return (_settings(raw) or {}).get("quant_method") == METHOD


def _settings(raw: JsonObject) -> JsonObject | None:
    """Return the quantization settings of config.json; None where it has none or null.

    Raises:
        ConfigFileError: they are no object.
    """
    found = raw.get(KEY)
    if found is None or is_object(found):
        return found
    raise ConfigFileError(
        f"config.json: {KEY} is {shown(found)}, expected an object with quant_method: leave it out "
        "if the weights are not packed"
    )


def stored_quantization(raw: JsonObject) -> StoredQuantization | None:
    """Parse the quantization of a checkpoint; None where its weights are not packed.

    Raises:
        UnsupportedModelError: a format of another library that is not read.
        ConfigError: a format of another version of lapilli, or settings that are no object.
    """
    found = _settings(raw)
    if found is None:
        return None
    method = found.get("quant_method")
    if isinstance(method, str) and method in NAMES:
        published = published_format(found)
        return StoredQuantization(published.config, published)
    if method != METHOD:
        raise UnsupportedModelError(
            f"config.json: weights quantized by {shown(method)} cannot be read: {ADVICE}"
        )
    options = {str(key): value for key, value in found.items() if key != "quant_method"}
    symmetric = options.pop("symmetric", None)
    if "levels" not in options and isinstance(symmetric, bool):  # files of lapilli 0.1
        options["levels"] = "symmetric" if symmetric else "zeros"
    options.setdefault("value_bits", options.get("bits"))  # likewise
    known = asdict(QuantConfig()).keys()
    if options.keys() != known:
        raise ConfigFileError(
            f"config.json: {KEY} has the keys {', '.join(sorted(options))[:500]}, this version "
            f"reads {', '.join(sorted(known))}"
        )
    with in_file():
        config = QuantConfig(**options)  # type: ignore[arg-type]  # checked by QuantConfig itself
    return StoredQuantization(config)


def written_quantization(config: QuantConfig) -> dict[str, object]:
    """Return the `quantization_config` of config.json."""
    return {"quant_method": METHOD, **asdict(config)}


def check_quantization(
    model: nn.Module, config: QuantConfig | None, dtype: torch.dtype | None
) -> None:
    """Check that model, QuantConfig and dtype go together when a model is saved.

    Raises:
        ConfigError: they do not.
    """
    packed = any(isinstance(module, QuantLinear) for module in model.modules())
    if packed and config is None:
        raise ConfigError("the model is quantized: save it with the QuantConfig it was made with")
    if config is not None and not packed:
        raise ConfigError("the model is not quantized: save it without a QuantConfig")
    if packed and dtype is not None:
        raise ConfigError("a quantized model is saved as it is, without dtype")
    if config is not None:
        _check_layers(model, config)


def _check_layers(model: nn.Module, config: QuantConfig) -> None:
    """Check that every layer has the bits of a QuantConfig; AWQ and GPTQ files may differ."""
    for path, module in model.named_modules():
        if not isinstance(module, QuantLinear | nn.Linear):
            continue
        found = module.bits if isinstance(module, QuantLinear) else None
        expected = bits_of(path, config)
        if found != expected:
            has, says = (f"in {n} bits" if n else "float" for n in (found, expected))
            raise ConfigError(
                f"{path} is {has}, but the QuantConfig says {says}: load the checkpoint with "
                "quantize= to pack what its files leave float"
            )


def faster_tower_dtype(config: ModelConfig, choices: Choices) -> torch.dtype | None:
    """Return the faster dtype for a vision tower on this CPU; None for a small tower.

    It is measured once per machine: bfloat16 is five times as fast as float32 on one CPU and seven
    times as slow on another.
    """
    vision = config.vision
    if vision is None:
        return None
    shape = (vision.intermediate_size, vision.hidden_size, vision.num_patches + 1)
    return choices.float_dtype(shape) if math.prod(shape) > LARGE else None


class LayerQuantizer:
    """Quantizer of the linear layers of a model while its files are read.

    Args:
        model: on the meta device; its layers are replaced by packed ones.
        config: the layers to pack, and how.
        stored: the files hold packed layers already; their float layers stay float.
        published: AWQ or GPTQ, where the files have it.
        names: of the parameters in the files, among which AWQ and GPTQ layers are found.
        tower_dtype: of towers and projectors that stay floats; None: as the rest.
        reads_kept: where the model runs, products read 16 bits as they are stored.

    Attributes:
        config: as given, with the output layer in 4 bits where the files have it so.
        notes: parts of `config` that the model cannot follow.

    Raises:
        CheckpointError: config.json names AWQ or GPTQ and no layer has it.
        ShapeMismatchError: the format cannot hold a layer of its size.
    """

    def __init__(
        self,
        model: nn.Module,
        config: QuantConfig,
        *,
        stored: bool = False,
        published: PublishedFormat | None = None,
        names: frozenset[str] = frozenset(),
        tower_dtype: torch.dtype | None = None,
        reads_kept: bool = False,
    ) -> None:
        self._model = model
        self._tower_dtype = tower_dtype
        is_head_packed = published is not None and is_published(OUTPUT, names)
        self.config = replace(config, head_bits=4) if is_head_packed else config
        self._foreign = published is not None
        self._biases: dict[str, Tensor] = {}
        self._bits: dict[str, int] = {}
        self._as_stored: set[str] = set()
        linears = [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear]
        self.notes = notes_on((path for path, _ in linears), self.config)
        for path, linear in linears:
            bits = bits_of(path, self.config)
            if published is not None and is_published(path, names):
                self._expect_published(path, linear, published, names)
            elif bits is not None and not stored:
                self._bits[path] = bits
            elif bits is not None and published is None:
                self._expect_packed(path, linear, bits)
        if published is not None and names and not self._as_stored:
            raise CheckpointError(
                f"config.json says {published}, but no linear layer of the files has a qweight: "
                "config.json and weights do not belong together"
            )
        self._keep_vocabulary(reads_kept=reads_kept)

    def _expect_packed(self, path: str, linear: nn.Linear, bits: int) -> None:
        """Put an empty packed layer in place of one that the files hold packed."""
        packed = empty_packed(
            linear.out_features,
            linear.in_features,
            bits,
            self.config.group_size,
            levels=self.config.levels,
            has_bias=linear.bias is not None,
            device=linear.weight.device,
        )
        layer = QuantLinear(packed, weight_only=self.config.mode == "weight_only")
        self._model.set_submodule(path, layer)
        self._as_stored |= {f"{path}.{name}" for name in layer.state_dict()}

    def _expect_published(
        self, path: str, linear: nn.Linear, published: PublishedFormat, names: frozenset[str]
    ) -> None:
        """Put a placeholder in place of a layer that the files hold in AWQ or GPTQ."""
        pieces = ("g_idx", "bias", "scaled_zeros", "qzeros")
        has_order, has_bias, has_scaled, has_zeros = (f"{path}.{name}" in names for name in pieces)
        layer = PublishedLinear(
            path,
            linear,
            published,
            has_order=has_order,
            has_bias=has_bias,
            zeros="scaled_zeros" if has_scaled or not has_zeros else "qzeros",
        )
        self._model.set_submodule(path, layer)
        self._bits[path] = 4
        self._as_stored |= {f"{path}.{name}" for name in layer.state_dict() if name != "bias"}

    def _keep_vocabulary(self, *, reads_kept: bool) -> None:
        """Keep the embedding in its stored dtype where the output layer is packed.

        With `reads_kept` an output layer of floats is kept so too, as AWQ and GPTQ files have it,
        or the embedding that stands for it: a token reads all of it.
        """
        paths = {path for path, _ in self._model.named_modules()}
        head = self._model.get_submodule(OUTPUT) if OUTPUT in paths else None
        if reads_kept and type(head) is nn.Linear and OUTPUT not in self._bits:
            layer = KeptLinear.of(head)
            self._model.set_submodule(OUTPUT, layer)
            self._as_stored |= {f"{OUTPUT}.{name}" for name in layer.state_dict()}
        is_packed = OUTPUT in self._bits or isinstance(head, QuantLinear)
        if EMBEDDINGS in paths and (is_packed or (reads_kept and head is None)):
            weight = self._model.get_submodule(EMBEDDINGS).get_parameter("weight")
            self._model.set_submodule(EMBEDDINGS, StoredEmbedding(weight.detach()))
            self._as_stored.add(f"{EMBEDDINGS}.weight")

    def takes(self, name: str) -> bool:
        """Return whether a tensor is packed, not assigned."""
        return name.rpartition(".")[0] in self._bits

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Return tensors in the order to read them: those of an AWQ layer together, its bias first.

        They are held until all of them are there.
        """
        if not self._foreign:
            return list(names)
        return sorted(names, key=lambda name: name.rpartition("."))

    def dtype_of(self, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype to read a tensor in; None: as it is stored."""
        if name in self._as_stored:
            return None
        if self.takes(name):
            return torch.float32
        is_seen = self._tower_dtype is not None and name.startswith(SEEN)
        return self._tower_dtype if is_seen else dtype

    def take(self, name: str, tensor: Tensor) -> None:
        """Pack a layer once its weight is there; a bias is held until the end."""
        path, _, kind = name.rpartition(".")
        before = self._model.get_submodule(path)
        if kind == "bias":
            if isinstance(before, PublishedLinear) and not before.is_biased:
                before.check_bias(tensor)
            else:
                self._biases[path] = tensor
            return
        if isinstance(before, PublishedLinear):
            packed = before.add(kind, tensor)
        else:
            packed = round_weight(tensor, None, self._bits[path], self.config)
        if packed is not None:
            layer = QuantLinear(packed, weight_only=self.config.mode == "weight_only")
            self._model.set_submodule(path, layer)

    def finish(self, device: torch.device, dtype: torch.dtype | None) -> Mapping[str, Tensor]:
        """Return the tensors of the packed layers with their biases, by full name.

        On a CPU they compute in float32, elsewhere in the dtype of the model's other weights.
        """
        for module in self._model.modules():
            if isinstance(module, StoredEmbedding) and device.type != "cpu" and dtype is not None:
                module.dtype = dtype
        state: dict[str, Tensor] = {}
        for path in self._bits:
            layer = self._model.get_submodule(path)
            if isinstance(layer, QuantLinear):
                layer.set_bias(self._biases.get(path))
                layer.to(device)
                state |= {f"{path}.{name}": part for name, part in layer.state_dict().items()}
        self._model.requires_grad_(False)
        return state

"""The files of a LoRA adapter, in PEFT's format, with the tensors that were trained beside it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lapilli.checkpoint.files import read_json
from lapilli.checkpoint.keymaps import KeyMap
from lapilli.checkpoint.report import some
from lapilli.checkpoint.weights import WeightStore, refuse_not_finite
from lapilli.config.reader import JsonObject, KeyReader, is_object
from lapilli.errors import (
    ConfigError,
    MissingFileError,
    MissingWeightsError,
    UnsupportedModelError,
)
from lapilli.lora import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

WRAPPER = "base_model.model."
HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.\w+)?\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter directory, opened.

    Args:
        path: the directory.
        config: rank, scale and patterns.
        base_name: what the adapter says it was trained on.
        store: its tensors.
    """

    path: Path
    config: LoraConfig
    base_name: str | None
    store: WeightStore

    def halves(self, keymap: KeyMap) -> dict[str, str]:
        """`PATH.lora_A.weight` in the model -> tensor of the file, for both halves.

        Raises:
            MissingWeightsError: a tensor of a module that the model cannot have.
        """
        names: dict[str, str] = {}
        lost: list[str] = []
        for foreign in self.store.infos:
            matched = HALF.fullmatch(foreign.removeprefix(WRAPPER))
            if matched is None:
                continue
            ours = keymap.to_ours(f"{matched['module']}.weight")
            if ours is None:
                lost.append(foreign)
            else:
                names[f"{ours.removesuffix('.weight')}.lora_{matched['half']}.weight"] = foreign
        if lost:
            raise MissingWeightsError(
                f"{len(lost)} tensors of the adapter {self.path} belong to no module of the model: "
                f"{some(lost)}. Was it trained on another kind of model?"
            )
        return names

    def saved_modules(self) -> WeightStore:
        """Whole tensors inside the adapter (modules_to_save, trained biases), named as in the base.

        Raises:
            UnsupportedModelError: tensors of a kind of adapter that lapilli does not have.
        """
        plain = WeightStore()
        for foreign in self.store.infos:
            name = foreign.removeprefix(WRAPPER)
            if HALF.fullmatch(name):
                continue
            if re.search(r"\.lora_|\.oft_|\.hada_|\.lokr_|\.ia3_|prompt_embeddings", name):
                raise UnsupportedModelError(
                    f"the adapter {self.path} holds {foreign}, which is no LoRA of a linear layer"
                )
            name = re.sub(r"\.modules_to_save(\.\w+)?\.(?=\w+$)", ".", name)
            plain.rename(self.store, foreign, name.replace(".base_layer.", "."))
        return plain

    def tensors(self, keymap: KeyMap, *, check_finite: bool) -> Mapping[str, Tensor]:
        """Both halves of every module, read in float32, by the names they have in the model.

        Raises:
            CheckpointError: a tensor holds NaN or an infinity.
        """
        found: dict[str, Tensor] = {}
        for ours, foreign in self.halves(keymap).items():
            found[ours] = self.store.tensor(foreign, torch.float32)
            if check_finite:
                refuse_not_finite(f"{foreign} (adapter)", found[ours])
        return found


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (directory / ADAPTER_CONFIG).is_file()


def open_adapter(directory: Path) -> Adapter:
    """An adapter directory.

    Raises:
        MissingFileError: adapter_config.json or the tensors are missing.
        UnsupportedModelError: not a LoRA, or a variation of it.
        CheckpointError: a file is damaged.
    """
    raw = read_json(directory / ADAPTER_CONFIG)
    weights = next((n for n in ADAPTER_WEIGHTS if (directory / n).is_file()), None)
    if weights is None:
        raise MissingFileError(
            f"no adapter weights in {directory}: looked for {', '.join(ADAPTER_WEIGHTS)}"
        )
    base_name = raw.get("base_model_name_or_path")
    return Adapter(
        path=directory,
        config=parse_adapter_config(raw),
        base_name=base_name if isinstance(base_name, str) else None,
        store=WeightStore.of_files([directory / weights]),
    )


def parse_adapter_config(raw: JsonObject) -> LoraConfig:
    """adapter_config.json of PEFT.

    Raises:
        ConfigError: a key is of the wrong type.
        UnsupportedModelError: not a LoRA, or a variation of it.
    """
    reader = KeyReader(raw, ADAPTER_CONFIG)
    kind = reader.text("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedModelError(f"{ADAPTER_CONFIG}: peft_type {kind!r} is not supported")
    for key in ("use_dora", "use_qalora", "lora_bias"):
        if reader.flag(key, False):
            raise UnsupportedModelError(f"{ADAPTER_CONFIG}: {key} true is not supported")
    return LoraConfig(
        rank=reader.positive("r", 8),
        alpha=reader.number("lora_alpha", 8.0),
        dropout=reader.number("lora_dropout", 0.0),
        use_rslora=reader.flag("use_rslora", False),
        fan_in_fan_out=reader.flag("fan_in_fan_out", False),
        rank_pattern={key: int(value) for key, value in _pattern(reader, "rank_pattern").items()},
        alpha_pattern=_pattern(reader, "alpha_pattern"),
    )


def _pattern(reader: KeyReader, key: str) -> dict[str, float]:
    value = reader.value(key)
    if value is None:
        return {}
    if not is_object(value) or not all(isinstance(v, int | float) for v in value.values()):
        raise ConfigError(f"{ADAPTER_CONFIG}: {key} must map patterns to numbers, got {value!r}")
    return {name: float(str(number)) for name, number in value.items()}

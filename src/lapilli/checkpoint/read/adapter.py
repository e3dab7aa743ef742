"""LoRA adapter in PEFT's format: its configuration, its halves and its whole tensors.

Every key of adapter_config.json is followed, known to have no effect on stored tensors, or refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lapilli.checkpoint.formats.weights import WeightStore, check_values
from lapilli.checkpoint.keymaps import KeyMap
from lapilli.checkpoint.read.assemble import some
from lapilli.checkpoint.source import read_json
from lapilli.config.reader import JsonObject, KeyReader
from lapilli.errors import (
    CheckpointError,
    ConfigError,
    MissingFileError,
    MissingWeightsError,
    UnsupportedModelError,
)
from lapilli.lora import LoraConfig, Number, ends_with

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

WRAPPER = "base_model.model."
HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.\w+)?\.weight")
# Initializations that leave the weights of the base as they are: for the others PEFT subtracts the
# initial adapter from them, or rounds them.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Keys about origin, training, and targets, which the names of the tensors give too.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "peft_version", "task_type", "inference_mode", "runtime_config"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "bias", "merge_weights", "megatron_core", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # of ms-swift
    }
)
_MERGE_IT = "merge it with PEFT (merge_and_unload) and load the merged model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An open adapter directory.

    Args:
        config: rank, scale and patterns of names in the file.
        base_name: the base that it names.
        revision: of the base, if it is a repository of the hub.
        keeps_ties: a trained embedding is the output layer too, if the base's is.
    """

    path: Path
    config: LoraConfig
    base_name: str | None
    store: WeightStore
    revision: str | None = None
    keeps_ties: bool = False

    def config_of(self, keymap: KeyMap) -> LoraConfig:
        """Return the configuration with patterns of the module paths of the model.

        A pattern may name a module as the file does, or as another release of the same layout.

        Raises:
            MissingWeightsError: a tensor of a module that the layout does not have.

        Source: PEFT matches a pattern with the end of the path of a module of its own model.
        """
        ranks: dict[str, int] = {}
        alphas: dict[str, int | float] = {}
        for ours, foreign in self.halves(keymap).items():
            path, _, half = ours.removesuffix(".weight").rpartition(".")
            if half != "lora_A":
                continue
            spellings = (_module_of(foreign), *keymap.spellings(path))
            rank = _first_match(self.config.rank_pattern, spellings)
            alpha = _first_match(self.config.alpha_pattern, spellings)
            ranks |= {} if rank is None else {re.escape(path): rank}
            alphas |= {} if alpha is None else {re.escape(path): alpha}
        return replace(self.config, rank_pattern=ranks, alpha_pattern=alphas)

    def halves(self, keymap: KeyMap) -> dict[str, str]:
        """Map `PATH.lora_A.weight` in the model to the tensor of the file, for both halves.

        Raises:
            MissingWeightsError: a tensor of a module that the layout does not have.
            CheckpointError: several adapters of one module.
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
                continue
            name = f"{ours.removesuffix('.weight')}.lora_{matched['half']}.weight"
            if name in names:
                raise CheckpointError(
                    f"the adapter {self.path} holds {names[name]} and {foreign}, two adapters of "
                    "one module: save the one that is meant by itself"
                )
            names[name] = foreign
        if lost:
            raise MissingWeightsError(
                f"{len(lost)} tensors of the adapter {self.path} belong to no module of the model: "
                f"{some(lost)}. Was it trained on another kind of model?"
            )
        return names

    def saved_modules(self) -> WeightStore:
        """Return whole tensors of the adapter (modules_to_save, biases), named as in the base.

        Raises:
            UnsupportedModelError: tensors of another kind of adapter.
        """
        plain = WeightStore()
        for foreign in self.store.infos:
            name = foreign.removeprefix(WRAPPER)
            if HALF.fullmatch(name):
                continue
            if re.search(r"\.lora_|\.oft_|\.hada_|\.lokr_|\.ia3_|prompt_embeddings", name):
                raise UnsupportedModelError(
                    f"the adapter {self.path} holds {foreign}, which is no LoRA of a linear layer: "
                    f"{_MERGE_IT}"
                )
            name = re.sub(r"\.modules_to_save(\.\w+)?\.(?=\w+$)", ".", name)
            plain.rename(self.store, foreign, name.replace(".base_layer.", "."))
        return plain

    def tensors(self, keymap: KeyMap, *, check_finite: bool) -> Mapping[str, Tensor]:
        """Read both halves of every module in float32, by their names in the model.

        Raises:
            CheckpointError: a tensor holds NaN or an infinity.
        """
        found: dict[str, Tensor] = {}
        for ours, foreign in self.halves(keymap).items():
            found[ours] = self.store.tensor(foreign, torch.float32)
            if check_finite:
                check_values(f"{foreign} (adapter)", found[ours])
        return found


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds a PEFT adapter."""
    return (directory / ADAPTER_CONFIG).is_file()


def open_adapter(directory: Path) -> Adapter:
    """Open an adapter directory.

    Raises:
        MissingFileError: adapter_config.json or the tensors are missing.
        UnsupportedModelError: not a LoRA, or a variation of it.
        CheckpointError: a file is damaged.
    """
    raw = read_json(directory / ADAPTER_CONFIG)
    config = parse_adapter_config(raw)
    weights = next((n for n in ADAPTER_WEIGHTS if (directory / n).is_file()), None)
    if weights is None:
        raise MissingFileError(
            f"no adapter weights in {directory}: looked for {', '.join(ADAPTER_WEIGHTS)}"
        )
    reader = KeyReader(raw, ADAPTER_CONFIG)
    return Adapter(
        path=directory,
        config=config,
        base_name=reader.text("base_model_name_or_path"),
        revision=reader.text("revision"),
        keeps_ties=reader.flag("ensure_weight_tying", False),
        store=WeightStore.of_files([directory / weights]),
    )


def parse_adapter_config(raw: JsonObject) -> LoraConfig:
    """Parse adapter_config.json of PEFT.

    Raises:
        ConfigError: a key is of the wrong type.
        UnsupportedModelError: not a LoRA, or a variation of it.
    """
    reader = KeyReader(raw, ADAPTER_CONFIG, _WITHOUT_EFFECT)
    kind = reader.text("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{ADAPTER_CONFIG}: peft_type {kind!r} is not supported, only LORA is: {_MERGE_IT}"
        )
    start = reader.value("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _PLAIN_BEGINNINGS:
        raise UnsupportedModelError(
            f"{ADAPTER_CONFIG}: init_lora_weights {start!r} is not supported, for PEFT changes the "
            "weights of the base under it: save it as a plain LoRA (save_pretrained with "
            f"path_initial_model_for_weight_conversion), or {_MERGE_IT}"
        )
    alpha = reader.number("lora_alpha", 8.0)
    ranks, alphas = reader.child("rank_pattern"), reader.child("alpha_pattern")
    config = LoraConfig(
        rank=reader.positive("r", 8),
        alpha=alpha,
        dropout=reader.number("lora_dropout", 0.0),
        use_rslora=reader.flag("use_rslora", False),
        fan_in_fan_out=reader.flag("fan_in_fan_out", False),
        rank_pattern={name: ranks.positive(name) for name in _patterns(ranks)},
        alpha_pattern={name: alphas.number(name, alpha) for name in _patterns(alphas)},
    )
    for key in ("base_model_name_or_path", "revision", "ensure_weight_tying"):
        reader.value(key)  # read by `open_adapter`
    for key in reader.report().unknown:  # every release of PEFT has more variants of LoRA
        value = reader.raw[key]
        if value:
            shown = "true" if value is True else repr(value)[:80]
            raise UnsupportedModelError(
                f"{ADAPTER_CONFIG}: {key} {shown} is not supported, it may change what the adapter "
                f"computes: {_MERGE_IT}"
            )
    return config


def _patterns(reader: KeyReader) -> Iterator[str]:
    for pattern in reader.raw:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{reader.where}: {reader.prefix}{pattern} is no regular expression: {error}"
            ) from error
        yield pattern


def _module_of(foreign: str) -> str:
    """Return the module path of a tensor in the file, without PEFT's wrapper."""
    matched = HALF.fullmatch(foreign.removeprefix(WRAPPER))
    return foreign if matched is None else matched["module"]


def _first_match(patterns: Mapping[str, Number], names: Sequence[str]) -> Number | None:
    """Return the number of the first pattern that matches the end of one of the names."""
    for name in names:
        for pattern, number in patterns.items():
            if ends_with(pattern, name):
                return number
    return None

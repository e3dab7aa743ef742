"""A model as files in the original LLaVA layout, written aside and moved into place at the end.

config.json  model.safetensors or shards with index  tokenizer files  generation_config.json
vision_tower/{config.json, preprocessor_config.json, model.safetensors}   with tower="beside"
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lapilli.checkpoint.keymaps import ORIGINAL, ORIGINAL_MPT, VISION_TOWER, KeyMap
from lapilli.checkpoint.keymaps.tables import PROJECTOR, TOWER
from lapilli.checkpoint.quantized import KEY, refuse_unknown_packing, written_quantization
from lapilli.config.model import ModelConfig
from lapilli.config.write import (
    write_llava_config,
    write_preprocessor_config,
    write_tower_config,
)
from lapilli.errors import CheckpointError, ConfigError
from lapilli.lora.inject import adapters
from lapilli.model.vlm import VisionLanguageModel
from lapilli.quant import QuantConfig
from lapilli.quant.linear import QuantLinear

TowerPlace = Literal["named", "inside", "beside"]

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
TOWER_FOLDER = "vision_tower"
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def save_llava(
    path: Path,
    model: VisionLanguageModel,
    config: ModelConfig,
    *,
    tokenizer_path: Path | None = None,
    tower: TowerPlace | None = None,
    dtype: torch.dtype | None = None,
    template: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    quantization: QuantConfig | None = None,
) -> None:
    """A whole checkpoint that this loader and the original's read.

    Args:
        path: the new directory; its name is what the original decides by, so it should contain
            "llava", and "mistral" or "mpt" for those language models.
        model: without unmerged adapters.
        config: what it is.
        tokenizer_path: a directory whose tokenizer files are copied.
        tower: "named": only named, by `config.vision_source`; "inside": among the other weights,
            as a tuned tower; "beside": in a folder of its own. None: inside where it was tuned,
            named where a hub id or an absolute path says where it is, else beside.
        dtype: of the stored weights; None: as they are.
        template: name of the conversation template that the model was trained with.
        overwrite: replace a directory that is there.
        shard_bytes: largest size of one weight file.
        quantization: how the layers are packed, for a quantized model. Such a checkpoint is read
            by lapilli alone; a packed tower lies inside of it, a tuned float one beside.

    Raises:
        CheckpointError: the directory is there already.
        ConfigError: an adapter is not merged, a tower cannot be named, or packed layers and
            `quantization` do not go together.
        UnsupportedModelError: something that the original layout cannot say.
    """
    if any(True for _ in adapters(model)):
        raise ConfigError("the model has an unmerged adapter: lapilli.lora.merge(model) first")
    refuse_unknown_packing(model, quantization, dtype)
    keymap = ORIGINAL_MPT if config.text.family == "mpt" else ORIGINAL
    place = tower or _default_place(config)
    if quantization is not None and quantization.quantize_tower:
        place = "inside"
    elif quantization is not None and place == "inside":
        place = "beside"  # stored once: inside, the original wants it beside as well
    state = {
        name: tensor.detach() if dtype is None else tensor.detach().to(dtype)
        for name, tensor in model.state_dict().items()
    }
    tower_state = {name: state[name] for name in state if name.startswith(TOWER)}
    inner = {n: t for n, t in state.items() if place == "inside" or n not in tower_state}
    stored = _name_of(next(iter(state.values())).dtype)
    with _new_directory(path, overwrite=overwrite) as folder:
        _write_weights(folder, _renamed(inner, keymap), shard_bytes)
        written = write_llava_config(
            replace(config, vision_in_checkpoint=place == "inside"),
            vision_source=_tower_name(config, place),
            torch_dtype=stored,
            template=template,
        )
        if quantization is not None:
            written |= {KEY: written_quantization(quantization)}
        _write_json(folder / "config.json", written)
        if tower_state and written.get("mm_vision_tower") == TOWER_FOLDER:
            is_packed = quantization is not None and quantization.quantize_tower
            _write_tower(folder / TOWER_FOLDER, config, {} if is_packed else tower_state)
        for name in TOKENIZER_FILES if tokenizer_path else ():
            if tokenizer_path and (tokenizer_path / name).is_file():
                shutil.copyfile(tokenizer_path / name, folder / name)


def save_projector(
    path: Path,
    model: VisionLanguageModel,
    config: ModelConfig,
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """A projector-only checkpoint: config.json and mm_projector.bin, as stage 1 leaves it.

    Args:
        path: the new directory.
        model: whose projector is stored.
        config: what it is; its tower has to be named.
        base: the language model, written as `_name_or_path`.
        overwrite: replace a directory that is there.

    Raises:
        CheckpointError: the directory is there already.
        ConfigError: the tower has no name, or the projector is quantized.
    """
    if any(isinstance(module, QuantLinear) for module in model.modalities.modules()):
        raise ConfigError("the projector is quantized: save it from a model whose projector is not")
    keymap = ORIGINAL_MPT if config.text.family == "mpt" else ORIGINAL
    state = {n: t.detach().clone() for n, t in model.state_dict().items() if PROJECTOR in n}
    first = next(iter(model.parameters()))
    with _new_directory(path, overwrite=overwrite) as folder:
        torch.save(_renamed(state, keymap), folder / "mm_projector.bin")
        written = write_llava_config(
            config,
            vision_source=_tower_name(config, "named"),
            torch_dtype=_name_of(first.dtype),
        )
        written |= {"tune_mm_mlp_adapter": True}
        _write_json(
            folder / "config.json", written if base is None else {"_name_or_path": base, **written}
        )


def _default_place(config: ModelConfig) -> TowerPlace:
    if config.vision_in_checkpoint:
        return "inside"
    return "named" if _is_lasting(config.vision_source) else "beside"


def _is_lasting(source: str | None) -> bool:
    """Whether a name still finds the tower when the checkpoint lies elsewhere."""
    if source is None or source.startswith("."):
        return False
    return "/" in source or Path(source).is_absolute()


def _tower_name(config: ModelConfig, place: TowerPlace) -> str | None:
    """What mm_vision_tower says.

    The original builds even a tuned tower from what this names, so it is a whole directory.
    """
    if config.vision is None:
        return None
    if place == "beside" or (place == "inside" and not _is_lasting(config.vision_source)):
        return TOWER_FOLDER
    if not config.vision_source:
        raise ConfigError("the vision tower has no name: save it inside or beside the checkpoint")
    return config.vision_source


def _renamed(state: Mapping[str, Tensor], keymap: KeyMap) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        foreign = keymap.to_foreign(ours)
        if foreign is None:
            raise CheckpointError(f"{ours} has no name in the layout {keymap.name!r}")
        renamed[foreign] = tensor.contiguous()
    return renamed


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """One file, or numbered shards with an index, in the order of the tensors."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / INDEX, index)


def _write_tower(folder: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """The tower's own directory, without weights where there are none to write."""
    if config.vision is None or config.image is None:
        return
    folder.mkdir()
    stored = config.torch_dtype or "float32"
    if state:
        _write_weights(folder, _renamed(state, VISION_TOWER), SHARD_BYTES)
        stored = _name_of(next(iter(state.values())).dtype)
    _write_json(folder / "config.json", write_tower_config(config.vision, stored))
    _write_json(folder / "preprocessor_config.json", write_preprocessor_config(config.image.pixels))


@contextmanager
def _new_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `path` that takes its place once everything in it is written.

    Raises:
        CheckpointError: there is something at `path` already.
    """
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is there already: choose another place, or overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as aside:
        folder = Path(aside) / "new"
        folder.mkdir()
        yield folder
        if path.exists():
            path.rename(Path(aside) / "old")
        folder.rename(path)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

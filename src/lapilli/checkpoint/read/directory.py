"""Parts of a checkpoint: weight files opened, the vision tower and the base model found.

Nothing of the weights is read but names and shapes.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from lapilli.checkpoint.formats.weights import WeightStore, complete_weights, find_weight_files
from lapilli.checkpoint.keymaps import (
    HF_LLAVA,
    LANGUAGE_MODEL,
    TOWER,
    VISION_TOWER,
    KeyMap,
    original_keymap,
)
from lapilli.checkpoint.source import HUB_ID, find_directory, read_json, read_optional_json, resolve
from lapilli.config.huggingface import parse_text_config
from lapilli.config.llava import is_hf_llava, is_original, named_tower
from lapilli.config.model import ModelConfig, TextConfig
from lapilli.config.reader import JsonObject, is_object
from lapilli.errors import (
    CheckpointError,
    MissingFileError,
    MissingWeightsError,
    ShapeMismatchError,
)

# Labels of parts.
BASE, ADAPTER, CHECKPOINT, VISION = "base", "adapter", "checkpoint", "vision tower"


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Tensors of some files and the parameters that they are for.

    Args:
        label: of the part in messages; BASE for the model under an adapter.
        skipped: prefixes of parameters whose tensors here are dropped.
    """

    label: str
    store: WeightStore
    keymap: KeyMap
    skipped: tuple[str, ...] = ()

    def parameter(self, foreign: str) -> str | None:
        """Return the parameter that a tensor is for, or None when no rule knows its name."""
        return self.keymap.to_ours(foreign)

    def is_dropped(self, foreign: str) -> bool:
        """Return whether a tensor of the part is dropped on purpose."""
        ours = self.keymap.to_ours(foreign)
        skipped = bool(self.skipped) and ours is not None and ours.startswith(self.skipped)
        return skipped or self.keymap.is_dropped(foreign)

    @property
    def parameters(self) -> dict[str, str]:
        """Names of tensors by the parameter that they are for, dropped ones too."""
        named = ((self.keymap.to_ours(foreign), foreign) for foreign in self.store.infos)
        return {ours: foreign for ours, foreign in named if ours is not None}

    def has(self, prefix: str) -> bool:
        """Return whether any parameter has this prefix."""
        return any(ours.startswith(prefix) for ours in self.parameters)


def open_weights(directory: Path) -> WeightStore:
    """Open the tensors of a full model; none where there are no files."""
    return WeightStore.of_files(find_weight_files(directory))


def open_outside(directory: Path, *, fetch: bool) -> WeightStore:
    """Open the tensors of a base or a tower; with fetch=False none that are still on the hub."""
    return open_weights(directory) if fetch or complete_weights(directory) else WeightStore()


def keymap_of(raw: JsonObject) -> KeyMap:
    """Return the key map of the tensors beside this config.json."""
    if is_hf_llava(raw):
        return HF_LLAVA
    if not is_original(raw):
        return LANGUAGE_MODEL
    return original_keymap(parse_text_config(raw))


def find_tower(
    raw: JsonObject, path: Path, *, base: Path | None = None, fetch: bool = True
) -> tuple[Path | None, bool]:
    """Find the vision tower that the original layout names, and whether it moved with the base.

    Where the folder that config.json, `raw`, names is gone, the tower of `base` is taken, the model
    under an adapter or a projector. With fetch=False the weights of a tower on the hub stay there.

    Raises:
        MissingFileError: it is not there.
    """
    name = named_tower(raw)
    if name is None:
        return None, False
    lacks = f"the vision tower of {path} (mm_vision_tower in its config.json) is not there"
    if base is not None and not HUB_ID.fullmatch(name) and find_directory(name, (path,)) is None:
        other = named_tower(read_json(base / "config.json"))
        found = None if other is None else find_directory(other, (base,))
        if found is None:
            raise MissingFileError(
                f"{lacks}: {name!r} is no directory, and the base {base} has no folder of a tower: "
                "write where it lies now into the key, or give a base that has it (--base)"
            )
        return found, True
    try:
        return resolve(name, beside=(path,), weights=fetch), False
    except CheckpointError as error:
        raise MissingFileError(f"{lacks}: {error}") from error


def with_tower(
    parts: tuple[WeightPart, ...], config: ModelConfig, tower_path: Path, *, fetch: bool
) -> tuple[tuple[WeightPart, ...], tuple[str, ...]]:
    """Return the parts with the tower from where the original takes it, and notes.

    Source: LLaVA clip_encoder.py: a tower that was tuned (unfreeze_mm_vision_tower) comes from the
    checkpoint, a frozen one from the directory or repository that mm_vision_tower names.

    Raises:
        MissingWeightsError: a tuned tower without weights in the checkpoint.
        MissingFileError: a frozen tower without weights anywhere.
    """
    inside = any(part.has(TOWER) for part in parts)
    if config.vision_in_checkpoint:
        if not inside:
            raise MissingWeightsError(
                "unfreeze_mm_vision_tower is true, so the vision tower was tuned, but the "
                "checkpoint has none of its weights: get the whole checkpoint, or set the key to "
                f"false to take the tower of {tower_path} as it is"
            )
        return parts, ()
    store = open_outside(tower_path, fetch=fetch)
    if not store.infos:
        if not fetch:
            return parts, ("the weights of the vision tower are on the hub, not yet on this disk",)
        if inside:
            return parts, (f"the vision tower is the checkpoint's: {tower_path} has no weights",)
        raise MissingFileError(f"no weights of the vision tower in {tower_path}")
    tower = WeightPart(VISION, store, VISION_TOWER)
    if not inside:
        return (tower, *parts), ()
    kept = tuple(replace(part, skipped=(*part.skipped, TOWER)) for part in parts)
    note = (
        f"the checkpoint holds a vision tower, but it was frozen: {tower_path} is read instead, "
        "as the original does"
    )
    return (tower, *kept), (note,)


def preprocessor_of(path: Path) -> JsonObject | None:
    """Read preprocessor_config.json, or its successor in processor_config.json."""
    found = read_optional_json(path / "preprocessor_config.json")
    if found is not None:
        return found
    newer = (read_optional_json(path / "processor_config.json") or {}).get("image_processor")
    return newer if is_object(newer) else None


def pixel_notes(path: Path, config: ModelConfig) -> tuple[str, ...]:
    """Return a note where the preprocessing of a tower is the one of its family."""
    if config.vision is None or preprocessor_of(path) is not None:
        return ()
    return (
        f"no preprocessor_config.json in {path}: sizes and colours are those of a "
        f"{config.vision.family} tower of {config.vision.image_size} pixels",
    )


# Numbers that a base and the adapter or projector on it must share.
SHARED = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
    "head_dim",
)
# The original adds at most <im_patch>, <im_start>, <im_end> to the vocabulary of its base.
MOST_NEW_TOKENS = 3


def find_base(
    given: str | None,
    named: str | None,
    path: Path,
    *,
    revision: str | None = None,
    fetch: bool = True,
) -> Path:
    """Find the directory of the base.

    A relative name may start from `path`, the checkpoint, or from its parent. `revision` is that of
    the named base, if it is a repository of the hub; with fetch=False the weights of a repository
    stay where they are.

    Raises:
        MissingFileError: neither names one, or the one that is named cannot be found.
    """
    if given is not None:
        return resolve(given, weights=fetch)
    if not named:
        raise MissingFileError(
            f"{path} is an adapter or a projector and does not name the language model it was "
            "trained on: give it as base (--base)"
        )
    found = find_directory(named, (path, path.parent))
    if found is not None:
        return found
    try:
        is_open = HUB_ID.fullmatch(named) is not None and "@" not in named
        pinned = f"{named}@{revision}" if revision and is_open else named
        return resolve(pinned, weights=fetch)
    except CheckpointError as error:
        raise MissingFileError(
            f"{path} was trained on {named!r}, which is not there: {error}; or give another "
            "place of it as base (--base)"
        ) from error


def base_part(directory: Path, *, fetch: bool = True) -> WeightPart | None:
    """Open the weights of a base: a plain language model, or a LLaVA of either layout.

    None with fetch=False where they are still on the hub.

    Raises:
        MissingFileError: no config.json or no weights there.
    """
    raw = read_json(directory / "config.json")
    store = open_outside(directory, fetch=fetch)
    if not store.infos and not fetch:
        return None
    if not store.infos:
        raise MissingFileError(
            f"no weights in the base {directory}: looked for model.safetensors, pytorch_model.bin "
            "and their shards"
        )
    return WeightPart(BASE, store, keymap_of(raw))


def check_base(expected: TextConfig, base: Path) -> int:
    """Check the sizes of a base; return the number of rows of its vocabulary.

    Raises:
        ShapeMismatchError: some differ; the message names every one.
    """
    found = parse_text_config(read_json(base / "config.json"))
    names = {field.name for field in fields(expected)} & {field.name for field in fields(found)}
    differing = [
        f"{name} is {getattr(found, name)} in the base and {getattr(expected, name)} in the adapter"
        for name in SHARED
        if name in names and getattr(found, name) != getattr(expected, name)
    ]
    if type(found) is not type(expected):
        differing.append(f"the base is {found.family} and the adapter {expected.family}")
    if abs(found.vocab_size - expected.vocab_size) > MOST_NEW_TOKENS:
        differing.append(
            f"vocab_size is {found.vocab_size} in the base and {expected.vocab_size} in the adapter"
        )
    if differing:
        raise ShapeMismatchError(
            f"{base} is not the base that this checkpoint was trained on: {'; '.join(differing)}"
        )
    return found.vocab_size

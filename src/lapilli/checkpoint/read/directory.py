"""A checkpoint directory: config files parsed, tower and base found, weight files opened.

Nothing of the weights is read but names and shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from lapilli.checkpoint.formats.files import read_json, read_optional_json
from lapilli.checkpoint.formats.weights import WeightStore, complete_weights, find_weight_files
from lapilli.checkpoint.keymaps import (
    HF_LLAVA,
    LANGUAGE_MODEL,
    TOWER,
    VISION_TOWER,
    KeyMap,
    original_keymap,
)
from lapilli.checkpoint.source import HUB_ID, find_directory, resolve
from lapilli.config.ignored import sampling_notes
from lapilli.config.model import ModelConfig, TextConfig
from lapilli.config.parse import (
    is_hf_llava,
    is_original,
    named_tower,
    parse_config,
    parse_text_config,
)
from lapilli.config.reader import JsonObject, KeyReport, is_object
from lapilli.errors import (
    CheckpointError,
    MissingFileError,
    MissingWeightsError,
    ShapeMismatchError,
)

BASE = "base"


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Some tensors and what they are called here.

    Args:
        label: of the part in messages; BASE for the model under an adapter.
        store: the tensors.
        keymap: their names here.
        skipped: prefixes of parameters that this part holds but does not give.
    """

    label: str
    store: WeightStore
    keymap: KeyMap
    skipped: tuple[str, ...] = ()

    def parameter(self, foreign: str) -> str | None:
        """Return the parameter that a tensor is for, or None when no rule knows its name."""
        return self.keymap.to_ours(foreign)

    def is_dropped(self, foreign: str) -> bool:
        """Return whether the part holds a tensor without giving it, on purpose."""
        ours = self.keymap.to_ours(foreign)
        skipped = bool(self.skipped) and ours is not None and ours.startswith(self.skipped)
        return skipped or self.keymap.is_dropped(foreign)

    def has(self, prefix: str) -> bool:
        """Return whether a tensor belongs under this parameter prefix, given or not."""
        found = (self.keymap.to_ours(name) for name in self.store.infos)
        return any(ours is not None and ours.startswith(prefix) for ours in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDirectory:
    """Content of a directory with a config.json."""

    path: Path
    raw: JsonObject
    config: ModelConfig
    keys: KeyReport
    parts: tuple[WeightPart, ...] = ()
    tower_path: Path | None = None
    notes: tuple[str, ...] = ()


def open_weights(directory: Path, *, weights: bool = True) -> WeightStore:
    """Open the tensors of a full model; none where there are no files, or none are wanted."""
    return WeightStore.of_files(find_weight_files(directory) if weights else ())


def open_directory(
    path: Path,
    *,
    extra: Sequence[WeightPart] = (),
    base: Path | None = None,
    weights: bool = True,
    fetch: bool = True,
) -> CheckpointDirectory:
    """Open a checkpoint directory.

    Args:
        path: with config.json.
        extra: weights that belong to it but lie elsewhere (the base of an adapter); they may
            bring the vision tower.
        base: the model under an adapter or a projector; it may have moved with its tower.
        weights: False looks at the small files only and leaves `parts` empty.
        fetch: False leaves the weights of a vision tower on the hub where they are.

    Raises:
        MissingFileError: config.json, the vision tower or a shard is missing.
        ConfigError: config.json cannot be followed.
        CheckpointError: a file is damaged.
    """
    raw = read_json(path / "config.json")
    moved = None if base is None else _tower_of_base(raw, path, base)
    if moved is not None:
        raw = {**raw, "mm_vision_tower": str(moved)}
    store = open_weights(path, weights=weights)
    tower_path = _tower_directory(path, raw, fetch=fetch)
    tower_config = read_json(tower_path / "config.json") if tower_path else None
    generation = read_optional_json(path / "generation_config.json")
    config, keys = parse_config(
        raw,
        tower=tower_config,
        preprocessor=preprocessor_of(tower_path or path),
        generation=generation,
        weight_names=frozenset(store.infos),
    )
    keymap = keymap_of(raw)
    own = (WeightPart("checkpoint", store, keymap),) if store.infos else ()
    parts = (*extra, *own)
    notes = (*_pixel_notes(tower_path or path, config), *sampling_notes(generation or {}))
    if moved is not None:
        notes += (f"the vision tower is the base's, {moved}: the one that was named is gone",)
    if tower_path is not None and weights:
        parts, more = _with_tower(parts, config, tower_path, fetch=fetch)
        notes += more
    return CheckpointDirectory(
        path=path,
        raw=raw,
        config=config,
        keys=keys,
        parts=parts,
        tower_path=tower_path,
        notes=notes,
    )


def keymap_of(raw: JsonObject) -> KeyMap:
    """Return the names that the tensors beside this config.json have."""
    if is_hf_llava(raw):
        return HF_LLAVA
    if not is_original(raw):
        return LANGUAGE_MODEL
    return original_keymap(parse_text_config(raw))


def _tower_of_base(raw: JsonObject, path: Path, base: Path) -> Path | None:
    """Find the base's vision tower, where config.json names a folder that is gone.

    Raises:
        MissingFileError: that folder is gone and the base has no tower either.
    """
    own = named_tower(raw)
    if own is None or HUB_ID.fullmatch(own) or find_directory(own, (path,)) is not None:
        return None
    other = named_tower(read_json(base / "config.json"))
    found = None if other is None else find_directory(other, (base,))
    if found is None:
        raise MissingFileError(
            f"the vision tower of {path} (mm_vision_tower in its config.json) is not there: "
            f"{own!r} is no directory, and the base {base} has no folder of a tower: write where "
            "it lies now into the key, or give a base that has it (--base)"
        )
    return found


def _tower_directory(path: Path, raw: JsonObject, *, fetch: bool) -> Path | None:
    """Find the vision tower that the original layout names."""
    name = named_tower(raw) if is_original(raw) else None
    if name is None:
        return None
    try:
        return resolve(name, beside=(path,), weights=fetch)
    except CheckpointError as error:
        raise MissingFileError(
            f"the vision tower of {path} (mm_vision_tower in its config.json) is not there: {error}"
        ) from error


def _with_tower(
    parts: tuple[WeightPart, ...], config: ModelConfig, tower_path: Path, *, fetch: bool
) -> tuple[tuple[WeightPart, ...], tuple[str, ...]]:
    """Return the parts with the tower from where the original takes it.

    Source: LLaVA clip_encoder.py: a tower that was tuned (unfreeze_mm_vision_tower) comes from the
    checkpoint, a frozen one from the directory or repository that mm_vision_tower names.

    Raises:
        MissingWeightsError: a tuned tower without weights in the checkpoint.
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
    store = open_weights(tower_path, weights=fetch or bool(complete_weights(tower_path)))
    if not store.infos:
        if not fetch:
            return parts, ("the weights of the vision tower are on the hub, not yet on this disk",)
        if inside:
            return parts, (f"the vision tower is the checkpoint's: {tower_path} has no weights",)
        raise MissingFileError(f"no weights of the vision tower in {tower_path}")
    tower = WeightPart("vision tower", store, VISION_TOWER)
    if not inside:
        return (tower, *parts), ()
    kept = tuple(
        WeightPart(part.label, part.store, part.keymap, (*part.skipped, TOWER)) for part in parts
    )
    note = (
        f"the checkpoint holds a vision tower, but it was frozen: {tower_path} is read instead, "
        "as the original does"
    )
    return (tower, *kept), (note,)


def preprocessor_of(path: Path) -> JsonObject | None:
    """Read preprocessor_config.json, or its successor inside processor_config.json."""
    found = read_optional_json(path / "preprocessor_config.json")
    if found is not None:
        return found
    newer = (read_optional_json(path / "processor_config.json") or {}).get("image_processor")
    return newer if is_object(newer) else None


def _pixel_notes(path: Path, config: ModelConfig) -> tuple[str, ...]:
    if config.vision is None or preprocessor_of(path) is not None:
        return ()
    return (
        f"no preprocessor_config.json in {path}: sizes and colours are those of a "
        f"{config.vision.family} tower of {config.vision.image_size} pixels",
    )


def find_beside(name: str, path: Path) -> Path | None:
    """Find a directory by a name relative to a checkpoint, its parent or the working one."""
    return find_directory(name, (path, path.parent))


# Numbers that a base and what was trained on it must share.
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

    Args:
        given: by the caller.
        named: by the checkpoint: adapter_config.json or config.json.
        path: of the checkpoint; a relative name may start from it or from its parent.
        revision: of the named base, where it is a repository of the hub.
        fetch: False leaves the weights of a hub repository where they are.

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
    found = find_beside(named, path)
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

    None where they are on the hub and stay there (fetch=False).

    Raises:
        MissingFileError: no config.json or no weights there.
    """
    raw = read_json(directory / "config.json")
    store = open_weights(directory, weights=fetch or bool(complete_weights(directory)))
    if not store.infos and not fetch:
        return None
    if not store.infos:
        raise MissingFileError(
            f"no weights in the base {directory}: looked for model.safetensors, pytorch_model.bin "
            "and their shards"
        )
    return WeightPart(BASE, store, keymap_of(raw))


def check_base(expected: TextConfig, base: Path) -> int:
    """Check a base against what was trained on it; return the rows of its vocabulary.

    Raises:
        ShapeMismatchError: a number differs; the message names every one.
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

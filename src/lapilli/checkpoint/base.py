"""The language model under an adapter or a projector: where it lies and whether it fits."""

from dataclasses import fields
from pathlib import Path

from lapilli.checkpoint.directory import BASE, WeightPart, find_beside, keymap_of, open_weights
from lapilli.checkpoint.files import read_json
from lapilli.checkpoint.source import HUB_ID, resolve
from lapilli.checkpoint.weights import complete_weights
from lapilli.config.model import TextConfig
from lapilli.config.parse import parse_text_config
from lapilli.errors import CheckpointError, MissingFileError, ShapeMismatchError

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
    """The directory of the base.

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
    """The weights of a base: a plain language model, or a LLaVA of either layout.

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


def refuse_wrong_base(expected: TextConfig, base: Path) -> int:
    """Compare a base with what was trained on it; how many rows its vocabulary has.

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

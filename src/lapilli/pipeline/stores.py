"""Stores of a model's modalities: an id in the place of a medium is looked up.

    MediaPart("shoe", "item")  --Stores-->  vectors [T_s, W]  --prepare of a `vector` modality-->
                                            features [T_s, D] of any other: they stand as they are

Knows ids and vectors; must not know prompts.
"""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.config.reader import shown
from lapilli.errors import ConfigError, MediaError, StoreError
from lapilli.modality.text import TextModality
from lapilli.modality.vector import VectorModality
from lapilli.model import VisionLanguageModel
from lapilli.store import Store
from lapilli.store.encode import fingerprint


@dataclass(frozen=True, slots=True)
class _Attached:
    """A store, and the encoder whose vectors its modality takes; None: any."""

    store: Store
    encoder: str | None


class Stores(MutableMapping[str, Store]):
    """Stores by the names of modalities: `chat.stores["item"] = "path"`.

    Where a modality has a store, a text or a whole number in its place is an id of it, and a list
    of them several entries one after the other. The entries of a `vector` modality's are what its
    projector reads, those of any other the features that its module makes, as wide as the language
    model.

    Args:
        model: whose modalities they are.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self._attached: dict[str, _Attached] = {}

    def __getitem__(self, name: str) -> Store:
        return self._attached[name].store

    def __setitem__(self, name: str, given: object) -> None:
        """Attach a Store, or the one in a folder.

        Raises:
            ConfigError: no such modality, or one whose media have names of their own.
            StoreError: no store, entries of another size, or none of the encoder that the modality
                was trained with.
        """
        modality = self._modality(name)
        if not isinstance(given, Store | str | Path):
            raise ConfigError(
                f"the store of {name!r} is {shown(given)}: expected a Store or a path"
            )
        store = given if isinstance(given, Store) else Store.open(given)
        width, tokens = self._sizes(modality)
        found = (store.width, store.tokens)
        if store.width != width or tokens not in (None, store.tokens):
            raise StoreError(
                f"{store.path} has entries of {found[1]} x {found[0]}, and the modality {name!r} "
                f"takes {tokens or 'any number of vectors'} x {width}: build a store for it"
            )
        encoder = _encoder_of(modality)
        if encoder is not None:
            store.check_encoder(encoder)
        self._attached[name] = _Attached(store, encoder)

    def __delitem__(self, name: str) -> None:
        del self._attached[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._attached)

    def __len__(self) -> int:
        return len(self._attached)

    def has_id(self, name: str, source: object) -> bool:
        """Return whether a source of this modality is an id, or several.

        Where there is a store, whole numbers in a list are ids too: a vector has a point in it.
        """
        if name not in self._attached:
            return False
        if isinstance(source, list | tuple):
            return bool(source) and all(map(_is_one, source))
        return _is_one(source)

    def look_up(self, name: str, source: Any) -> Any:  # noqa: ANN401 - as the modality prepares it
        """Return the entry of an id, or the entries of several, as one prepared medium.

        Raises:
            StoreError: an id that is not there, or whose entry another encoder made.
            MediaError: an entry with NaN or infinite numbers, as only a damaged file has.
        """
        attached = self._attached[name]
        try:
            entry = attached.store.get(source, encoder=attached.encoder).flatten(0, 1)
        except StoreError as error:
            raise StoreError(f"{name}: {error}") from error
        if not bool(entry.isfinite().all()):
            raise MediaError(
                f"{name}: the entry of {shown(source)} in {attached.store.path} contains NaN or "
                "infinity: build the store again"
            )
        modality = self._modality(name)
        return modality.prepare(entry) if type(modality) is VectorModality else entry

    def _modality(self, name: str) -> Any:  # noqa: ANN401 - a module of any kind
        known = [one for one in self._model.modalities if one != "image"]
        if name not in known:
            raise ConfigError(
                f"a store is given for {shown(name)}: expected a modality that the checkpoint "
                f"declares besides pictures, it has {', '.join(known) or 'none'}"
            )
        return self._model.modality(name)

    def _sizes(self, modality: object) -> tuple[int, int | None]:
        """Return the width and the number of vectors that an entry must have; None: any."""
        if type(modality) is VectorModality:  # a class over it may read something else
            return modality.config.vision_size, None
        tokens = modality.config.tokens if isinstance(modality, TextModality) else None
        return self._model.language_model.config.hidden_size, tokens


def _encoder_of(modality: object) -> str | None:
    """Return the fingerprint of what has to have made the entries; None: nobody says."""
    if isinstance(modality, TextModality):
        return fingerprint(modality)
    return modality.made_by if type(modality) is VectorModality else None


def is_id(source: object) -> bool:
    """Return whether something without a store is an id or several: no list of numbers is."""
    if isinstance(source, list | tuple):
        return bool(source) and all(isinstance(one, str) for one in source)
    return _is_one(source)


def _is_one(source: object) -> bool:
    return isinstance(source, str | int | np.integer) and not isinstance(source, bool)

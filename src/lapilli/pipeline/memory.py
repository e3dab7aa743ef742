"""What a conversation keeps from turn to turn: its media, and the KV cache of the plain loop.

Knows parts, spans and ids; must not know templates, files or how tokens are chosen.
"""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from lapilli.model.vlm import VisionLanguageModel
from lapilli.nn.kv_cache import KVCache
from lapilli.prompt.encode import EncodedPrompt
from lapilli.prompt.message import MediaPart
from lapilli.shapes import Tensor


@dataclass(slots=True)
class Memory:
    """What one conversation need not compute again.

    A medium is known by the message part that shows it: the same object, because two pictures of
    one path may differ. Positions that the cache holds are known by their token id or, under a
    medium, by that medium's number. Several turns of a conversation may come at the same time.

    Attributes:
        parts: media that were shown.
        items: per part what its modality prepared, and features [n, D] once they are computed.
        cache: keys and values of the latest prompt and answer.
        cached: what stands at its positions.
        lock: held while something of this is changed.
    """

    parts: list[MediaPart] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    cache: KVCache | None = None
    cached: list[int] = field(default_factory=list)
    lock: AbstractContextManager[bool] = field(default_factory=threading.RLock)

    def number(self, part: MediaPart) -> int | None:
        """Which of the known media this part shows."""
        return next((i for i, known in enumerate(self.parts) if known is part), None)

    def item(self, part: MediaPart) -> Any | None:  # noqa: ANN401 - every modality has its own
        """What is kept of this part."""
        number = self.number(part)
        return None if number is None else self.items[number]

    def add(self, part: MediaPart, item: Any) -> None:  # noqa: ANN401
        """Keep a part, unless it is known."""
        with self.lock:
            if self.number(part) is None:
                del self.items[len(self.parts) :]  # what an interrupt left between these lines
                self.items.append(item)
                self.parts.append(part)

    def embed_new(self, model: VisionLanguageModel) -> None:
        """Compute the features of all media that have none yet."""
        with self.lock:
            waiting: dict[str, list[int]] = {}
            for i, part in enumerate(self.parts):
                if not isinstance(self.items[i], Tensor):
                    waiting.setdefault(part.modality, []).append(i)
            for name, numbers in waiting.items():
                features = model.modality(name).embed([self.items[i] for i in numbers])
                for i, item in zip(numbers, features, strict=True):
                    self.items[i] = item

    def positions(self, prompt: EncodedPrompt, media: Sequence[MediaPart]) -> list[int]:
        """What stands at every position of a prompt whose media are all known."""
        positions = list(prompt.input_ids)
        for span, part in zip(prompt.spans, media, strict=True):
            number = next(i for i, known in enumerate(self.parts) if known is part)
            # Below every id; equal numbers mean the same features.
            positions[span.start : span.start + span.length] = [-1 - number] * span.length
        return positions

    def take_cache(self, positions: list[int]) -> KVCache | None:
        """The cache, cut to what it shares with these positions; whoever takes it owns it.

        At least the last position is left to be read, because its logits are not kept.
        """
        with self.lock:
            cache, self.cache = self.cache, None
            cached = self.cached
        if cache is not None:
            known = zip(cached[: cache.length], positions[:-1], strict=False)
            cache.truncate(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], known)))
        return cache

    def keep_cache(self, cache: KVCache | None, cached: list[int]) -> None:
        """Keep the cache of an answer that is over, and what stands at its positions."""
        with self.lock:
            self.cache = None  # never a cache with the positions of another
            self.cached = cached
            self.cache = cache

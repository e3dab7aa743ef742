"""Features of media by content: tower and projector run once per picture, whoever asks.

Knows keys, tensors and bytes; must not know what a picture is.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from lapilli.shapes import Float, Tensor

Key = tuple[object, ...]


@dataclass(slots=True)
class FeatureStats:
    """Counts since the cache was made."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class FeatureCache:
    """The features that were used last, up to a number of bytes.

    Several engines and threads may share one.

    Args:
        max_bytes: of all tensors together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.stats = FeatureStats()
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept now."""
        return self._bytes

    def get(self, key: Key) -> Float[Tensor, "n D"] | None:
        """The features of this key, now the ones used last."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self.stats.misses += 1
                return None
            self._kept.move_to_end(key)
            self.stats.hits += 1
            return found

    def put(self, key: Key, features: Float[Tensor, "n D"]) -> None:
        """Keep features; the ones unused for longest go until there is room."""
        if features.nbytes > self.max_bytes:
            return
        with self._lock:
            old = self._kept.pop(key, None)
            self._bytes += features.nbytes - (0 if old is None else old.nbytes)
            self._kept[key] = features
            while self._bytes > self.max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.nbytes
                self.stats.evictions += 1

    def recount(self) -> None:
        """Count the bytes anew, after a change that was broken off."""
        with self._lock:
            self._bytes = sum(features.nbytes for features in self._kept.values())

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

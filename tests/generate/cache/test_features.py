"""What was used last is kept, up to a number of bytes."""

import torch

from lapilli.generate.cache.features import FeatureCache


def features(value: float, rows: int = 2) -> torch.Tensor:
    return torch.full((rows, 4), float(value))  # 16 bytes a row


def test_found_again():
    cache = FeatureCache(100)
    assert cache.get(("a", 1)) is None
    cache.put(("a", 1), features(1))
    assert torch.equal(cache.get(("a", 1)), features(1))
    assert cache.get(("a", 2)) is None
    assert (cache.stats.hits, cache.stats.misses) == (1, 2)


def test_unused_for_longest_goes_first():
    cache = FeatureCache(64)
    cache.put(("a",), features(1))
    cache.put(("b",), features(2))
    cache.get(("a",))
    cache.put(("c",), features(3))
    assert cache.get(("b",)) is None
    assert cache.get(("a",)) is not None
    assert cache.num_bytes == 64
    assert cache.stats.evictions == 1


def test_same_key_counts_once():
    cache = FeatureCache(64)
    for _ in range(5):
        cache.put(("a",), features(1))
    assert cache.num_bytes == 32


def test_too_large_is_not_kept_and_evicts_nothing():
    cache = FeatureCache(64)
    cache.put(("a",), features(1))
    cache.put(("b",), features(2, rows=5))
    assert cache.get(("b",)) is None
    assert cache.get(("a",)) is not None


def test_clear():
    cache = FeatureCache(64)
    cache.put(("a",), features(1))
    cache.clear()
    assert cache.num_bytes == 0
    assert cache.get(("a",)) is None

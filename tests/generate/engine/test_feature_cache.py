"""Digests of contents differ, the weight watch notices every change, and the cache is LRU."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lapilli.generate.engine.feature_cache import FeatureCache, WeightWatch, content_digest
from lapilli.geometry import ImageSize
from lapilli.lora import LoraConfig, inject, merge
from lapilli.modality.image.pixels import PreparedImage


@dataclass(frozen=True)
class Other:
    values: torch.Tensor


def image(fill: float = 0.0, height: int = 10) -> PreparedImage:
    return PreparedImage(torch.full((1, 3, 4, 4), fill), ImageSize(height, 20))


def test_equal_contents_have_equal_digests():
    assert content_digest(image()) == content_digest(image())


def test_different_contents_differ():
    changed = image()
    changed.pixel_values[0, 2, 3, 3] = 1e-9
    contents = [
        image(),
        changed,
        image(height=11),
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(8, dtype=torch.bfloat16),
        Other(torch.zeros(4)),
        "a",
        b"a",
        (1, 2),
        [1, 2],
        (12,),
        1,
        1.0,
        True,
        None,
    ]
    assert len({content_digest(content) for content in contents}) == len(contents)


def test_unknown_types_get_a_new_digest_every_time():
    thing = object()
    assert content_digest(thing) != content_digest(thing)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    made[1].limit = [3]
    made[1].register_buffer("extra", None)
    return made


def test_the_version_stays_while_nothing_changes(model):
    watch = WeightWatch(model)
    before = watch.version
    model(torch.zeros(1, 3))
    assert watch.version == before


def change_value(model):
    with torch.no_grad():
        model[0].weight[0, 0] += 1


def change_buffer(model):
    model[1].running_mean.zero_()


def replace_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach())


def replace_data(model):
    model[0].weight.data = model[0].weight.data.clone()


def replace_module(model):
    model[1] = nn.Identity()


def train(model):
    model.train()


def change_setting(model):
    model[1].eps = 1.0


def set_number_for_record(model):
    model[1].limit = 3


def hide_child(model):
    model[0] = None


def fill_empty_buffer(model):
    model[1].extra = torch.zeros(3)


def hook(model):
    model[0].register_forward_hook(lambda *_: None)


def hook_before(model):
    model[1].register_forward_pre_hook(lambda *_: None)


def take_another_forward(model):
    model[0].forward = model[1].forward


def add_lora(model):
    inject(model, LoraConfig(rank=1, alpha=1, targets=("0",)))


CHANGES = [
    change_value,
    change_buffer,
    replace_parameter,
    replace_data,
    replace_module,
    train,
    change_setting,
    set_number_for_record,
    hide_child,
    fill_empty_buffer,
    hook,
    hook_before,
    take_another_forward,
    add_lora,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_begins_a_new_version(model, change):
    watch = WeightWatch(model)
    before = watch.version
    assert watch.version == before  # by a glance
    change(model)
    after = watch.version
    assert after != before
    assert watch.version == after


def test_another_hook_is_a_change(model):
    first = model[0].register_forward_hook(lambda *_: None)
    watch = WeightWatch(model)
    before = watch.version
    assert watch.version == before
    first.remove()
    hook(model)
    assert watch.version != before


def test_versions_never_come_again(model):
    add_lora(model)
    watch = WeightWatch(model)
    versions = [watch.version]
    for scaling in (0.0, 1.0, 0.0):  # off, on, off
        model[0].scaling = scaling
        versions.append(watch.version)
    merge(model)
    versions.append(watch.version)
    watch.reset()
    versions.append(watch.version)
    assert len(set(versions)) == len(versions)


def test_tensors_of_inference_mode_are_watched_by_identity():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    watch = WeightWatch(model)
    before = watch.version
    model.bias = nn.Parameter(torch.zeros(2))
    assert watch.version != before


def test_equal_settings_are_no_change(model):
    watch = WeightWatch(model)
    before = watch.version
    model[1].eps = float(str(model[1].eps))  # another object
    model[1].limit = [4]  # no plain setting
    assert watch.version == before


@pytest.mark.slow
def test_replaced_weights_are_freed_at_once(model):
    watch = WeightWatch(model)
    assert watch.version == watch.version
    watch.release()
    gone = weakref.ref(model[0].weight)
    model[0] = nn.Linear(3, 3)
    gc.collect()
    assert gone() is None
    assert watch.version


def features(value: float, rows: int = 2) -> torch.Tensor:
    return torch.full((rows, 4), float(value))  # 16 bytes a row


def test_cached_features_are_found():
    cache = FeatureCache(100)
    assert cache.get(("a", 1)) is None
    cache.put(("a", 1), features(1))
    assert torch.equal(cache.get(("a", 1)), features(1))
    assert cache.get(("a", 2)) is None
    assert (cache.stats.hits, cache.stats.misses) == (1, 2)


def test_the_least_recently_used_features_are_evicted_first():
    cache = FeatureCache(64)
    cache.put(("a",), features(1))
    cache.put(("b",), features(2))
    cache.get(("a",))
    cache.put(("c",), features(3))
    assert cache.get(("b",)) is None
    assert cache.get(("a",)) is not None
    assert cache.num_bytes == 64
    assert cache.stats.evictions == 1


def test_the_bytes_of_a_key_count_once():
    cache = FeatureCache(64)
    for _ in range(5):
        cache.put(("a",), features(1))
    assert cache.num_bytes == 32


def test_features_larger_than_the_cache_are_not_kept_and_evict_nothing():
    cache = FeatureCache(64)
    cache.put(("a",), features(1))
    cache.put(("b",), features(2, rows=5))
    assert cache.get(("b",)) is None
    assert cache.get(("a",)) is not None


def test_clear_discards_everything():
    cache = FeatureCache(64)
    cache.put(("a",), features(1))
    cache.clear()
    assert cache.num_bytes == 0
    assert cache.get(("a",)) is None

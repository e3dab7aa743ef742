import numpy as np
import pytest

from lapilli.errors import ConfigError
from pebble import pool as pool_module
from pebble.caption import caption
from pebble.draw import draw, model_pixels
from pebble.pool import Pool, PoolSpec, draw_pool, draw_shard
from pebble.sample import sample_scene


@pytest.mark.slow
def test_a_pool_holds_what_its_seeds_draw(tmp_path):
    pool = draw_pool(tmp_path, PoolSpec(first_seed=50, num_scenes=20, side=32, shard=8), workers=1)
    assert len(pool) == 20
    assert pool.pixels.shape == (20, 3, 32, 32)
    assert pool.pixels.dtype == np.uint8
    samples = list(pool.samples())
    assert len(samples) == 20
    for i in (0, 7, 8, 19):
        scene = sample_scene(pool.seed(i))
        assert samples[i]["id"] == str(50 + i)
        assert samples[i]["caption"] == caption(scene)
        np.testing.assert_array_equal(pool.pixels[i], model_pixels(draw(scene), 32))


@pytest.mark.slow
def test_an_interrupted_pool_goes_on_with_the_missing_shards(tmp_path, monkeypatch):
    spec = PoolSpec(first_seed=0, num_scenes=24, side=16, shard=8)
    whole = draw_pool(tmp_path / "whole", spec, workers=1)
    drawn = []

    def stopping(folder, spec, shard):
        if shard == 1 and len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(shard)
        draw_shard(folder, spec, shard)

    monkeypatch.setattr(pool_module, "draw_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        draw_pool(tmp_path / "parts", spec, workers=1)
    assert drawn == [0]
    drawn.append(-1)
    parts = draw_pool(tmp_path / "parts", spec, workers=1)
    assert drawn == [0, -1, 1, 2]
    np.testing.assert_array_equal(parts.pixels, whole.pixels)
    assert list(parts.samples()) == list(whole.samples())


@pytest.mark.slow
def test_processes_draw_the_same_pool(tmp_path):
    spec = PoolSpec(first_seed=9, num_scenes=21, side=16, shard=8)
    one = draw_pool(tmp_path / "one", spec, workers=1)
    two = draw_pool(tmp_path / "two", spec, workers=2)
    np.testing.assert_array_equal(one.pixels, two.pixels)
    assert list(one.samples()) == list(two.samples())


def test_another_pool_in_the_folder_is_refused(tmp_path):
    draw_pool(tmp_path, PoolSpec(first_seed=0, num_scenes=2, side=16), workers=1)
    with pytest.raises(
        ConfigError, match=r"holds another pool: .*'side': 16.* wanted .*'side': 32"
    ):
        draw_pool(tmp_path, PoolSpec(first_seed=0, num_scenes=2, side=32), workers=1)
    assert len(Pool(tmp_path)) == 2


@pytest.mark.parametrize(("first_seed", "num_scenes", "side"), [(0, 0, 32), (0, 1, 8), (-1, 1, 32)])
def test_an_impossible_pool_is_refused(first_seed, num_scenes, side):
    with pytest.raises(ConfigError, match="a pool needs 1 or more scenes"):
        PoolSpec(first_seed=first_seed, num_scenes=num_scenes, side=side)

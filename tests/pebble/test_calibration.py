"""The calibration file is what a data set reads, with pictures as a person would hand them over."""

import numpy as np
import pytest
from PIL import Image

from lapilli.errors import ConfigError
from lapilli.train.data import open_dataset
from lapilli.train.recipe import SourceRecipe
from pebble.boundary import _FIRST_SCENE
from pebble.calibration import FIRST_SEED, main, write_calibration
from pebble.draw import draw
from pebble.folder import FIRST_SEED as FIRST_EXAMPLE
from pebble.typed import wide_scene


def test_conversations_are_read_with_their_pictures(tmp_path):
    main([str(tmp_path), "--samples", "3"])
    path = tmp_path / "pebble_calibration.json"
    dataset = open_dataset([SourceRecipe(path=str(path), images=str(tmp_path))])
    assert len(dataset) == 3
    for index in range(3):
        sample = dataset.sample(index)
        assert len(sample.media) == 1
        assert len(sample.messages) >= 2
    picture = tmp_path / "pebble_pictures" / f"{FIRST_SEED + 2}.png"
    with Image.open(picture) as found:
        np.testing.assert_array_equal(found, draw(wide_scene(FIRST_SEED + 2)))


def test_the_first_samples_do_not_depend_on_the_number(tmp_path):
    few, many = (write_calibration(tmp_path / str(n), n).read_text() for n in (2, 3))
    assert many.startswith(few.removesuffix("\n]\n"))


def test_its_scenes_are_between_those_of_other_uses():
    assert FIRST_EXAMPLE + 10_000_000 < FIRST_SEED < _FIRST_SCENE - 10_000_000


def test_no_samples_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="1 or more samples; got 0"):
        write_calibration(tmp_path, 0)

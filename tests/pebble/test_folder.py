"""pebble's world on disk is what a data set reads, picture for picture what pebble sees."""

import numpy as np
from PIL import Image

from lapilli.train.data import open_dataset
from lapilli.train.recipe import SourceRecipe
from pebble.draw import draw, model_pixels
from pebble.folder import FIRST_SEED, write_folder
from pebble.sample import sample_scene


def test_written_scenes_are_read_as_samples(tmp_path):
    write_folder(tmp_path, 3)
    path = tmp_path / "conversations.jsonl"
    source = SourceRecipe(path=str(path), images=str(tmp_path / "pictures"))
    dataset = open_dataset([source])
    assert len(dataset) == 3
    sample = dataset.sample(2)
    assert len(sample.media) == 1
    assert len(sample.messages) >= 2
    scene = sample_scene(FIRST_SEED + 2)
    with Image.open(tmp_path / "pictures" / f"{scene.seed}.png") as picture:
        found = np.asarray(picture).transpose(2, 0, 1)
    np.testing.assert_array_equal(found, model_pixels(draw(scene), 128))
    before = path.read_bytes()
    write_folder(tmp_path, 3)
    assert path.read_bytes() == before

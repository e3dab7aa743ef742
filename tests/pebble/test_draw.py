from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lapilli.config.model import ImageConfig, PixelConfig
from lapilli.geometry import ImageSize
from lapilli.modality.image.modes.pad import MODE
from pebble.draw import PAD_RGB, draw, model_pixels
from pebble.outside import OUTSIDE_KINDS, outside_picture
from pebble.palette import contrast
from pebble.sample import sample_scene
from pebble.scene import SHAPES, Background, Finish, Object, Scene

PLAIN = Background(
    texture="plain", near=(255, 255, 255), far=(255, 255, 255), angle=0.0, strength=0.0
)
UNTOUCHED = Finish(jpeg_quality=None, blur=0.0)


def one_object(shape: str, **changes) -> Scene:
    item = Object(
        shape=shape, colour="red", size="large", cell=4, centre=(0.5, 0.5), diameter=0.3,
        rgb=(230, 20, 20), angle=0.0,
    )  # fmt: skip
    return Scene(
        seed=1, size=ImageSize(240, 240), background=PLAIN, finish=UNTOUCHED,
        objects=(replace(item, **changes),),
    )  # fmt: skip


def ink(scene: Scene) -> np.ndarray:
    """Where the picture is not white."""
    return np.asarray(draw(scene)).min(axis=2) < 128


def test_a_scene_gives_the_same_picture_every_time():
    for seed in range(20):
        scene = sample_scene(seed)
        assert draw(scene).tobytes() == draw(scene).tobytes()
        assert draw(scene).size == (scene.size.width, scene.size.height)


@pytest.mark.parametrize("seed", range(25))
def test_objects_show_their_colour_at_their_place(seed):
    scene = sample_scene(seed, "objects")
    scene = replace(scene, finish=UNTOUCHED)
    pixels = np.asarray(draw(scene))
    for item in scene.objects:
        y = int(item.centre[0] * scene.size.height)
        x = int(item.centre[1] * scene.size.width)
        if item.shape == "ring":
            x += round(0.39 * item.diameter * scene.unit)
        around = pixels[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3)
        shown = [(int(r), int(g), int(b)) for r, g, b in around]
        assert min(contrast(rgb, item.rgb) for rgb in shown) < 12


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_centred_and_as_large_as_its_diameter_says(shape):
    rows, columns = np.nonzero(ink(one_object(shape)))
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    assert 0.85 * 72 <= extent <= 1.2 * 72
    assert abs(rows.mean() - 119.5) < 3
    assert abs(columns.mean() - 119.5) < 2


def test_shapes_differ_in_how_much_of_their_box_they_fill():
    fills = {}
    for shape in SHAPES:
        shown = ink(one_object(shape))
        rows, columns = np.nonzero(shown)
        fills[shape] = shown.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    assert fills["square"] > 0.97
    assert fills["circle"] == pytest.approx(np.pi / 4, abs=0.03)
    assert fills["ring"] == pytest.approx(np.pi / 4 * (1 - 0.55**2), abs=0.04)
    assert fills["triangle"] == pytest.approx(0.5, abs=0.03)
    assert fills["cross"] == pytest.approx(0.51, abs=0.03)
    assert fills["star"] < 0.42
    assert not ink(one_object("ring"))[119, 119]


def test_turning_a_square_widens_it():
    assert np.ptp(np.nonzero(ink(one_object("square", angle=12.0)))[0]) > np.ptp(
        np.nonzero(ink(one_object("square")))[0]
    )


@pytest.mark.slow
def test_writing_and_digits_stay_inside_the_picture():
    for seed in range(60):
        for kind in ("writing", "digit"):
            scene = replace(sample_scene(seed, kind), background=PLAIN, finish=UNTOUCHED)
            mark = scene.writing or scene.digit
            scene = replace(
                scene,
                writing=scene.writing and replace(scene.writing, rgb=(0, 0, 0)),
                digit=scene.digit and replace(scene.digit, rgb=(0, 0, 0)),
            )
            shown = ink(scene)
            assert shown.sum() > 30, mark
            edge = np.concatenate([shown[0], shown[-1], shown[:, 0], shown[:, -1]])
            assert not edge.any(), mark


def test_each_word_can_be_drawn_in_every_font():
    scene = sample_scene(0, "writing")
    assert scene.writing is not None
    seen = set()
    for font in range(8):
        mark = replace(scene.writing, text="egg", drawn="egg", font=font, rgb=(0, 0, 0))
        plain = replace(scene, background=PLAIN, finish=UNTOUCHED, writing=mark)
        seen.add(draw(plain).tobytes())
    assert len(seen) == 8


def test_jpeg_and_blur_change_the_picture_a_little():
    scene = one_object("star")
    sharp = np.asarray(draw(scene), dtype=np.float64)
    for finish in (Finish(jpeg_quality=50, blur=0.0), Finish(jpeg_quality=None, blur=0.005)):
        other = np.asarray(draw(replace(scene, finish=finish)), dtype=np.float64)
        assert 0.01 < np.abs(other - sharp).mean() < 8


def test_textures_keep_the_mean_colour():
    for texture in ("plain", "gradient", "noise", "stripes", "paper"):
        ground = Background(
            texture=texture, near=(180, 190, 170), far=(180, 190, 170), angle=30.0, strength=5.0
        )
        scene = replace(one_object("circle"), objects=(), background=ground)
        pixels = np.asarray(draw(scene), dtype=np.float64)
        np.testing.assert_allclose(pixels.mean(axis=(0, 1)), ground.near, atol=3)


@pytest.mark.parametrize("size", [(64, 128), (128, 64), (100, 100), (301, 200), (77, 154)])
def test_model_pixels_are_what_the_image_room_makes(size):
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    )
    ours = model_pixels(picture, 96)
    pixels = PixelConfig(crop_size=ImageSize(96, 96), shortest_edge=96)
    theirs = MODE.prepare(picture, ImageConfig(aspect="pad", pixels=pixels)).pixel_values[0]
    mean = torch.tensor(pixels.mean)[:, None, None]
    std = torch.tensor(pixels.std)[:, None, None]
    torch.testing.assert_close(
        theirs, (torch.from_numpy(ours) / 255.0 - mean) / std, atol=1e-5, rtol=1e-5
    )


def test_padding_has_the_mean_colour():
    pixels = model_pixels(Image.new("RGB", (100, 50), (255, 255, 255)), 64)
    assert tuple(pixels[:, 2, 32]) == PAD_RGB
    assert tuple(pixels[:, 32, 32]) == (255, 255, 255)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OUTSIDE_KINDS)
def test_pictures_from_outside_repeat_and_differ(kind):
    pictures = [outside_picture(seed, kind) for seed in range(6)]
    assert [p.tobytes() for p in pictures] == [
        outside_picture(seed, kind).tobytes() for seed in range(6)
    ]
    assert len({p.tobytes() for p in pictures}) == 6
    assert all(p.mode == "RGB" and min(p.size) >= 96 and max(p.size) <= 640 for p in pictures)
    assert all(np.asarray(p).std() > 5 for p in pictures)

"""pebble's world as a folder that any trainer reads; knows scenes and LLaVA's JSON, no model.

folder/pictures/200000000.png     padded to a square, as pebble sees it
folder/conversations.jsonl        {"id": ..., "image": "200000000.png", "conversations": [...]}
"""

import json
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from pebble.conversation import as_sample, draw_questions
from pebble.draw import draw, model_pixels
from pebble.sample import sample_scene
from pebble.talk import without_long

FIRST_SEED: Final = 200_000_000  # pebble itself learned from seeds below this


def write_folder(
    folder: Path,
    num_scenes: int,
    *,
    first_seed: int = FIRST_SEED,
    side: int = 128,
    questions: tuple[int, int] = (8, 14),
    long_share: float = 0.6,
) -> None:
    """Pictures and conversations, as far as they are missing.

    Args:
        folder: is made.
        num_scenes: one picture and one conversation each.
        first_seed: of scene 0.
        side: pixels of the square pictures.
        questions: fewest and most questions about a picture.
        long_share: part of the long answers that are kept.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(first_seed, first_seed + num_scenes):
        scene = sample_scene(seed)
        file = pictures / f"{seed}.png"
        if not file.exists():
            pixels = model_pixels(draw(scene), side).transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(pixels)).save(file.with_suffix(".part"), "PNG")
            file.with_suffix(".part").replace(file)
        rng = np.random.default_rng([seed, 43])
        turns = draw_questions(scene, rng, least=questions[0], most=questions[1])
        turns = without_long(turns, rng, long_share)
        sample = as_sample(str(seed), turns, opening="<image>\n", image=file.name)
        lines.append(json.dumps(sample))
    staged = folder / "conversations.part"
    staged.write_text("\n".join(lines) + "\n", encoding="utf-8")
    staged.replace(folder / "conversations.jsonl")

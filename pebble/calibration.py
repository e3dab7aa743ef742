"""`python -m pebble.calibration OUT`: conversations to calibrate quantization on, LLaVA's JSON.

OUT/pebble_calibration.json            [{"id": ..., "image": ..., "conversations": [...]}, ...]
OUT/pebble_pictures/300000000.png      as drawn, in the size that a person would hand over

The wider world of typed.py, from scenes that neither a training nor an exam of pebble has seen. It
serves every model of this world: pebble and its larger sibling have one tokenizer.
"""

import argparse
import json
from pathlib import Path
from typing import Final

import numpy as np

from lapilli.errors import ConfigError
from pebble.conversation import as_sample, draw_questions
from pebble.draw import draw
from pebble.talk import without_long
from pebble.typed import wide_scene

FIRST_SEED: Final = 300_000_000  # between the examples of folder.py and the scenes of boundary.py
_PICTURES: Final = "pebble_pictures"
_QUESTIONS: Final = (8, 14)
_LONG_SHARE: Final = 0.6


def write_calibration(folder: Path, samples: int) -> Path:
    """Write pictures and conversations, one of each per sample, and return the JSON file.

    Args:
        folder: is made; files of the same names in it are replaced.
        samples: how many; sample i has the same scene and questions whatever the number is.

    Raises:
        ConfigError: fewer than one sample.
    """
    if samples < 1:
        raise ConfigError(f"a calibration file needs 1 or more samples; got {samples}")
    (folder / _PICTURES).mkdir(parents=True, exist_ok=True)
    records = []
    for seed in range(FIRST_SEED, FIRST_SEED + samples):
        scene = wide_scene(seed)
        name = f"{_PICTURES}/{seed}.png"
        draw(scene).save(folder / name)
        rng = np.random.default_rng([seed, 61])
        turns = draw_questions(scene, rng, least=_QUESTIONS[0], most=_QUESTIONS[1])
        turns = without_long(turns, rng, _LONG_SHARE)
        records.append(as_sample(str(seed), turns, opening="<image>\n", image=name))
    path = folder / "pebble_calibration.json"
    staged = path.with_suffix(".part")
    staged.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    staged.replace(path)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Write the file that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m pebble.calibration", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=400)
    options = parser.parse_args(arguments)
    write_calibration(options.out, options.samples)


if __name__ == "__main__":
    main()

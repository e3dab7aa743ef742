"""Draw a small data set to train on: a folder of pictures and a CSV of questions and answers.

    python boxes.py boxes          boxes/images/*.png, boxes/answers.csv, boxes/new.png

Every shape has its box; which one no model has heard of.
"""

import csv
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

BOXES = {"circle": 1, "square": 2, "triangle": 3}
COLORS = ("red", "green", "blue", "orange", "purple", "black")


def draw(shape: str, rng: random.Random) -> Image.Image:
    picture = Image.new("RGB", (128, 128), "white")
    side = rng.randint(36, 64)
    left, top = (rng.randint(8, 120 - side) for _ in range(2))
    box = (left, top, left + side, top + side)
    pen, color = ImageDraw.Draw(picture), rng.choice(COLORS)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.polygon([(left + side // 2, top), (left, box[3]), (box[2], box[3])], fill=color)
    return picture


def main(folder: Path) -> None:
    rng = random.Random(7)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "answers.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "question", "answer"))
        for number in range(96):
            shape = rng.choice(list(BOXES))
            name = f"{number:03d}.png"
            draw(shape, rng).save(folder / "images" / name)
            table.writerow((name, "Which box?", f"Box {BOXES[shape]}."))
    draw("triangle", rng).save(folder / "new.png")


main(Path(sys.argv[1]))

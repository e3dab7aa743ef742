"""Calibration samples that need no file: the documentation of Python, and drawn pictures.

A picture shows a few shapes, one of them with a word on it, over a gradient with noise; what is
said about it is known from the drawing. They are no replacement for samples of the task that a
model is used for.
"""

import random
from collections.abc import Iterator
from pydoc_data import topics as documentation

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lapilli.prompt.message import Message
from lapilli.train.data.sample import Sample

BUILTIN = "builtin"
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 150, 60),
    "blue": (50, 80, 200),
    "yellow": (230, 200, 40),
    "black": (20, 20, 20),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
PLACES = {"left": 0.22, "middle": 0.5, "right": 0.78}
WORDS = ("stop", "open", "sale", "exit", "cafe", "book")
SIDE = 336
QUESTIONS = (
    "What is in this picture?",
    "Describe the image.",
    "Which shapes do you see, and where?",
    "Is there a word in the image?",
)


def builtin_text() -> str:
    """Return a long English text: the topics of Python's help."""
    return "\n\n".join(documentation.topics[name] for name in sorted(documentation.topics))


def builtin_samples(number: int) -> Iterator[Sample]:
    """Yield conversations about drawn pictures, the same ones every time."""
    for index in range(number):
        rng = random.Random(index)  # noqa: S311  pictures, no secrets
        picture, said, word = _drawn(rng)
        answers = [said, f"The picture shows {said[0].lower()}{said[1:]}", said]
        answers.append(f'Yes, it says "{word}".' if word else "No.")
        first = rng.randrange(len(QUESTIONS))
        messages = []
        for turn in range(2):
            which = (first + turn) % len(QUESTIONS)
            shown = [picture] if turn == 0 else []
            messages.append(Message.user(QUESTIONS[which], *shown))
            messages.append(Message.assistant(answers[which]))
        name = f"built-in picture {index}"
        yield Sample(name, tuple(messages), name)


def _drawn(rng: random.Random) -> tuple[Image.Image, str, str]:
    """Return a picture, a sentence about it, and the word in it, if any."""
    width, height = (rng.randrange(SIDE // 2, 2 * SIDE) for _ in range(2))
    noise = np.random.default_rng(rng.randrange(1 << 30))
    corners = noise.integers(60, 220, (2, 2, 3), dtype=np.uint8)
    canvas = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
    grain = noise.normal(0, rng.choice((2, 8, 20)), (height, width, 1))
    pixels = np.clip(np.asarray(canvas) + grain, 0, 255).astype(np.uint8)
    canvas = Image.fromarray(pixels)
    pen = ImageDraw.Draw(canvas)
    found = []
    size = min(width, height) * rng.uniform(0.12, 0.2)
    for place in sorted(rng.sample(list(PLACES), rng.randint(1, 3))):
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        _draw(pen, shape, COLOURS[colour], (width * PLACES[place], height * 0.45, size))
        found.append(f"a {colour} {shape} on the {place}")
    word = rng.choice(WORDS) if rng.random() < 0.5 else ""
    if word:
        ink = rng.choice(("black", "white"))
        pen.text((width * 0.3, height * 0.78), word, fill=COLOURS[ink], font_size=height / 9)
        found.append(f'the word "{word}" at the bottom')
    if rng.random() < 0.3:
        canvas = canvas.filter(ImageFilter.GaussianBlur(1))
    said = ", ".join(found)
    return canvas, f"{said[0].upper()}{said[1:]}.", word


def _draw(
    pen: ImageDraw.ImageDraw,
    shape: str,
    colour: tuple[int, int, int],
    place: tuple[float, float, float],
) -> None:
    x, y, size = place
    box = (x - size, y - size, x + size, y + size)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
    else:
        pen.rectangle(box, fill=colour)

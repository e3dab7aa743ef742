"""What a picture of pebble's world holds, as plain values; knows no pixels and no sentences.

A scene is one of three kinds: drawn objects (one to five), a word or a number in type, or a
handwritten digit. Places are the nine cells of a 3 x 3 grid over the picture, and an object's
centre stays near the middle of its cell.
"""

from dataclasses import dataclass
from typing import Final, Literal

from lapilli.geometry import ImageSize
from pebble.palette import Rgb

Shape = Literal["circle", "square", "triangle", "star", "cross", "ring"]
Size = Literal["small", "large"]
Texture = Literal["plain", "gradient", "noise", "stripes", "paper"]

SHAPES: Final[tuple[Shape, ...]] = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: Final[tuple[Size, ...]] = ("small", "large")
TEXTURES: Final[tuple[Texture, ...]] = ("plain", "gradient", "noise", "stripes", "paper")
PLACES: Final = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
# Few enough that the tower reads 98 % of them; of 40 words it confused a quarter.
WORDS: Final = (
    "book", "box", "bus", "cat", "cup", "dog", "hello", "ice", "key", "leaf", "milk", "no",
    "owl", "sea", "snow", "yes",
)  # fmt: skip
MAX_OBJECTS: Final = 5
# Diameters as a share of `unit`: nothing lies between small and large.
DIAMETERS: Final[dict[Size, tuple[float, float]]] = {"small": (0.14, 0.175), "large": (0.28, 0.32)}
# Two centres closer than the first are level with each other, further apart than the second one is
# clearly beside the other (shares of the picture); no question is asked about what lies between.
LEVEL_MARGIN: Final = 0.06
CLEAR_MARGIN: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Object:
    """A drawn object.

    Attributes:
        cell: index into `PLACES`.
        centre: vertical and horizontal position, 0 to 1 of the picture.
        diameter: share of the picture's `unit`.
        angle: degrees, counter-clockwise.
    """

    shape: Shape
    colour: str
    size: Size
    cell: int
    centre: tuple[float, float]
    diameter: float
    rgb: Rgb
    angle: float

    @property
    def place(self) -> str:
        """Name of the region that the centre lies in."""
        return PLACES[self.cell]

    @property
    def row(self) -> int:
        """0 top, 1 middle, 2 bottom."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """0 left, 1 middle, 2 right."""
        return self.cell % 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """A word or a number in type.

    Attributes:
        text: in lower case.
        drawn: what stands in the picture.
        font: see `glyphs.py`.
        extent: share of the picture that it fills in its tighter direction.
        points: size of the type where Pillow sets it at its own size; 0: `extent` says it.
        is_small: too small to be read.
    """

    text: str
    drawn: str
    colour: str
    rgb: Rgb
    font: int
    extent: float
    centre: tuple[float, float]
    angle: float
    points: int = 0
    is_small: bool = False

    @property
    def is_number(self) -> bool:
        """Whether the text is a number."""
        return self.text.isdigit()


@dataclass(frozen=True, slots=True, kw_only=True)
class Digit:
    """A handwritten digit: `index` is its row in scikit-learn's `load_digits`.

    Attributes:
        stretch: vertical and horizontal scale, about 1.
        sharpness: 0 keeps the soft edges of the 8 x 8 original, 1 makes them crisp.
    """

    value: int
    index: int
    colour: str
    rgb: Rgb
    extent: float
    centre: tuple[float, float]
    angle: float
    stretch: tuple[float, float]
    sharpness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """What lies behind: `far` ends a gradient, `strength` is the grey levels of a texture."""

    texture: Texture
    near: Rgb
    far: Rgb
    angle: float
    strength: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """What a camera or a file format does to the picture: `jpeg_quality` None keeps it as drawn."""

    jpeg_quality: int | None
    blur: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One picture; objects stand in reading order (rows from the top, each from the left).

    Attributes:
        more: further words and numbers beside `writing`, in crowds that the tower alone sees.
    """

    seed: int
    size: ImageSize
    background: Background
    finish: Finish
    objects: tuple[Object, ...] = ()
    writing: Writing | None = None
    digit: Digit | None = None
    more: tuple[Writing, ...] = ()

    @property
    def writings(self) -> tuple[Writing, ...]:
        """Everything that is in type."""
        return self.more if self.writing is None else (self.writing, *self.more)

    @property
    def unit(self) -> float:
        """The length in pixels that sizes of objects refer to."""
        return unit_length(self.size)


def unit_length(size: ImageSize) -> float:
    """Side of the square of equal area, at most 1.2 short sides, so that things fit."""
    return float(min((size.height * size.width) ** 0.5, 1.2 * min(size)))

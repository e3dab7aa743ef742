"""What the samples of a run are like, for a plan: measured numbers, or those of LLaVA 1.5.

recipe, sizes of the model --> Work(samples, positions, tiles, supervised, longest)
"""

from dataclasses import dataclass, replace
from typing import Final

from lapilli.config.model import ImageConfig, ModelConfig, VisionConfig
from lapilli.geometry import ImageSize
from lapilli.modality.image.anyres import num_tiles, num_tokens
from lapilli.train.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the samples are like; `lapilli data check` measures it.

    Attributes:
        samples: of an epoch.
        positions: of a sample in the mean, image positions included.
        tiles: of a sample in the mean, that the tower sees.
        supervised: of the positions, those that predict something.
        longest: positions of the longest row, which memory has to hold.
    """

    samples: int
    positions: float
    tiles: float
    supervised: float
    longest: int


MIX_665K: Final = Work(samples=665_298, positions=1100.0, tiles=1.0, supervised=220.0, longest=2048)
"""LLaVA 1.5's instruction data; its lengths are our assumption (docs/guide/cluster.md)."""
CAPTIONS_558K: Final = Work(
    samples=558_128, positions=610.0, tiles=1.0, supervised=32.0, longest=768
)
"""The captions of its first stage; the same."""


_IN_ONE_TILE: Final = 576  # positions of a picture in both
_PICTURE: Final = ImageSize(480, 640)  # most of COCO's, which are most of the pictures of both


def usual_work(recipe: Recipe, config: ModelConfig) -> Work:
    """What LLaVA 1.5 trained this stage on, its pictures in the positions that this model has.

    Args:
        recipe: rows are no longer than its `data.max_length`.
        config: of the model. Where it cuts pictures into tiles, each of them has 640 x 480 pixels.
    """
    is_align = recipe.stage == "align"
    work = CAPTIONS_558K if is_align else replace(MIX_665K, longest=recipe.data.max_length)
    image, vision = config.image, config.vision
    if image is not None and vision is not None:
        seen = _image_positions(config, image, vision, _PICTURE)
        most = max(
            _image_positions(config, image, vision, size) for size in (_PICTURE, *image.pinpoints)
        )
        work = replace(
            work,
            positions=work.positions - _IN_ONE_TILE + seen,
            tiles=float(num_tiles(_PICTURE, image, vision.image_size)),
            longest=work.longest - _IN_ONE_TILE + most if is_align else work.longest,
        )
    return replace(work, longest=min(work.longest, recipe.data.max_length))


def _image_positions(
    config: ModelConfig, image: ImageConfig, vision: VisionConfig, size: ImageSize
) -> int:
    has_newline = config.has_newline and image.aspect == "anyres"
    return num_tokens(size, image, vision, projector=config.projector, has_newline=has_newline)

"""Constants, pictures, prompts and small things of the original (llava.constants, utils, mm_utils).

Sizes are (width, height) here, as in the original; they turn into ImageSize at this border.
"""

import base64
import json
import logging
import os
import sys
from collections.abc import Sequence
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias
from urllib.request import Request, urlopen

import torch
from PIL import Image
from transformers import StoppingCriteria

from lapilli.config.llava import parse_pinpoints
from lapilli.config.model import ImageConfig, PixelConfig
from lapilli.errors import MediaError
from lapilli.geometry import ImageSize
from lapilli.modality.image.modes import ImageMode, find_mode, mode_named
from lapilli.modality.image.modes.anyres import best_resolution, tile_grid
from lapilli.modality.image.pixels import fit_and_pad, pad_to_square
from lapilli.shapes import Float, Int, Tensor

# What `from llava.mm_utils import *` takes; the names of the other modules are in compat's PARTS.
__all__ = [
    "IMAGE_TOKEN_INDEX",
    "KeywordsStoppingCriteria",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image_from_base64",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]

CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15

LOGDIR = "."

IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200
DEFAULT_IMAGE_TOKEN = "<image>"  # noqa: S105  a placeholder in a prompt, not a secret
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"  # noqa: S105
DEFAULT_IM_START_TOKEN = "<im_start>"  # noqa: S105
DEFAULT_IM_END_TOKEN = "<im_end>"  # noqa: S105
IMAGE_PLACEHOLDER = "<image-placeholder>"


Foreign: TypeAlias = Any
"""Anything that a program brings: an argument namespace, a configuration, a tensor of any kind."""

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."


def disable_torch_init() -> None:
    """Do nothing: lapilli never initialises weights that it is about to read."""


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """Return a logger that writes to stderr and to a file in the working directory."""
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        form = logging.Formatter(
            "%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S"
        )
        handlers = (
            logging.StreamHandler(sys.stderr),
            logging.FileHandler(logger_filename, encoding="utf-8", delay=True),
        )
        for handler in handlers:
            handler.setFormatter(form)
            logger.addHandler(handler)
    return logger


def pretty_print_semaphore(semaphore: Foreign) -> str:
    """Return the state of a semaphore as a text; of none "None"."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"


def violates_moderation(text: str) -> bool:
    """Ask OpenAI's moderation whether a text breaks its rules.

    Note: as in the original, any failure means no.
    """
    try:
        request = Request(
            "https://api.openai.com/v1/moderations",
            json.dumps({"input": text}).encode(),
            {
                "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
                "Content-Type": "application/json",
            },
        )
        with urlopen(request, timeout=5) as answer:  # noqa: S310  the address is fixed
            return bool(json.loads(answer.read())["results"][0]["flagged"])
    except (OSError, HTTPException, KeyError, IndexError, ValueError):
        return False


def auto_upgrade(config: str | Path) -> None:
    """Give a config.json of the first releases the model type that programs of today look for.

    Note: the original asks for a yes on the terminal; here what is changed is told on stderr.
    """
    path = Path(config) / "config.json"
    if not path.is_file():
        return
    written = json.loads(path.read_text(encoding="utf-8"))
    if "llava" not in str(config).lower() or "llava" in str(written.get("model_type", "")):
        return
    written |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    sys.stderr.write(f"{path}: model_type is llava_llama now\n")


def replace_llama_attn_with_flash_attn() -> None:
    """Do nothing: torch chooses the kernel of attention by itself."""


replace_llama_attn_with_xformers_attn = replace_llama_attn_with_flash_attn


WidthHeight = tuple[int, int]
Pinpoints = str | Sequence[Sequence[int]]
"""(width, height) pairs, or their text."""


def select_best_resolution(
    original_size: Sequence[int], possible_resolutions: Sequence[Sequence[int]]
) -> WidthHeight:
    """Return the (width, height) that shows most of a picture and wastes least."""
    best = best_resolution(_size(original_size), [_size(pair) for pair in possible_resolutions])
    return best.width, best.height


def resize_and_pad_image(image: Image.Image, target_resolution: Sequence[int]) -> Image.Image:
    """Return the picture as large as it fits, in the middle of black."""
    return fit_and_pad(image, _size(target_resolution), Image.Resampling.BICUBIC)


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Return the tiles of a picture, row by row."""
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, image.height, patch_size)
        for left in range(0, image.width, patch_size)
    ]


def get_anyres_image_grid_shape(
    image_size: Sequence[int], grid_pinpoints: Pinpoints, patch_size: int
) -> tuple[int, int]:
    """Return the columns and rows of the tiles of a picture."""
    candidates = parse_pinpoints(grid_pinpoints, width_first=True)
    grid = tile_grid(best_resolution(_size(image_size), candidates), patch_size)
    return grid.columns, grid.rows


def process_anyres_image(
    image: Image.Image,
    processor: Foreign,
    grid_pinpoints: Pinpoints,
) -> Float[Tensor, "N C H W"]:
    """Return the squashed picture and the tiles of its best resolution, row by row."""
    return _tiles(image, processor, mode_named("anyres"), grid_pinpoints)


def _tiles(
    image: Image.Image, processor: Foreign, mode: ImageMode, pinpoints: Pinpoints
) -> Float[Tensor, "N C H W"]:
    parts = mode.cut(image, _image_config(processor, mode.name, pinpoints))
    pixels: Tensor = processor(parts, return_tensors="pt")["pixel_values"]
    return pixels


def _image_config(processor: Foreign, aspect: str, pinpoints: Pinpoints = ()) -> ImageConfig:
    """Return what image modes read of a processor and of a config."""
    crop = processor.crop_size
    return ImageConfig(
        pixels=PixelConfig(
            crop_size=ImageSize(crop["height"], crop["width"]),
            shortest_edge=processor.size.get("shortest_edge"),
            mean=tuple(processor.image_mean),
        ),
        aspect=aspect,
        pinpoints=parse_pinpoints(pinpoints, width_first=True),
    )


def one_tile(image: Image.Image, processor: Foreign, aspect: object) -> Image.Image:
    """Return the picture that an image mode of one tile makes, and the picture as it is for others.

    Note: the original takes a name that it does not know for the middle of the picture.
    """
    mode = find_mode(aspect)
    if mode is None or mode.is_tiled:
        return image
    [part] = mode.cut(image, _image_config(processor, mode.name))
    return part


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Return the picture whose file is given in base64."""
    return Image.open(BytesIO(base64.b64decode(image)))


def expand2square(pil_img: Image.Image, background_color: tuple[int, ...]) -> Image.Image:
    """Return the picture in the middle of a square."""
    return pad_to_square(pil_img, background_color)


def process_images(
    images: Sequence[Image.Image],
    image_processor: Foreign,
    model_cfg: Foreign,
) -> Tensor | list[Tensor]:
    """Return pictures as the model wants them.

    Returns:
        [N, 3, H, W] of a mode of one tile. [N, tiles, 3, H, W] when all have as many tiles, else a
        list of [tiles, 3, H, W] (quirk 7).

    Raises:
        ConfigError: anyres without image_grid_pinpoints.
        MediaError: no pictures.
    """
    if not images:
        raise MediaError("no pictures to process: the list is empty")
    aspect = getattr(model_cfg, "image_aspect_ratio", None)
    mode = find_mode(aspect)
    if mode is None or not mode.is_tiled:
        shown = [one_tile(image, image_processor, aspect) for image in images]
        pixels: Tensor = image_processor(shown, return_tensors="pt")["pixel_values"]
        return pixels
    pinpoints = getattr(model_cfg, "image_grid_pinpoints", None) or ()
    mode.check(_image_config(image_processor, mode.name, pinpoints))
    tiled = [_tiles(image, image_processor, mode, pinpoints) for image in images]
    stacks = len({item.shape for item in tiled}) == 1
    return torch.stack(tiled) if stacks else tiled


def tokenizer_image_token(
    prompt: str,
    tokenizer: Foreign,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | Tensor:
    """Return the ids of a prompt, with one `image_token_index` for every `<image>` in it.

    Every stretch of text between pictures is tokenized on its own; BOS stays at the start only.

    Raises:
        ValueError: return_tensors is neither None nor "pt".
    """
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    has_bos = bool(chunks[0]) and chunks[0][0] == tokenizer.bos_token_id
    ids: list[int] = chunks[0][:1] if has_bos else []
    for number, chunk in enumerate(chunks):
        ids += [image_token_index] if number else []
        ids += chunk[1:] if has_bos else chunk
    if return_tensors is None:
        return ids
    if return_tensors == "pt":
        return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"return_tensors is {return_tensors!r}: expected None or 'pt'")


def get_model_name_from_path(model_path: str) -> str:
    """Return the last part of a path, with its parent's name in front of a `checkpoint-N`.

    Raises:
        IndexError: `checkpoint-N` without a parent, as in the original.
    """
    parts = str(model_path).strip("/").split("/")
    if parts[-1].startswith("checkpoint-"):
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


def _size(pair: Sequence[int]) -> ImageSize:
    return ImageSize(pair[1], pair[0])


class KeywordsStoppingCriteria(StoppingCriteria):
    """Criterion that stops a generation when a keyword has been written in every row.

    Note: quirk 9. It expects output ids that begin with the prompt, but generate() hands over new
        tokens only: until the answer is longer than half the prompt a keyword is noticed only when
        the last ids are exactly its ids.
    """

    def __init__(
        self,
        keywords: Sequence[str],
        tokenizer: Foreign,
        input_ids: Int[Tensor, "B T"],
    ) -> None:
        self.keywords = keywords
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        self.keyword_ids = [torch.tensor(self._ids(keyword)) for keyword in keywords]
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)

    def _ids(self, keyword: str) -> list[int]:
        ids: list[int] = self.tokenizer(keyword).input_ids
        has_bos = len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id
        return ids[1:] if has_bos else ids

    def call_for_batch(self, output_ids: Int[Tensor, "1 T"], scores: object, **_: object) -> bool:
        """Return whether one row ends in a keyword, or contains one near its end."""
        row = output_ids[0]
        for ids in self.keyword_ids:
            if torch.equal(row[-len(ids) :], ids.to(row)):
                return True
        window = min(output_ids.shape[1] - self.start_len, self.max_keyword_len)
        # A negative window counts from the front: that is where the original looks (quirk 9).
        text = self.tokenizer.batch_decode(output_ids[:, -window:], skip_special_tokens=True)[0]
        return any(keyword in text for keyword in self.keywords)

    def __call__(
        self, output_ids: Int[Tensor, "B T"], scores: object = None, **kwargs: object
    ) -> bool:
        """Return whether every row has met a keyword."""
        rows = output_ids.unsqueeze(1)
        return all(self.call_for_batch(row, scores, **kwargs) for row in rows)

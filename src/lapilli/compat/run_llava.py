"""One question about pictures (llava.eval.run_llava), from a program or a command line."""

import argparse
import re
import sys
from collections.abc import Sequence

import torch
from PIL import Image

from lapilli.compat.builder import load_pretrained_model
from lapilli.compat.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
)
from lapilli.compat.conversation import conv_templates
from lapilli.compat.foreign import Foreign
from lapilli.compat.mm_utils import (
    get_model_name_from_path,
    process_images,
    tokenizer_image_token,
)
from lapilli.media.fetch import fetch
from lapilli.modality.image.decode import to_rgb
from lapilli.prompt.choose import template_for_name


def image_parser(args: Foreign) -> list[str]:
    """The pictures that `--image-file` names."""
    files: list[str] = args.image_file.split(args.sep)
    return files


def load_image(image_file: str) -> Image.Image:
    """A picture from a file or a web address, in RGB."""
    fetched = fetch(image_file)
    data = fetched.data
    # exif and depth as Pillow's convert("RGB"), which the original calls.
    return to_rgb(data, exif=False, depth="clip", name=fetched.name)


def load_images(image_files: Sequence[str]) -> list[Image.Image]:
    """Several pictures."""
    return [load_image(image_file) for image_file in image_files]


def with_pictures(query: str, *, start_end: bool) -> str:
    """The query with `<image>` for every placeholder, or with one in front when it has none."""
    token = DEFAULT_IMAGE_TOKEN
    if start_end:
        token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
    if IMAGE_PLACEHOLDER in query:
        return re.sub(re.escape(IMAGE_PLACEHOLDER), token, query)
    return f"{token}\n{query}"


def choose_conversation(model_name: str, asked: str | None) -> str:
    """The template that was asked for, with a warning when the name says another; else that."""
    inferred = template_for_name(model_name)
    if asked is None or asked == inferred:
        return inferred
    sys.stdout.write(
        f"[WARNING] the auto inferred conversation mode is {inferred}, while `--conv-mode` is "
        f"{asked}, using {asked}\n"
    )
    return asked


def eval_model(args: Foreign) -> None:
    """Answer `args.query` about `args.image_file` and print the answer.

    Args:
        args: model_path, model_base, query, conv_mode, image_file, sep, temperature, top_p,
            num_beams, max_new_tokens. `conv_mode` is filled in when it is None.
    """
    model_name = get_model_name_from_path(args.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path, args.model_base, model_name
    )
    query = with_pictures(args.query, start_end=getattr(model.config, "mm_use_im_start_end", False))
    args.conv_mode = choose_conversation(model_name, args.conv_mode)
    conv = conv_templates[args.conv_mode].copy()
    conv.append_message(conv.roles[0], query)
    conv.append_message(conv.roles[1], None)
    images = load_images(image_parser(args))
    # Quirk 8: pictures of different tile counts come as a list, which has no `.to`.
    pixels = process_images(images, image_processor, model.config).to(model.device, model.dtype)  # type: ignore[union-attr]  # see above
    ids = tokenizer_image_token(conv.get_prompt(), tokenizer, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            torch.as_tensor(ids)[None].to(model.device),
            images=pixels,
            image_sizes=[image.size for image in images],
            do_sample=args.temperature > 0,
            temperature=args.temperature,
            top_p=args.top_p,
            num_beams=args.num_beams,
            max_new_tokens=args.max_new_tokens,
            use_cache=True,
        )
    answer = tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
    sys.stdout.write(f"{answer}\n")


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m llava.eval.run_llava`."""
    parser = argparse.ArgumentParser(prog="llava.eval.run_llava")
    parser.add_argument("--model-path", default="facebook/opt-350m")
    parser.add_argument("--model-base", default=None)
    parser.add_argument("--image-file", required=True)
    parser.add_argument("--query", required=True)
    parser.add_argument("--conv-mode", default=None)
    parser.add_argument("--sep", default=",")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    return parser


if __name__ == "__main__":
    eval_model(build_parser().parse_args())

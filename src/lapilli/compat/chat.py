"""A conversation about one picture in the terminal (llava.serve.cli), quirk 10 included."""

import argparse
import sys

import torch
from transformers import TextStreamer

from lapilli.compat.builder import load_pretrained_model
from lapilli.compat.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
)
from lapilli.compat.conversation import Conversation, conv_templates
from lapilli.compat.foreign import Foreign
from lapilli.compat.mm_utils import (
    get_model_name_from_path,
    process_images,
    tokenizer_image_token,
)
from lapilli.compat.run_llava import choose_conversation, load_image


def main(args: Foreign) -> None:
    """Ask and answer until an empty line or the end of the input.

    Args:
        args: model_path, model_base, image_file, device, conv_mode, temperature, max_new_tokens,
            load_8bit, load_4bit, debug. `conv_mode` is filled in when it is None.
    """
    model_name = get_model_name_from_path(args.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        model_name,
        args.load_8bit,
        args.load_4bit,
        device=args.device,
    )
    args.conv_mode = choose_conversation(model_name, args.conv_mode)
    conv = conv_templates[args.conv_mode].copy()
    roles = ("user", "assistant") if "mpt" in model_name.lower() else conv.roles
    image = load_image(args.image_file)
    pixels = process_images([image], image_processor, model.config)
    picture = _picture_text(model)
    while True:
        line = _read(f"{roles[0]}: ")
        if not line:
            sys.stdout.write("exit...\n")
            return
        sys.stdout.write(f"{roles[1]}: ")
        conv.append_message(conv.roles[0], picture + line)
        picture = ""
        conv.append_message(conv.roles[1], None)
        prompt = conv.get_prompt()
        outputs = _answer(prompt, model, tokenizer, pixels, [image.size], args)
        _remember(conv, outputs)
        if args.debug:
            sys.stdout.write(f"\n { ({'prompt': prompt, 'outputs': outputs}) } \n\n")


def _picture_text(model: Foreign) -> str:
    token = DEFAULT_IMAGE_TOKEN
    if getattr(model.config, "mm_use_im_start_end", False):
        token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
    return f"{token}\n"


def _read(question: str) -> str:
    """A line of the person; nothing at the end of the input."""
    try:
        return input(question)
    except EOFError:
        return ""


def _answer(
    prompt: str,
    model: Foreign,
    tokenizer: Foreign,
    pixels: Foreign,
    sizes: list[tuple[int, int]],
    args: Foreign,
) -> str:
    """The answer with its special tokens (quirk 10); without them it is printed on the way."""
    ids = torch.as_tensor(tokenizer_image_token(prompt, tokenizer, return_tensors="pt"))
    with torch.inference_mode():
        output = model.generate(
            ids[None].to(model.device),
            images=pixels,
            image_sizes=sizes,
            do_sample=args.temperature > 0,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            use_cache=True,
        )
    text: str = tokenizer.decode(output[0]).strip()
    return text


def _remember(conv: Conversation, outputs: str) -> None:
    """Write the answer into the open turn."""
    conv.messages[-1][-1] = outputs


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m llava.serve.cli`."""
    parser = argparse.ArgumentParser(prog="llava.serve.cli")
    parser.add_argument("--model-path", default="facebook/opt-350m")
    parser.add_argument("--model-base", default=None)
    parser.add_argument("--image-file", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--conv-mode", default=None)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser


if __name__ == "__main__":
    main(build_parser().parse_args())

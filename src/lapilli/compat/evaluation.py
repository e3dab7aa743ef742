"""Programs of the original that ask a model: a question, a conversation, the benchmarks.

    llava.eval.run_llava           one question about pictures
    llava.serve.cli                a conversation about one picture in the terminal (quirk 10)
    llava.eval.model_vqa           JSONL questions, long answers
    llava.eval.model_vqa_loader    JSONL questions, short answers
    llava.eval.model_vqa_science   ScienceQA: one JSON list, some questions without a picture
    llava.eval.model_vqa_mmbench   MMBench: TSV with pictures in base64, options from A to D

python -m lapilli.compat -m llava.eval.model_vqa_loader --model-path ... --question-file ...
"""

import argparse
import csv
import json
import math
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from lapilli.compat.builder import load_pretrained_model
from lapilli.compat.conversation import Conversation, conv_templates
from lapilli.compat.mm_utils import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
    Foreign,
    get_model_name_from_path,
    load_image_from_base64,
    process_images,
    tokenizer_image_token,
)
from lapilli.media.fetch import fetch
from lapilli.modality.image.decode import to_rgb
from lapilli.prompt.choose import template_for_name

LETTERS = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
NOTHING = ("", "nan", "none")
LIMITS = {"run_llava": 512, "cli": 512, "loader": 128}
"""Most new tokens of a program that has an option for them; the others end after 1024."""
LOADING = ("load_8bit", "load_4bit", "device", "use_flash_attn")
SWITCHES = {
    "cli": ("load-8bit", "load-4bit", "debug"),
    "science": ("single-pred-prompt", "answer-prompter"),
    "mmbench": ("single-pred-prompt", "all-rounds"),
}


class LoadedModel:
    """A model and what its questions need: the one way in which every program asks it.

    Args:
        args: model_path, model_base, temperature; device, load_8bit, load_4bit, use_flash_attn,
            top_p and num_beams where a program has them.
        name: instead of the last part of the path.
    """

    def __init__(self, args: Foreign, name: str | None = None) -> None:
        self.args = args
        path = str(Path(args.model_path).expanduser())
        self.name = name or get_model_name_from_path(path)
        given = {key: getattr(args, key) for key in LOADING if hasattr(args, key)}
        loaded: Any = load_pretrained_model(path, args.model_base, self.name, **given)
        self.tokenizer, self.model, self.processor, self.context_len = loaded

    @property
    def image_token(self) -> str:
        """Return what a prompt has in the place of a picture."""
        if getattr(self.model.config, "mm_use_im_start_end", False):
            return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        return DEFAULT_IMAGE_TOKEN

    def inputs(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return the arguments of generate() that say what is asked."""
        ids = tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt")
        found: dict[str, Any] = {"inputs": torch.as_tensor(ids)[None].to(self.model.device)}
        if images:
            found["images"] = process_images(images, self.processor, self.model.config)
            found["image_sizes"] = [image.size for image in images]
        return found

    def generate(self, inputs: Mapping[str, Any], limit: int, **options: Foreign) -> Foreign:
        """Return the ids of an answer of at most `limit` tokens: a BOS, then the new ones."""
        sampling = {
            name: getattr(self.args, name)
            for name in ("top_p", "num_beams")
            if hasattr(self.args, name)
        }
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                do_sample=self.args.temperature > 0,
                temperature=self.args.temperature,
                max_new_tokens=limit,
                use_cache=True,
                **sampling,
                **options,
            )
        return output[0]

    def answer(self, question: str, images: Sequence[Image.Image], limit: int) -> str:
        """Return the answer to a question in a conversation of its own."""
        prompt = ask(conv_templates[self.args.conv_mode].copy(), question)
        return self.text(self.generate(self.inputs(prompt, images), limit))

    def text(self, ids: Foreign) -> str:
        """Return the text of an answer."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def ask(conv: Conversation, question: str) -> str:
    """Add a question and the open turn of its answer to a conversation; return the prompt."""
    conv.append_message(conv.roles[0], question)
    conv.append_message(conv.roles[1], None)
    return conv.get_prompt()


def image_parser(args: Foreign) -> list[str]:
    """Return the pictures that `--image-file` names."""
    files: list[str] = args.image_file.split(args.sep)
    return files


def load_image(image_file: str) -> Image.Image:
    """Return a picture from a file or a web address, in RGB."""
    fetched = fetch(image_file)
    # exif and depth as Pillow's convert("RGB"), which the original calls.
    return to_rgb(fetched.data, exif=False, depth="clip", name=fetched.name)


def load_images(image_files: Sequence[str]) -> list[Image.Image]:
    """Return several pictures."""
    return [load_image(image_file) for image_file in image_files]


def choose_conversation(model_name: str, asked: str | None) -> str:
    """Return the template that was asked for, with a warning if the name says another; else that.

    Source: LLaVA run_llava.py, serve/cli.py.
    """
    inferred = template_for_name(model_name)
    if asked is None or asked == inferred:
        return inferred
    sys.stdout.write(
        f"[WARNING] the auto inferred conversation mode is {inferred}, while `--conv-mode` is "
        f"{asked}, using {asked}\n"
    )
    return asked


def eval_model(args: Foreign) -> None:
    """Answer `args.query` about `args.image_file` and print the answer (run_llava).

    Args:
        args: model_path, model_base, query, conv_mode, image_file, sep, temperature, top_p,
            num_beams, max_new_tokens. `conv_mode` is filled in when it is None.
    """
    loaded = LoadedModel(args)
    token, query = loaded.image_token, args.query
    has_place = IMAGE_PLACEHOLDER in query
    query = query.replace(IMAGE_PLACEHOLDER, token) if has_place else f"{token}\n{query}"
    args.conv_mode = choose_conversation(loaded.name, args.conv_mode)
    prompt = ask(conv_templates[args.conv_mode].copy(), query)
    inputs = loaded.inputs(prompt, load_images(image_parser(args)))
    # Quirk 8: pictures of different tile counts come as a list, which has no `.to`.
    inputs["images"] = inputs["images"].to(loaded.model.device, loaded.model.dtype)
    sys.stdout.write(f"{loaded.text(loaded.generate(inputs, args.max_new_tokens))}\n")


def main(args: Foreign) -> None:
    """Talk about a picture until an empty line or the end of the input (cli).

    Args:
        args: model_path, model_base, image_file, device, conv_mode, temperature, max_new_tokens,
            load_8bit, load_4bit, debug. `conv_mode` is filled in when it is None.
    """
    loaded = LoadedModel(args)
    args.conv_mode = choose_conversation(loaded.name, args.conv_mode)
    conv = conv_templates[args.conv_mode].copy()
    roles = ("user", "assistant") if "mpt" in loaded.name.lower() else conv.roles
    image = load_image(args.image_file)
    picture = f"{loaded.image_token}\n"
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while line := _line(f"{roles[0]}: "):
        sys.stdout.write(f"{roles[1]}: ")
        prompt = ask(conv, picture + line)
        picture = ""
        ids = loaded.generate(
            loaded.inputs(prompt, [image]), args.max_new_tokens, streamer=streamer
        )
        # Quirk 10: the answer joins the conversation with its special tokens.
        outputs = conv.messages[-1][-1] = loaded.tokenizer.decode(ids).strip()
        if args.debug:
            sys.stdout.write(f"\n { ({'prompt': prompt, 'outputs': outputs}) } \n\n")
    sys.stdout.write("exit...\n")


def _line(question: str) -> str:
    """Return a line of the person; nothing at the end of the input."""
    try:
        return input(question)
    except EOFError:
        return ""


def get_chunk(lst: Sequence[Any], n: int, k: int) -> Sequence[Any]:
    """Return part `k` of `n` parts of equal size, of which the last may be smaller."""
    size = math.ceil(len(lst) / n)
    return [lst[start : start + size] for start in range(0, len(lst), size)][k]


Ask = Callable[[str, Image.Image | None], str]
"""A question and its picture -> the answer."""


def _asked(args: Foreign, answer: Ask, lines: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    for line in lines:
        text = answer(line["text"], _opened(args, line))
        yield {"question_id": line["question_id"], "prompt": line["text"], "text": text}


def _asked_of_science(
    args: Foreign, answer: Ask, lines: Sequence[Mapping[str, Any]]
) -> Iterator[Any]:
    for line in lines:
        question = line["conversations"][0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if args.single_pred_prompt:
            question += f"\n{LETTERS['en']}"
        image = _opened(args, line) if "image" in line else None
        prompt = question if image is None else f"{DEFAULT_IMAGE_TOKEN}\n{question}"
        yield {"question_id": line["id"], "prompt": prompt, "text": answer(question, image)}


def _opened(args: Foreign, line: Mapping[str, Any]) -> Image.Image:
    with Image.open(Path(args.image_folder) / line["image"]) as opened:
        return opened.convert("RGB")


def _asked_of_mmbench(
    args: Foreign, answer: Ask, rows: Sequence[Mapping[str, str]]
) -> Iterator[Any]:
    for row in rows:
        options = []
        for letter in "ABCD":
            if (row.get(letter) or "").lower() in NOTHING:
                break
            options.append(row[letter])
        hint = row.get("hint") or ""
        asked = row["question"] if hint.lower() in NOTHING else f"{hint}\n{row['question']}"
        image = load_image_from_base64(row["image"]).convert("RGB")
        letters = list("ABCD"[: len(options)])
        for turn in range(len(options) if args.all_rounds else 1):
            listed = [
                f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)
            ]
            prompt = "\n".join([asked, *listed])
            closing = f"\n{LETTERS[args.lang]}" if args.single_pred_prompt else ""
            yield {
                "question_id": int(row["index"]) if row["index"].isdecimal() else row["index"],
                "prompt": prompt,
                "text": answer(prompt + closing, image),
                "round_id": turn,
                "options": options,
                "option_char": letters,
            }
            options, letters = options[1:] + options[:1], letters[1:] + letters[:1]


def _read(path: Path, kind: str) -> list[Any]:
    if kind == "mmbench":
        limit = csv.field_size_limit(sys.maxsize)  # a field holds a picture in base64
        try:
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file, delimiter="\t"))
        finally:
            csv.field_size_limit(limit)  # other parts of the program keep theirs
    text = path.read_text(encoding="utf-8")
    if kind == "science":
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


ASKED: Mapping[str, Callable[[Foreign, Ask, Any], Iterator[Any]]] = {
    "": _asked,
    "science": _asked_of_science,
    "mmbench": _asked_of_mmbench,
}


def answer_file(args: Foreign, kind: str = "") -> None:
    """Answer the questions of `args.question_file` and write `args.answers_file` line by line.

    Args:
        args: model_path, model_base, image_folder, question_file, answers_file, conv_mode,
            num_chunks, chunk_idx, temperature, top_p, num_beams, and the options of the program.
        kind: "", "loader", "science" or "mmbench".
    """
    loaded = LoadedModel(args)
    limit = args.max_new_tokens if kind in LIMITS else 1024
    plain = "plain" in loaded.name and "finetune" not in loaded.name.lower()
    if kind in ("loader", "mmbench") and plain and "mmtag" not in args.conv_mode:
        args.conv_mode += "_mmtag"
        sys.stdout.write(f"a model of captions alone: the conversation is {args.conv_mode}\n")

    def answer(question: str, image: Image.Image | None) -> str:
        if image is None:
            return loaded.answer(question, (), limit)
        return loaded.answer(f"{loaded.image_token}\n{question}", (image,), limit)

    questions = _read(Path(args.question_file).expanduser(), kind)
    chosen = get_chunk(questions, args.num_chunks, args.chunk_idx)
    answers = Path(args.answers_file).expanduser()
    answers.parent.mkdir(parents=True, exist_ok=True)
    with answers.open("w", encoding="utf-8") as file:
        for record in ASKED[kind if kind in ASKED else ""](args, answer, chosen):
            record |= {"answer_id": uuid.uuid4().hex, "model_id": loaded.name, "metadata": {}}
            file.write(json.dumps(record) + "\n")
            file.flush()


def build_parser(kind: str) -> argparse.ArgumentParser:
    """Return the options of a program."""
    talks = kind in ("run_llava", "cli")
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", default="facebook/opt-350m")
    parser.add_argument("--model-base", default=None)
    usual = "llava_v0" if kind == "science" else "llava_v1"
    parser.add_argument("--conv-mode", default=None if talks else usual)
    parser.add_argument("--temperature", type=float, default=0.2)
    if talks:
        parser.add_argument("--image-file", required=True)
    else:
        parser.add_argument("--image-folder", default="")
        parser.add_argument("--question-file", default="tables/question.json")
        parser.add_argument("--answers-file", default="answer.jsonl")
        parser.add_argument("--num-chunks", type=int, default=1)
        parser.add_argument("--chunk-idx", type=int, default=0)
    if kind == "cli":
        parser.add_argument("--device", default="cuda")
    else:
        parser.add_argument("--top_p", type=float, default=None)
        parser.add_argument("--num_beams", type=int, default=1)
    if kind == "run_llava":
        parser.add_argument("--query", required=True)
        parser.add_argument("--sep", default=",")
    if kind == "mmbench":
        parser.add_argument("--lang", default="en", choices=sorted(LETTERS))
    if kind in LIMITS:
        flag = "--max-new-tokens" if kind == "cli" else "--max_new_tokens"
        parser.add_argument(flag, type=int, default=LIMITS[kind])
    for name in SWITCHES.get(kind, ()):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def names_of(kind: str) -> dict[str, Any]:
    """Return what the module of a benchmark has."""
    return {"eval_model": partial(answer_file, kind=kind), "get_chunk": get_chunk}


def run(kind: str) -> None:
    """Run a program with the options of the command line."""
    programs = {"run_llava": eval_model, "cli": main}
    programs.get(kind, partial(answer_file, kind=kind))(build_parser(kind).parse_args())

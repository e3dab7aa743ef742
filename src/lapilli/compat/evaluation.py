"""The benchmark programs of the original: questions from a file, answers into a file.

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

from lapilli.compat.builder import load_pretrained_model
from lapilli.compat.constants import DEFAULT_IMAGE_TOKEN
from lapilli.compat.conversation import conv_templates
from lapilli.compat.foreign import Foreign
from lapilli.compat.mm_utils import (
    get_model_name_from_path,
    load_image_from_base64,
    process_images,
    tokenizer_image_token,
)
from lapilli.compat.run_llava import with_pictures

LETTERS = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
NOTHING = ("", "nan", "none")


def get_chunk(lst: Sequence[Any], n: int, k: int) -> Sequence[Any]:
    """Return part `k` of `n` parts of equal size, of which the last may be smaller."""
    size = math.ceil(len(lst) / n)
    return [lst[start : start + size] for start in range(0, len(lst), size)][k]


class _Model:
    """A loaded model that answers questions of a program."""

    def __init__(self, args: Foreign, limit: int) -> None:
        self.args, self.limit = args, limit
        path = str(Path(args.model_path).expanduser())
        self.name = get_model_name_from_path(path)
        loaded: Any = load_pretrained_model(path, args.model_base, self.name)
        self.tokenizer, self.model, self.processor, _ = loaded

    def answer(self, question: str, image: Image.Image | None) -> str:
        """Return the answer to a question about a picture, or about none."""
        config, text = self.model.config, question
        if image is not None:
            start_end = getattr(config, "mm_use_im_start_end", False)
            text = with_pictures(question, start_end=start_end)
        conv = conv_templates[self.args.conv_mode].copy()
        conv.append_message(conv.roles[0], text)
        conv.append_message(conv.roles[1], None)
        ids = tokenizer_image_token(conv.get_prompt(), self.tokenizer, return_tensors="pt")
        pictures: dict[str, Any] = {}
        if image is not None:
            pixels = process_images([image], self.processor, config)
            pictures = {"images": pixels, "image_sizes": [image.size]}
        with torch.inference_mode():
            output = self.model.generate(
                torch.as_tensor(ids)[None].to(self.model.device),
                do_sample=self.args.temperature > 0,
                temperature=self.args.temperature,
                top_p=getattr(self.args, "top_p", None),
                num_beams=getattr(self.args, "num_beams", 1),
                max_new_tokens=self.limit,
                use_cache=True,
                **pictures,
            )
        answer: str = self.tokenizer.batch_decode(output, skip_special_tokens=True)[0]
        return answer.strip()

    def record(self, question_id: object, prompt: str, text: str, **more: object) -> Any:  # noqa: ANN401
        """Return a line of the file of answers."""
        return {
            "question_id": question_id,
            "prompt": prompt,
            "text": text,
            "answer_id": uuid.uuid4().hex,
            "model_id": self.name,
            "metadata": {},
            **more,
        }


def _asked(model: _Model, lines: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    for line in lines:
        with Image.open(Path(model.args.image_folder) / line["image"]) as opened:
            text = model.answer(line["text"], opened.convert("RGB"))
        yield model.record(line["question_id"], line["text"], text)


def _asked_of_science(model: _Model, lines: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    for line in lines:
        question = line["conversations"][0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if model.args.single_pred_prompt:
            question += f"\n{LETTERS['en']}"
        image, prompt = None, question
        if "image" in line:
            with Image.open(Path(model.args.image_folder) / line["image"]) as opened:
                image = opened.convert("RGB")
            prompt = f"{DEFAULT_IMAGE_TOKEN}\n{question}"
        yield model.record(line["id"], prompt, model.answer(question, image))


def _asked_of_mmbench(model: _Model, rows: Sequence[Mapping[str, str]]) -> Iterator[Any]:
    args = model.args
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
            text = model.answer(prompt + closing, image)
            index = int(row["index"]) if row["index"].isdecimal() else row["index"]
            yield model.record(
                index, prompt, text, round_id=turn, options=options, option_char=letters
            )
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


ASKED: Mapping[str, Callable[[_Model, Any], Iterator[Any]]] = {
    "science": _asked_of_science,
    "mmbench": _asked_of_mmbench,
}


def eval_model(args: Foreign, kind: str = "") -> None:
    """Answer the questions of `args.question_file` and write `args.answers_file` line by line.

    Args:
        args: model_path, model_base, image_folder, question_file, answers_file, conv_mode,
            num_chunks, chunk_idx, temperature, top_p, num_beams, and the options of the program.
        kind: "", "loader", "science" or "mmbench".
    """
    model = _Model(args, args.max_new_tokens if kind == "loader" else 1024)
    plain = "plain" in model.name and "finetune" not in model.name.lower()
    if kind in ("loader", "mmbench") and plain and "mmtag" not in args.conv_mode:
        args.conv_mode += "_mmtag"
        sys.stdout.write(f"a model of captions alone: the conversation is {args.conv_mode}\n")
    questions = _read(Path(args.question_file).expanduser(), kind)
    chosen = get_chunk(questions, args.num_chunks, args.chunk_idx)
    answers = Path(args.answers_file).expanduser()
    answers.parent.mkdir(parents=True, exist_ok=True)
    with answers.open("w", encoding="utf-8") as file:
        asked: Callable[[_Model, Any], Iterator[Any]] = ASKED.get(kind, _asked)
        for record in asked(model, chosen):
            file.write(json.dumps(record) + "\n")
            file.flush()


def build_parser(kind: str) -> argparse.ArgumentParser:
    """Return the options of a program."""
    parser = argparse.ArgumentParser(prog=f"llava.eval.model_vqa{'_' * bool(kind)}{kind}")
    parser.add_argument("--model-path", default="facebook/opt-350m")
    parser.add_argument("--model-base", default=None)
    parser.add_argument("--image-folder", default="")
    parser.add_argument("--question-file", default="tables/question.json")
    parser.add_argument("--answers-file", default="answer.jsonl")
    parser.add_argument("--conv-mode", default="llava_v0" if kind == "science" else "llava_v1")
    parser.add_argument("--num-chunks", type=int, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--num_beams", type=int, default=1)
    if kind == "loader":
        parser.add_argument("--max_new_tokens", type=int, default=128)
    if kind in ("science", "mmbench"):
        parser.add_argument("--single-pred-prompt", action="store_true")
    if kind == "science":
        parser.add_argument("--answer-prompter", action="store_true")
    if kind == "mmbench":
        parser.add_argument("--all-rounds", action="store_true")
        parser.add_argument("--lang", default="en", choices=sorted(LETTERS))
    return parser


def names_of(kind: str) -> dict[str, Any]:
    """Return what the module of a program has."""
    return {"eval_model": partial(eval_model, kind=kind), "get_chunk": get_chunk}


def main(kind: str) -> None:
    """Run a program with the options of the command line."""
    eval_model(build_parser(kind).parse_args(), kind)

"""Exam: the saved results answer held-out questions, and are compared word for word.

    encoded sample    positions before an answer --load, engine, greedy--> answer
                      the answer itself ------------------------------------> equal?
    folder/exam.jsonl {"sample", "reference", "answer", "equal"};   exact_match = equal / asked

Knows encoded samples and how a loaded model answers; must not know the loop.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch

from lapilli.checkpoint.load import load_checkpoint
from lapilli.config.generation import SamplingParams
from lapilli.errors import LapilliError
from lapilli.generate.output import Generation
from lapilli.pipeline.backend import Backend, ProcessedPrompt, with_stops
from lapilli.prompt.choose import Template
from lapilli.prompt.encode import EncodedPrompt
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.train.data import EncodedDataset, EncodedSample
from lapilli.train.trainer.contract import Record

ANSWERS: Final = "exam.jsonl"
FIGURE: Final = "exact_match"
_ROOM: Final = 8  # tokens beyond the reference's: the same words may be cut into more of them


@dataclass(frozen=True, slots=True)
class Graded:
    """An answer beside the one that the data has."""

    sample: str
    reference: str
    answer: str

    @property
    def equal(self) -> bool:
        """Return whether they are the same but for white space around them."""
        return self.reference == self.answer


@dataclass(frozen=True, slots=True)
class _Question:
    sample: str
    prompt: ProcessedPrompt
    reference: str
    num_tokens: int


def hold_exam(
    model: Path, samples: EncodedDataset, number: int, *, template: Template, device: torch.device
) -> list[Graded]:
    """Answer the questions of `number` held-out samples, spread evenly over all of them.

    Every answer of a sample is asked for, the true turns before it. Samples that cannot be read are
    left out where the data set skips them, and so are answers that max_length cut.

    Args:
        model: folder of the results, loaded as `lapilli ask` would load it.
        samples: those that are held out.
        number: of samples; all of them, where there are fewer.
        template: of the samples; it says where an answer stops.
        device: where the answers are computed.

    Raises:
        CheckpointError: the results, or the base below them, cannot be read.
    """
    loaded = load_checkpoint(model, device=device)
    backend = Backend(loaded)
    number = min(number, len(samples))
    graded = []
    for index in (at * len(samples) // number for at in range(number)):
        for question in _questions(
            samples.sample(index), samples.dataset.label(index), loaded.tokenizer, template
        ):
            params = SamplingParams(max_new_tokens=question.num_tokens + _ROOM)
            params = with_stops(params, template, loaded.tokenizer)
            answer = _answer(backend, question.prompt, params)
            graded.append(Graded(question.sample, question.reference, answer))
    return graded


def _answer(backend: Backend, prompt: ProcessedPrompt, params: SamplingParams) -> str:
    """Return the text, or why there is none where the prompt leaves the context no room."""
    try:
        found: Generation = backend.generate([prompt], params)[0]
    except LapilliError as error:
        return f"({error})"
    return found.text.strip()


def _questions(
    encoded: EncodedSample, name: str, tokenizer: Tokenizer, template: Template
) -> Iterator[_Question]:
    """Yield every whole answer of a sample, with what stands before it."""
    if encoded.skipped:
        return
    ids = encoded.prompt.input_ids
    for start, end in answers_of(encoded.prompt.loss_mask):
        if start == 0 or (encoded.cut and end == len(ids)):
            continue
        reference = tokenizer.decode(ids[start:end]).strip()
        for stop in template.stop:
            reference = reference.removesuffix(stop).strip()
        prompt = _before(encoded.prompt, encoded.media, start)
        yield _Question(name, prompt, reference, end - start)


def answers_of(loss_mask: Sequence[bool]) -> list[tuple[int, int]]:
    """Return start and end of every run of supervised positions."""
    found = []
    for counts, places in groupby(range(len(loss_mask)), key=lambda at: loss_mask[at]):
        stretch = list(places)
        if counts:
            found.append((stretch[0], stretch[-1] + 1))
    return found


def _before(prompt: EncodedPrompt, media: Sequence[Any], end: int) -> ProcessedPrompt:
    spans = tuple(span for span in prompt.spans if span.start < end)
    encoded = EncodedPrompt(prompt.input_ids[:end], [False] * end, spans)
    return ProcessedPrompt(encoded, tuple(media[: len(spans)]))


def write_exam(folder: Path, graded: Sequence[Graded]) -> None:
    """Write every answer as a line of `folder/exam.jsonl`."""
    lines = [json.dumps({**asdict(one), "equal": one.equal}, ensure_ascii=False) for one in graded]
    (folder / ANSWERS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def exam_record(step: int, graded: Sequence[Graded]) -> Record:
    """Return the metrics of an exam for the log."""
    equal = sum(one.equal for one in graded)
    share = equal / len(graded) if graded else 0.0
    return {"step": step, FIGURE: share, "equal": equal, "answers": len(graded)}

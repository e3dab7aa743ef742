"""Rankers in training: of texts, of vectors, and of two towers, from one small checkpoint.

    stage I     records with a reason: the language model's cross entropy   train_reasoning
    stage II    query, text -> probability                                  train_text
    stage III   query, vectors of an encoder -> probability                 train_mixed
    two towers  query -> vector, text -> vector, their cosine               train_towers

Each takes a checkpoint's folder and writes another one, but for the towers, which stay in memory.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit

from lapilli import Chat
from lapilli.checkpoint.export import save_loaded
from lapilli.checkpoint.load import load_checkpoint
from lapilli.config.model import DecoderConfig
from lapilli.modality.text import PreparedText, last_states
from lapilli.plan.flops import request_flops
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.prompt.message import MediaPart
from lapilli.rank import Ranker, RankTemplate
from lapilli.rank.mixlm import (
    CURRICULUM,
    Phase,
    RankingExample,
    RankingTask,
    binary_kl,
    with_teacher,
)
from lapilli.shapes import Float, Tensor
from lapilli.train.build import add_modalities
from lapilli.train.data import EncodedSample
from lapilli.train.recipe import ModelRecipe, OptimRecipe, Recipe, RunRecipe
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import Loss, Task, TrainingBatch, collate

TEMPLATE: Final = RankTemplate(user="query: {query}\nitem: {item}\nmatch?")
ITEM: Final = "item"

Record = Sequence[tuple[str | MediaPart, bool]]
"""Pieces of a text, or items that stand in it as vectors; True: it is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How long and how fast something learns.

    Attributes:
        freezes_ranker: the encoder of items learns alone.
    """

    steps: int
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0
    freezes_ranker: bool = False

    @property
    def examples(self) -> int:
        """Return how many examples it sees."""
        return self.steps * self.batch

    def recipe(self, encoders: tuple[str, ...] = ()) -> Recipe:
        """Return it as the trainer's recipe, under which these encoders learn too."""
        return Recipe(
            stage="align" if self.freezes_ranker else "instruct",
            model=ModelRecipe(tune_encoder=encoders),
            optim=OptimRecipe(lr=self.lr, warmup_ratio=0.05, schedule="trapezoid"),
            run=RunRecipe(
                steps=self.steps,
                batch_size=self.batch,
                seed=self.seed,
                log_every=10,
                save_every=1_000_000,
                plot=False,
            ),
        )


def open_chat(folder: Path) -> Chat:
    """Return the model of a folder."""
    return Chat(load_checkpoint(folder, device="cpu", dtype="float32"))


@dataclass
class ReasoningTask:
    """Records of which some pieces are learned, in the order given."""

    chat: Chat
    records: Sequence[Record]
    batch_size: int

    def __post_init__(self) -> None:
        self.model = TrainedModel(self.chat.model)

    def batch(self, step: int, micro: int) -> tuple[TrainingBatch, int]:
        """Return a micro-batch and its number of learned tokens."""
        del micro  # a step is one
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        batch = collate([self._sample(self.records[i % len(self.records)]) for i in places])
        return batch, batch.num_valid

    def loss(self, batch: TrainingBatch) -> Loss:
        """Return the summed cross entropy."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return nothing: what is learned is seen in the stages after it."""
        return {}

    def _sample(self, record: Record) -> EncodedSample:
        ids: list[int] = []
        mask: list[bool] = []
        spans: list[Span] = []
        media = []
        for piece, is_learned in record:
            if isinstance(piece, MediaPart):
                media.append(self.chat.prepare(piece))
                length = self.chat.model.span_length(piece.modality, media[-1])
                spans.append(Span(0, len(ids), length, piece.modality))
                found = [PLACEHOLDER] * length
            else:
                found = self.chat.tokenizer.encode(piece)
            ids += found
            mask += [is_learned] * len(found)
        return EncodedSample(EncodedPrompt(ids, mask, tuple(spans)), tuple(media), "record")


def train_reasoning(source: Path, out: Path, records: Sequence[Record], course: Course) -> float:
    """Train stage I; return its seconds of one core."""
    return _train(source, out, lambda chat: ReasoningTask(chat, records, course.batch), course)


def train_text(
    source: Path, out: Path, examples: Sequence[RankingExample], course: Course
) -> float:
    """Train stage II; return its seconds of one core."""
    recipe = course.recipe()

    def task(chat: Chat) -> RankingTask:
        return RankingTask(chat, examples, recipe.run, reads="text", template=TEMPLATE)

    return _train(source, out, task, course)


def taught(teacher: Path, examples: Sequence[RankingExample]) -> list[RankingExample]:
    """Return the examples with the probabilities of a text ranker."""
    return with_teacher(examples, Ranker(open_chat(teacher), template=TEMPLATE))


def train_mixed(
    teacher: Path,
    out: Path,
    examples: Sequence[RankingExample],
    course: Course,
    *,
    curriculum: Sequence[Phase] = CURRICULUM,
    tokens: int = 1,
) -> float:
    """Train stage III, whose ranker and encoder begin as the teacher; return its seconds.

    Args:
        teacher: folder of the text ranker.
        out: folder of the result.
        examples: with the teacher's probabilities, where a phase has distill above 0.
        course: how long and how fast.
        curriculum: weights of the parts.
        tokens: vectors of an item.
    """
    start = _with_encoder(teacher, out, tokens)
    recipe = course.recipe()

    def task(chat: Chat) -> RankingTask:
        return RankingTask(
            chat,
            examples,
            recipe.run,
            reads="mixed",
            encoder=ITEM,
            template=TEMPLATE,
            curriculum=curriculum,
        )

    return _train(start, out, task, course)


def _with_encoder(teacher: Path, out: Path, tokens: int = 1) -> Path:
    """Write a ranker beside `out` with an encoder of items, which begins as the ranker does."""
    start = out.with_name(f"{out.name}-start")
    item = {"kind": "text", "from": str(teacher), "tokens": tokens, "max_length": 512}
    add_modalities(teacher, start, {ITEM: item}, overwrite=True)
    return start


def _train(source: Path, out: Path, make_task: Callable[[Chat], Task], course: Course) -> float:
    """Train a checkpoint and write it; return its seconds of one core.

    What an earlier call has finished in the folder is not trained again.
    """
    spent = out.with_name(f"{out.name}.seconds")
    if spent.is_file():
        return float(spent.read_text())
    loaded = load_checkpoint(source, device="cpu", dtype="float32")
    recipe = course.recipe(encoders=tuple(loaded.model.modalities))
    choose_trainable(loaded.model, recipe)
    task = make_task(Chat(loaded))
    started = time.process_time()
    train(task, recipe, out.with_name(f"{out.name}-run"))
    seconds = time.process_time() - started
    save_loaded(out, loaded, layout="huggingface", overwrite=True)
    spent.write_text(f"{seconds:.1f}\n")
    return seconds


class Towers(nn.Module):
    """A bi-encoder: the language model reads queries, the encoder of items reads texts.

    The logit of a match is a learned scale times the cosine of both last states, and a bias.
    """

    def __init__(self, chat: Chat) -> None:
        super().__init__()
        self.vlm, self._tokenizer = chat.model, chat.tokenizer
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.bias = nn.Parameter(torch.tensor(0.0))

    def queries(self, texts: Sequence[str]) -> Float[Tensor, "n D"]:
        """Return a unit vector of every query."""
        rows = [PreparedText(torch.tensor(self._tokenizer.encode(text))) for text in texts]
        return F.normalize(last_states(self.vlm.language_model, rows, 1)[:, 0], dim=-1)

    def items(self, texts: Sequence[str]) -> Float[Tensor, "n D"]:
        """Return a unit vector of every text."""
        encoder = self.vlm.modality(ITEM)
        states = encoder.embed([encoder.prepare(text) for text in texts])
        return F.normalize(torch.stack([state[-1] for state in states]), dim=-1)

    def forward(self, examples: Sequence[RankingExample]) -> Loss:
        """Return KL(label || p), summed."""
        queries = self.queries([example.query for example in examples])
        items = self.items([example.item for example in examples])
        logits = self.scale * (queries * items).sum(-1) + self.bias
        return Loss(binary_kl(torch.tensor([example.label for example in examples]), logits).sum())


@dataclass
class TowersTask:
    """Examples for two towers, in the order given."""

    model: Towers
    examples: Sequence[RankingExample]
    batch_size: int

    def batch(self, step: int, micro: int) -> tuple[list[RankingExample], int]:
        """Return a micro-batch and its number of examples."""
        del micro  # a step is one
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self.examples[i % len(self.examples)] for i in places], self.batch_size

    def loss(self, batch: Sequence[RankingExample]) -> Loss:
        """Return the summed loss."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return nothing: the program ranks with it."""
        return {}


def train_towers(
    teacher: Path, folder: Path, examples: Sequence[RankingExample], course: Course
) -> tuple[Towers, float]:
    """Train two towers, both of which begin as the text ranker; return them and their seconds.

    Args:
        teacher: folder of the text ranker.
        folder: of the run.
        examples: labels alone count.
        course: how long and how fast.
    """
    start = _with_encoder(teacher, folder)
    loaded = load_checkpoint(start, device="cpu", dtype="float32")
    recipe = course.recipe(encoders=(ITEM,))
    choose_trainable(loaded.model, recipe)
    towers = Towers(Chat(loaded))
    for name, parameter in towers.named_parameters():
        if name.endswith("lm_head.weight"):
            parameter.requires_grad_(False)  # nothing of it is read
    started, spent = time.process_time(), folder.with_name(f"{folder.name}.seconds")
    train(TowersTask(towers, examples, course.batch), recipe, folder)
    if not spent.is_file():  # else the run only took up what it had
        spent.write_text(f"{time.process_time() - started:.1f}\n")
    return towers.eval(), float(spent.read_text())


def item_flops(text: DecoderConfig, prefix: int, positions: int) -> float:
    """Return the operations of an item behind a prefix that is kept."""
    return request_flops(text, positions=prefix + positions) - request_flops(text, positions=prefix)


def fastest(ways: Mapping[str, Callable[[], None]], rounds: int = 3) -> dict[str, float]:
    """Return the seconds of one core of every way in its fastest round; the ways take turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - started)
    return best

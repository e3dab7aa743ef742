"""Rankers in training: of texts, of vectors, and of two towers, from one small checkpoint.

    stage I     records with a reason: the language model's cross entropy   train_reasoning
    stage II    query, text -> probability                                  train_text
    vectors     text -> encoder -> the mean of its words' embeddings        train_vectors
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
from lapilli.modality.text import TextModality
from lapilli.model import VisionLanguageModel
from lapilli.plan.flops import request_flops
from lapilli.prompt.encode import EncodedPrompt
from lapilli.rank import Ranker, RankTemplate
from lapilli.rank.mixlm import (
    CURRICULUM,
    RankingExample,
    RankingTask,
    binary_kl,
    with_teacher,
)
from lapilli.shapes import Float, Tensor
from lapilli.train.build import add_modalities
from lapilli.train.data import EncodedSample
from lapilli.train.recipe import (
    ModelRecipe,
    OptimRecipe,
    Phase,
    Precision,
    Recipe,
    RunRecipe,
)
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import Loss, Task, TrainingBatch, collate

TEMPLATE: Final = RankTemplate(user="query: {query}\nitem: {item}\nmatch?")
ITEM, QUERY = "item", "query"

Record = Sequence[tuple[str, bool]]
"""Pieces of a text; True: it is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How long and how fast something learns.

    Attributes:
        freezes_ranker: the encoder of items learns alone.
        freeze: beginnings of names of parameters that stay as they are.
        precision: of forward and backward passes.
    """

    steps: int
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0
    freezes_ranker: bool = False
    freeze: tuple[str, ...] = ()
    precision: Precision = "float32"

    @property
    def examples(self) -> int:
        """Return how many examples it sees."""
        return self.steps * self.batch

    def recipe(self, encoders: tuple[str, ...] = ()) -> Recipe:
        """Return it as the trainer's recipe, under which these encoders learn too."""
        return Recipe(
            stage="align" if self.freezes_ranker else "instruct",
            model=ModelRecipe(tune_encoder=encoders, freeze=self.freeze),
            optim=OptimRecipe(lr=self.lr, warmup_ratio=0.05, schedule="trapezoid"),
            run=RunRecipe(
                steps=self.steps,
                batch_size=self.batch,
                seed=self.seed,
                precision=self.precision,
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
        for text, is_learned in record:
            piece = self.chat.tokenizer.encode(text)
            ids += piece
            mask += [is_learned] * len(piece)
        return EncodedSample(EncodedPrompt(ids, mask), (), "record")


def train_reasoning(source: Path, out: Path, records: Sequence[Record], course: Course) -> float:
    """Train stage I; return its seconds of one core."""
    return train_task(source, out, lambda chat: ReasoningTask(chat, records, course.batch), course)


def train_text(
    source: Path, out: Path, examples: Sequence[RankingExample], course: Course
) -> float:
    """Train stage II; return its seconds of one core."""
    recipe = course.recipe()

    def task(chat: Chat) -> RankingTask:
        return RankingTask(chat, examples, recipe.run, reads="text", template=TEMPLATE)

    return train_task(source, out, task, course)


def taught(teacher: Path, examples: Sequence[RankingExample]) -> list[RankingExample]:
    """Return the examples with the probabilities of a text ranker."""
    return with_teacher(examples, Ranker(open_chat(teacher), template=TEMPLATE))


@dataclass
class VectorsTask:
    """Texts whose vectors should lie where their words' embeddings do: 1 - cos(vector, their mean).

    A language model that has read words alone finds words in such a vector, several at once.

    Attributes:
        chat: the language model, which stays as it is, and the encoder of items.
        texts: in the order given.
        batch_size: texts of a step.
    """

    chat: Chat
    texts: Sequence[str]
    batch_size: int

    def __post_init__(self) -> None:
        self.model = self.chat.model
        self._encoder = encoder(self.model, ITEM)
        self._language_model = self.model.language_model
        self._separators = set(self.chat.tokenizer.encode(","))

    def batch(self, step: int, micro: int) -> tuple[list[str], int]:
        """Return a micro-batch and its number of texts."""
        del micro  # a step is one
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self.texts[i % len(self.texts)] for i in places], self.batch_size

    def loss(self, batch: Sequence[str]) -> Loss:
        """Return the summed loss."""
        with torch.no_grad():
            means = torch.stack([self._mean(text) for text in batch])
        return Loss((1 - F.cosine_similarity(vectors_of(self._encoder, batch), means)).sum())

    def evaluate(self) -> Mapping[str, float]:
        """Return nothing: what is learned is seen in stage III."""
        return {}

    def _mean(self, text: str) -> Float[Tensor, " D"]:
        ids = [token for token in self.chat.tokenizer.encode(text) if token not in self._separators]
        return self._language_model.embed(torch.tensor(ids)).mean(0)


def train_vectors(
    teacher: Path, fresh: Path, out: Path, texts: Sequence[str], course: Course
) -> float:
    """Write a ranker with an encoder of items, which has learned alone; return its seconds.

    Args:
        teacher: folder of the text ranker.
        fresh: folder of the language model that the encoder begins as.
        out: folder of the result.
        texts: of items.
        course: how long and how fast.
    """
    start = out.with_name(f"{out.name}-start")
    add_modalities(teacher, start, {ITEM: encoder_of(fresh)}, overwrite=True)
    return train_task(start, out, lambda chat: VectorsTask(chat, texts, course.batch), course)


def train_mixed(
    start: Path,
    out: Path,
    examples: Sequence[RankingExample],
    course: Course,
    *,
    curriculum: Sequence[Phase] = CURRICULUM,
) -> float:
    """Train stage III, ranker and encoder together; return its seconds.

    Args:
        start: folder of a ranker with an encoder of items.
        out: folder of the result.
        examples: with the teacher's probabilities, where a phase has distill above 0.
        course: how long and how fast.
        curriculum: weights of the parts.
    """
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

    return train_task(start, out, task, course)


def train_task(source: Path, out: Path, make_task: Callable[[Chat], Task], course: Course) -> float:
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


def encoder(vlm: VisionLanguageModel, name: str) -> TextModality:
    """Return an encoder of texts."""
    found = vlm.modality(name)
    if not isinstance(found, TextModality):
        raise TypeError(f"the modality {name} is {type(found).__name__}: expected TextModality")
    return found


def vectors_of(encoder: TextModality, texts: Sequence[str]) -> Float[Tensor, "n D"]:
    """Return the last state of every text."""
    states = encoder.embed([encoder.prepare(text) for text in texts])
    return torch.stack([state[-1] for state in states])


class Towers(nn.Module):
    """A bi-encoder: one encoder reads queries and another one texts, both of the modality's kind.

    The logit of a match is a learned scale times the cosine of both last states, and a bias.
    """

    def __init__(self, vlm: VisionLanguageModel) -> None:
        super().__init__()
        self.of_items, self.of_queries = encoder(vlm, ITEM), encoder(vlm, QUERY)
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.bias = nn.Parameter(torch.tensor(0.0))

    def queries(self, texts: Sequence[str]) -> Float[Tensor, "n D"]:
        """Return a unit vector of every query."""
        return F.normalize(vectors_of(self.of_queries, texts), dim=-1)

    def items(self, texts: Sequence[str]) -> Float[Tensor, "n D"]:
        """Return a unit vector of every text."""
        return F.normalize(vectors_of(self.of_items, texts), dim=-1)

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
    source: Path, fresh: Path, folder: Path, examples: Sequence[RankingExample], course: Course
) -> tuple[Towers, float]:
    """Train two towers, both of which begin as the encoder of items; return them, their seconds.

    Args:
        source: folder of a ranker with an encoder of items.
        fresh: folder of what that encoder once began as, for its sizes.
        folder: of the run.
        examples: labels alone count.
        course: how long and how fast.
    """
    start = folder.with_name(f"{folder.name}-start")
    add_modalities(source, start, {QUERY: encoder_of(fresh)}, overwrite=True)
    loaded = load_checkpoint(start, device="cpu", dtype="float32")
    loaded.model.requires_grad_(False)
    towers = Towers(loaded.model)
    towers.of_queries.load_state_dict(towers.of_items.state_dict())
    for name, parameter in towers.named_parameters():
        parameter.requires_grad_(not name.endswith("lm_head.weight"))  # nothing of it is read
    started, spent = time.process_time(), folder.with_name(f"{folder.name}.seconds")
    train(TowersTask(towers, examples, course.batch), course.recipe(), folder)
    if not spent.is_file():  # else the run only took up what it had
        spent.write_text(f"{time.process_time() - started:.1f}\n")
    return towers.eval(), float(spent.read_text())


def encoder_of(fresh: Path) -> dict[str, object]:
    """Return what a config.json says of an encoder that begins as the model of a folder."""
    return {"kind": "text", "from": str(fresh), "tokens": 1, "max_length": 512}


def item_flops(text: DecoderConfig, prefix: int, positions: int) -> float:
    """Return the operations of an item behind a prefix that is kept."""
    return request_flops(text, positions=prefix + positions) - request_flops(text, positions=prefix)


def fastest(ways: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Return the seconds of one core of every way in its fastest round; the ways take turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - started)
    return best

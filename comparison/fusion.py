"""Is early fusion better than late fusion? The same pictures, words and sizes in four forms.

    scenes  -> features of pebble's frozen tower, captions, questions   (comparison/scenes.py)
    forms   -> tokens, soft prompt, cross-attention (forms.py), ALBEF (albef.py)
    every form, every seed: captions, then questions, as many epochs each -> right answers
    one model of each form: positions, operations and time of a request; finding scenes by caption

    python -m comparison.fusion [--seeds 0 1 2] [--processes 2] [--toy] [--kept FILE]

Every run is kept in a file as it ends; at the end comparison/results/fusion.json and docs/fusion.md
are written.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit

from comparison import fusion_report
from comparison.albef import Albef, AlbefConfig
from comparison.forms import FormConfig, LanguageReader
from comparison.scenes import (
    ASK,
    DESCRIBE,
    SKILLS,
    Scenes,
    Texts,
    Vocabulary,
    batches_of,
    captions_of,
    join_texts,
    make_scenes,
    most_frequent,
    questions_of,
    standardise,
)
from lapilli import load
from lapilli.modality.image.image import VisionTransformer
from lapilli.plan.flops import tower_operations
from lapilli.train.recipe import OptimRecipe, RunRecipe, TrainerRecipe
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.task import Loss
from pebble.score import EXAM_SEED

LOG = logging.getLogger("comparison.fusion")
RESULT: Final = Path(__file__).parent / "results" / "fusion.json"
FORMS: Final[Mapping[str, FormConfig | AlbefConfig]] = {
    "tokens": FormConfig(layers=4),
    "soft prompt": FormConfig(layers=3, projector="resampler4"),
    "cross-attention": FormConfig(layers=3, every=3),
    "ALBEF": AlbefConfig(),
}
RATES: Final = (2e-3,)
"""Learning rates that the first seed tries; the validation split chooses for every form."""
Model = LanguageReader | Albef
TRAIN_SEED: Final = 800_000_000  # scenes that pebble's tower was not trained on
VALIDATION_SEED: Final = 900_000_000
KINDS: Final = ("captions", "questions")
_EVALUATED: Final = 32  # scenes of a pass
_RERANKED: Final = 16
_TOGETHER: Final = 10  # captions after a picture in one pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is learned and measured.

    Attributes:
        train: scenes; validation and test too.
        questions: about every scene.
        batch: scenes of a step.
        retrieval: scenes to be found by their captions.
        repeats: of every timing.
    """

    train: int = 1600
    validation: int = 100
    test: int = 300
    questions: int = 8
    caption_epochs: int = 3
    question_epochs: int = 3
    batch: int = 8
    retrieval: int = 50
    repeats: int = 30


TOY: Final = Plan(
    train=16,
    validation=4,
    test=8,
    caption_epochs=1,
    question_epochs=1,
    batch=4,
    retrieval=4,
    repeats=2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Scenes for learning, for choices, and for what is reported."""

    train: Scenes
    validation: Scenes
    test: Scenes
    vocabulary: Vocabulary


def tower() -> VisionTransformer:
    """Return pebble's tower."""
    image = load("pebble", device="cpu", dtype="float32").model.modality("image")
    found: VisionTransformer = image.vision_tower  # type: ignore[attr-defined]  # an ImageModality
    return found


def make_splits(plan: Plan) -> Splits:
    """Draw the scenes and let pebble's tower see them; features are standardised over training."""
    eyes = tower()
    parts = [
        make_scenes(seed, count, eyes, questions=plan.questions)
        for seed, count in (
            (TRAIN_SEED, plan.train),
            (VALIDATION_SEED, plan.validation),
            (EXAM_SEED, plan.test),
        )
    ]
    learned, validation, test = standardise(parts)
    return Splits(train=learned, validation=validation, test=test, vocabulary=Vocabulary(learned))


def build_model(name: str, splits: Splits, seed: int) -> Model:
    """Return a model of this form with fresh weights."""
    config, width = FORMS[name], splits.train.features.shape[-1]
    kind: Callable[..., Model] = Albef if isinstance(config, AlbefConfig) else LanguageReader
    return kind(config, splits.vocabulary, width, seed)


class SceneTask:
    """Captions or questions of the training scenes, for the trainer's loop.

    Args:
        model: of any form.
        splits: the scenes.
        kind: "captions" or "questions".
        batch: scenes of a step.
        seed: of their order.
    """

    def __init__(self, model: Model, splits: Splits, kind: str, batch: int, seed: int) -> None:
        self.model = model
        self.num_samples = len(splits.train)
        self._splits, self._kind, self._batch, self._seed = splits, kind, batch, seed
        self._orders: dict[int, list[int]] = {}

    def batch(self, step: int, micro: int) -> tuple[Texts, int]:
        """Return the scenes of a step, and how many words or answers are to be found."""
        scenes, vocabulary = self._splits.train, self._splits.vocabulary
        per_epoch = -(-len(scenes) // self._batch)
        epoch, at = divmod(step, per_epoch)
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(1000 * self._seed + epoch)
            self._orders = {epoch: torch.randperm(len(scenes), generator=generator).tolist()}
        rows = self._orders[epoch][at * self._batch : (at + 1) * self._batch]
        if self._kind == "questions":
            texts = questions_of(scenes, rows, vocabulary)
            return texts, len(texts.answers)
        texts = captions_of(scenes, rows, vocabulary)
        return texts, len(rows) if isinstance(self.model, Albef) else int(texts.known.sum())

    def loss(self, batch: Texts) -> Loss:
        """Return the summed loss."""
        if self._kind == "captions":
            return self.model.caption_loss(batch)
        logits = self.model.answer_logits(batch)
        return Loss(F.cross_entropy(logits, batch.answers, reduction="sum"))

    def evaluate(self) -> Mapping[str, float]:
        """Return nothing: what is held out is looked at when the run is over."""
        return {}


def learn(
    model: Model, splits: Splits, plan: Plan, kind: str, *, lr: float, seed: int, folder: Path
) -> float:
    """Train on captions or on questions; return the seconds of processor time."""
    epochs = plan.caption_epochs if kind == "captions" else plan.question_epochs
    recipe = TrainerRecipe(
        stage=kind,
        optim=OptimRecipe(lr=lr, betas=(0.9, 0.98), weight_decay=0.01, warmup_ratio=0.1),
        run=RunRecipe(
            epochs=float(epochs),
            batch_size=plan.batch,
            seed=seed,
            threads=1,
            save_every=10**6,
            log_every=50,
            plot=False,
        ),
    )
    start = time.process_time()
    train(SceneTask(model.train(), splits, kind, plan.batch, seed), recipe, folder / kind)
    model.eval()
    return time.process_time() - start


@torch.inference_mode()
def right_answers(model: Model, scenes: Scenes, vocabulary: Vocabulary) -> dict[str, list[int]]:
    """Return how many answers are right, and of how many, by skill and of "all"."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for rows in batches_of(len(scenes), _EVALUATED):
        texts = questions_of(scenes, rows, vocabulary)
        found = (model.answer_logits(texts).argmax(-1) == texts.answers).tolist()
        skills = [asked.skill for row in rows for asked in scenes.questions[row]]
        for skill, is_right in zip(skills, found, strict=True):
            for name in (skill, "all"):
                right[name] += is_right
                total[name] += 1
    return {name: [right[name], total[name]] for name in (*SKILLS, "all") if total[name]}


def guessed(splits: Splits) -> dict[str, list[int]]:
    """Return the right answers of who says for every skill what is most frequent in training."""
    said = most_frequent(splits.train)
    found: dict[str, list[int]] = {name: [0, 0] for name in (*SKILLS, "all")}
    for of_scene in splits.test.questions:
        for asked in of_scene:
            for name in (asked.skill, "all"):
                found[name][0] += said.get(asked.skill) == asked.answer
                found[name][1] += 1
    return found


def request_costs(splits: Splits, plan: Plan) -> dict[str, Any]:
    """Return positions, operations and time of a request, by form; weights do not matter to them.

    A request is a question about a picture whose features are there: alone, with the picture known
    from a question before, and (times alone) with all questions about it in one pass.
    """
    models = {name: build_model(name, splits, 0).eval() for name in FORMS}
    scenes, vocabulary = splits.test, splits.vocabulary
    features = scenes.features.shape[1]
    asked = [2 + len(one.words) for of_scene in scenes.questions for one in of_scene]
    said = [1 + len(one) for one in scenes.captions[: plan.retrieval]]
    found = {}
    for name, model in models.items():
        before = model.num_positions(features) if isinstance(model, LanguageReader) else 0
        found[name] = {
            "positions": before + statistics.mean(asked),
            "flops": statistics.mean(model.request_flops(n, features) for n in asked),
            "flops, known": statistics.mean(
                model.request_flops(n, features, known=True) for n in asked
            ),
            "flops, retrieval": retrieval_flops(model, said, features),
        }
    for name, times in request_times(models, scenes, vocabulary, plan.repeats).items():
        found[name] |= times
    return {"features": features, "tower": tower_operations(tower().config), "forms": found}


def retrieval_flops(model: Model, said: Sequence[int], features: int) -> float:
    """Return the operations of comparing as many captions, of these lengths, with their pictures.

    Towers are left out. ALBEF makes a vector of each side; a language model reads every caption
    behind every picture, whose keys and values are kept.
    """
    number = len(said)
    if isinstance(model, Albef):
        vectors = sum(sum(model.vector_flops(n, features)) for n in said)
        return vectors + 2 * number**2 * model.config.embed
    config = model.decoder.config
    choice = 2 * config.vocab_size * config.hidden_size  # every word is one
    texts = sum(model.request_flops(n, features, known=True) + (n - 1) * choice for n in said)
    pictures = model.request_flops(1, features) - model.request_flops(1, features, known=True)
    return number * (texts + pictures)


@torch.inference_mode()
def request_times(
    models: Mapping[str, Model], scenes: Scenes, vocabulary: Vocabulary, repeats: int
) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of a question, alone and together with others.

    Forms take turns, so that what else the machine does falls on all of them.
    """
    together = questions_of(scenes, [0], vocabulary)
    first = [ASK, *vocabulary.ids(scenes.questions[0][0].words), ASK]
    alone = join_texts(together.features, [[first]], [0])
    times: dict[str, dict[str, list[float]]] = {
        name: {"ms": [], "ms, together": []} for name in models
    }
    for _ in range(repeats):
        for name, model in models.items():
            for what, texts in (("ms", alone), ("ms, together", together)):
                start = time.perf_counter()
                model.answer_logits(texts)
                spent = time.perf_counter() - start
                times[name][what].append(1e3 * spent / len(texts.answers))
    return {
        name: {what: statistics.median(ms) for what, ms in of_model.items()}
        for name, of_model in times.items()
    }


@torch.no_grad()
def find_scenes(model: Model, splits: Splits, plan: Plan) -> dict[str, float]:
    """Return how often a caption finds its scene among others, and what that costs.

    A language model scores every pair by the log probability of the caption; ALBEF compares vectors
    that it made of each side, and may look at the best pairs again (ITM).
    """
    scenes, vocabulary = splits.test, splits.vocabulary
    rows = list(range(plan.retrieval))
    start = time.process_time()
    if isinstance(model, Albef):
        captions = captions_of(scenes, rows, vocabulary)
        scores = model.similarities(captions)
        seconds = time.process_time() - start
        best = scores.topk(min(_RERANKED, len(rows)), dim=1).indices
        said = torch.tensor(rows).repeat_interleave(best.shape[1])
        matched = model.match_scores(captions, said, best.flatten()).view_as(best)
        again = best.gather(1, matched.argmax(1, keepdim=True))[:, 0]
        truth = torch.tensor(rows)
        return {
            "recall@1": float((scores.argmax(1) == truth).float().mean()),
            "recall@1, looked at again": float((again == truth).float().mean()),
            "seconds": seconds,
            "seconds, looked at again": time.process_time() - start,
        }
    texts = [[DESCRIBE, *vocabulary.ids(scenes.captions[row])] for row in rows]
    scores = torch.empty(len(rows), len(rows))  # [pictures, captions]
    for chunk in batches_of(len(rows), _TOGETHER):
        said_here = [texts[row] for row in chunk]
        for row in rows:
            pair = join_texts(scenes.features[[row]].float(), [said_here], [0] * len(chunk))
            scores[row, list(chunk)] = model.log_likelihood(pair)
    return {
        "recall@1": float((scores.argmax(0) == torch.tensor(rows)).float().mean()),
        "seconds": time.process_time() - start,
    }


def run_once(name: str, splits: Splits, plan: Plan, seed: int, lr: float) -> dict[str, Any]:
    """Train a form from one seed and return what was measured on the way."""
    model = build_model(name, splits, seed)
    with tempfile.TemporaryDirectory(prefix="lapilli-fusion-") as folder:
        seconds = {}
        for kind in KINDS:
            seconds[kind] = learn(model, splits, plan, kind, lr=lr, seed=seed, folder=Path(folder))
            if kind == "captions":
                retrieval = find_scenes(model, splits, plan)
    return {
        "lr": lr,
        "parameters": num_learned(model),
        "seconds": seconds,
        "retrieval": retrieval,
        "validation": right_answers(model, splits.validation, splits.vocabulary),
        "test": right_answers(model, splits.test, splits.vocabulary),
    }


def num_learned(model: nn.Module) -> int:
    """Return the number of parameters that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class Measurement:
    """The result as it grows, kept in a file after every run; what is in it is not run again.

    Args:
        plan: how much; a result of another one is begun anew.
        splits: the scenes.
        result: the file.
        processes: that train at the same time, on one thread each.
        rates: learning rates that the first seed tries.
    """

    def __init__(
        self,
        plan: Plan,
        splits: Splits,
        result: Path,
        processes: int,
        rates: Sequence[float] = RATES,
    ) -> None:
        self.plan, self.splits = plan, splits
        self._result, self._processes, self._rates = result, processes, rates
        self.found: dict[str, Any] = {"plan": asdict(plan), "runs": {}}
        if result.exists():
            before = json.loads(result.read_text(encoding="utf-8"))
            if before.get("plan") == self.found["plan"]:
                self.found = before

    def measure(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Measure everything."""
        self.found["guessed"] = guessed(self.splits)
        self._run([(name, seeds[0], lr) for name in FORMS for lr in self._rates])
        self._run([(name, seed, self.rate(name, seeds[0])) for seed in seeds for name in FORMS])
        self.found["seeds"] = list(seeds)
        self.found["rates"] = {name: self.rate(name, seeds[0]) for name in FORMS}
        self.found["requests"] = request_costs(self.splits, self.plan)
        self.save()
        return self.found

    def rate(self, name: str, seed: int) -> float:
        """Return the learning rate with most right answers on the validation split."""

        def right(lr: float) -> int:
            return int(self.found["runs"][run_key(name, seed, lr)]["validation"]["all"][0])

        return max(self._rates, key=right)

    def _run(self, jobs: Sequence[tuple[str, int, float]]) -> None:
        """Run what is not there yet."""
        left = [job for job in jobs if run_key(*job) not in self.found["runs"]]
        if self._processes == 1:
            for name, seed, lr in left:
                self._keep((name, seed, lr), run_once(name, self.splits, self.plan, seed, lr))
            return
        context = get_context("spawn")  # a fork of a process with torch's threads may hang
        with ProcessPoolExecutor(self._processes, mp_context=context) as pool:
            waiting = {
                pool.submit(run_once, name, self.splits, self.plan, seed, lr): (name, seed, lr)
                for name, seed, lr in left
            }
            for done in as_completed(waiting):
                self._keep(waiting[done], done.result())

    def _keep(self, job: tuple[str, int, float], run: dict[str, Any]) -> None:
        self.found["runs"][run_key(*job)] = run
        right, total = run["test"]["all"]
        LOG.info("%s: %.3f right, %s s", run_key(*job), right / total, run["seconds"])
        self.save()

    def save(self) -> None:
        """Keep what was found so far."""
        write_result(self.found, self._result)


def write_result(found: Mapping[str, Any], file: Path) -> None:
    """Write a result whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_suffix(".part")
    staged.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    staged.replace(file)


def run_key(name: str, seed: int, lr: float) -> str:
    """Return the name of a run in the result."""
    return f"{name} | {seed} | {lr:g}"


def main() -> None:
    """Measure, write the page and print it."""
    parser = argparse.ArgumentParser(description="Early fusion beside late fusion, measured.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="models that train at once")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="that the first seed tries"
    )
    parser.add_argument("--toy", action="store_true", help="a few scenes, to see that it works")
    kept = "where finished runs are kept, for a command that was killed; remove it to begin anew"
    parser.add_argument("--kept", type=Path, default=Path("build/fusion.json"), help=kept)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    plan = TOY if given.toy else Plan()
    start = time.monotonic()
    splits = make_splits(plan)
    LOG.info("scenes: %.0f s", time.monotonic() - start)
    measurement = Measurement(plan, splits, given.kept, given.processes, given.rates)
    found = measurement.measure(given.seeds)
    LOG.info("everything: %.0f s", time.monotonic() - start)
    if not given.toy:
        write_result(found, RESULT)
        sys.stdout.write(fusion_report.write())


if __name__ == "__main__":
    main()

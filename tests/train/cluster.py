"""Jobs that several processes of one machine do together, and what starts them.

A job is a function of this module, called as job(rank_info, folder, *arguments) in every process.
The processes are forks of one server that has imported everything, so that starting four costs no
time; they meet at a file.
"""

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
import traceback
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  what every process would import for itself otherwise
import numpy.random  # noqa: F401
import torch
import torch._dynamo
from PIL import Image

from lapilli import Chat
from lapilli.checkpoint.load import load_checkpoint
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.rank.mixlm import RankingExample, RankingTask
from lapilli.rank.next_item import NextItemTask
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.distributed import SINGLE_PROCESS, RankInfo, joined
from lapilli.train.launch import launch
from lapilli.train.recipe import LoraRecipe, ModelRecipe, OptimRecipe
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer import state
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import collate
from tests.model.conftest import build_tiny
from tests.train.conftest import new_recipe, new_regression

torch.set_num_threads(1)

BEAT_S = 0.3
WORDS = ("language_model.model.embed_tokens.", "language_model.lm_head.")
"""What next items do not reach: in pieces it has a gradient of zero, and its weights decay."""


def together(job, size, folder, *arguments, timeout_s=60):
    """What each of `size` processes answers: a value, an exception, or its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    lines, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        rank_info = RankInfo(rank, size, rank, f"file://{meeting}")
        process = context.Process(target=_run, args=(theirs, job, rank_info, folder, *arguments))
        process.start()
        theirs.close()
        lines.append(ours)
        processes.append(process)
    end = time.monotonic() + timeout_s
    return [_answer(*pair, end) for pair in zip(lines, processes, strict=True)]


def _answer(line, process, end):
    """What came through the line before the process ended; its exit code if nothing did."""
    try:
        if line.poll(max(end - time.monotonic(), 0.1)):
            return pickle.loads(line.recv())
    except EOFError:  # it died without a word
        process.join()
        return process.exitcode
    finally:
        process.join(5)
        process.kill()
    return TimeoutError("still running")


def _run(line, job, rank_info, folder, *arguments):
    try:
        answer = job(rank_info, folder, *arguments)
    except Exception as error:  # noqa: BLE001  told to whoever started us
        traceback.print_exc()
        answer = RuntimeError(f"{type(error).__name__}: {error}")
    line.send(pickle.dumps(answer))
    line.close()


class Killed:
    """A task that dies, or fails, in one process at one step."""

    def __init__(self, task, rank_info, step, how):
        self._task, self._seat, self._step, self._how = task, rank_info, step, how
        self.model, self.evaluate = task.model, task.evaluate

    def batch(self, step, micro):
        if step == self._step and micro == self._seat.rank:
            self._how()
        return self._task.batch(step, micro)

    def loss(self, batch):
        return self._task.loss(batch)


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("row 17 has no picture")


class Talk:
    """A tiny vision language model; every third micro-batch has no picture at all.

    `kind`: "full" (projector, tower, language model), "frozen" (tower at rest) or "lora".
    """

    def __init__(self, kind):
        torch.manual_seed(0)
        vlm = build_tiny()
        if kind == "lora":
            torch.manual_seed(1)
        self.recipe = dataclasses.replace(
            new_recipe(),
            lora=LoraRecipe(rank=2, alpha=4.0, dropout=0.1) if kind == "lora" else None,
            model=ModelRecipe(tune_tower=kind == "full"),
        )
        choose_trainable(vlm, self.recipe)
        self.model = TrainedModel(vlm)
        self.image = vlm.modality("image")
        self.parallel = SINGLE_PROCESS

    def batch(self, step, micro):
        generator = random.Random(1000 * step + micro)
        pictures = 0 if micro % 3 == 1 else 1 + generator.randrange(2)
        batch = collate([self._row(generator, pictures), self._row(generator, pictures // 2)])
        return batch, batch.num_valid

    def _row(self, generator, pictures):
        prepared = []
        for _ in range(pictures):
            size = generator.choice([(28, 56), (56, 28), (40, 30)])
            prepared.append(
                self.image.prepare(Image.new("RGB", size, generator.randrange(1 << 24)))
            )
        ids, mask, spans = [1], [False], []
        for item in prepared:
            length = self.image.num_tokens(item)
            spans.append(Span(0, len(ids), length))
            ids, mask = ids + [PLACEHOLDER] * length, mask + [False] * length
        words = [generator.randrange(2, 53) for _ in range(3 + generator.randrange(5))]
        return EncodedSample(
            EncodedPrompt(ids + words, mask + [True] * len(words), tuple(spans)), tuple(prepared)
        )

    def loss(self, batch):
        return self.model(batch)

    def evaluate(self):
        sums = {"total": 0.0, "count": 0.0}
        for number in self.parallel.micro_batches(4):
            batch, count = self.batch(99, number)
            sums["total"] += float(self.loss(batch).total)
            sums["count"] += count
        sums = self.parallel.sum_floats(sums)
        return {"eval_loss": sums["total"] / sums["count"]}


def run_talk(rank_info, folder, sharding, kind, run, optim=None, *, device="cpu"):
    """Weights after training a tiny vision language model."""
    with joined(
        rank_info, sharding=sharding, device=device, timeout_s=20.0, beat_s=BEAT_S
    ) as parallel:
        task = Talk(kind)
        if rank_info is not None and rank_info.rank:
            with torch.no_grad():  # the lead's weights count, whatever the others have drawn
                for parameter in task.model.parameters():
                    parameter.add_(parameter.requires_grad * torch.rand(()))
        parallel.wrap(task.model)
        task.parallel = parallel
        recipe = dataclasses.replace(task.recipe, run=new_recipe(**run).run)
        facts = {
            "run.seed": recipe.run.seed,
            "run.gradient_accumulation_steps": recipe.run.gradient_accumulation_steps,
        }
        task.fingerprint = lambda: facts
        if optim:
            recipe = dataclasses.replace(recipe, optim=OptimRecipe(**optim))
        train(task, recipe, folder / "run", parallel=parallel)
        return {name: _whole(p) for name, p in task.model.named_parameters()}


def run_recipe(rank_info, folder, recipe):
    """A recipe from its files to its results."""
    with joined(
        rank_info, sharding=recipe.run.sharding, device="cpu", timeout_s=20.0, beat_s=BEAT_S
    ) as parallel:
        launch(recipe, folder / "run", parallel=parallel)


def run_regression(rank_info, folder, sharding, run, dies=None):
    """Weights after training; `dies`: (rank, step, how) of a process that does not come through."""
    with joined(
        rank_info, sharding=sharding, device="cpu", timeout_s=20.0, beat_s=BEAT_S
    ) as parallel:
        task = new_regression()
        parallel.wrap(task.model)
        if dies and dies[0] == rank_info.rank:
            task = Killed(task, rank_info, *dies[1:])
        train(task, new_recipe(**run), folder / "run", parallel=parallel)
        return {name: _whole(p) for name, p in task.model.named_parameters()}


def run_killed_while_saving(rank_info, folder, run, step):
    """The lead dies when all pieces of this step are written, before they get their name."""
    finish = state._finish

    def die(staged, place, values):
        if values["step"] == step:
            kill_me()
        finish(staged, place, values)

    state._finish = die
    return run_regression(rank_info, folder, "fsdp", run)


def _whole(parameter):
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()


def losses(folder: Path):
    """The loss of every step that a run has logged, and of every evaluation."""
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r[name] for r in records for name in ("loss", "eval_loss") if name in r]


def run_ranking(rank_info, folder, sharding, checkpoint, kind):
    """Weights after training a ranker of vectors, or a reader of items, two steps."""
    with joined(
        rank_info, sharding=sharding, device="cpu", timeout_s=20.0, beat_s=BEAT_S
    ) as parallel:
        chat = Chat(load_checkpoint(checkpoint, device="cpu", dtype="float32"))
        recipe = dataclasses.replace(
            new_recipe(steps=2, gradient_accumulation_steps=4, batch_size=2, sharding=sharding),
            model=ModelRecipe(tune_encoder=("item",), freeze=() if kind == "mixlm" else WORDS),
        )
        choose_trainable(chat.model, recipe)
        texts = [f"a {size} {thing}" for size in ("small", "red") for thing in ("boat", "star")]
        if kind == "mixlm":
            examples = [RankingExample("boats", one, i / 4, 0.5) for i, one in enumerate(texts)]
            task = RankingTask(chat, examples, recipe.run, reads="mixed", held_out=examples)
        else:
            seen = [[0, 1, 2], [1, 3], [2, 0, 3, 1], [3, 2]]
            held_out = [] if sharding == "fsdp" else seen
            task = NextItemTask(chat, texts, seen, recipe.run, negatives=1, held_out=held_out)
        parallel.wrap(task.model)
        train(task, recipe, folder / "run", parallel=parallel)
        return {name: _whole(p) for name, p in task.model.named_parameters()}

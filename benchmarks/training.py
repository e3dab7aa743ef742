"""Steps of training beside transformers with peft, and packed beside padded rows.

    python -m benchmarks.training --shape S                      LoRA, float32 and bfloat16
    python -m benchmarks.training --shape S --layers 2           the same widths, less depth
    python -m benchmarks.training --task packing --shape S --layers 2

Each engine runs in a process of its own, in rounds (A B A B): read the ratios of medians. Both
learn from the same batch, in the same precision, with the same rank and optimizer; the losses of
their steps are printed beside the times, so that one sees that they do the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import IMAGE_ID, write_checkpoint
from benchmarks.figures import peak_bytes
from benchmarks.machine import ROOT, machine
from lapilli.geometry import ImageSize
from lapilli.modality.image.pixels import PreparedImage
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.trainer.task import TrainingBatch, collate, collate_packed, pack

PATCHES, SIDE = 576, 336
RANK, ALPHA, LR = 64, 16.0, 2e-4
TEXTS = (144, 96)
"""Tokens beside the picture of the samples of a batch."""
MIXTURE = (64, 900, 80, 120, 70, 90, 700, 60, 110, 75, 100, 85)
"""Positions of short and long samples; those above 600 have a picture."""


def draw_row(number: int, text: int, *, has_picture: bool = True) -> EncodedSample:
    """A sample of random ids; the last half of its text is supervised."""
    random = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 900, (text,), generator=random).tolist()
    mask = [i >= text // 2 for i in range(text)]
    if not has_picture:
        return EncodedSample(EncodedPrompt(ids, mask), (), str(number))
    at = 8
    ids[at:at] = [0] * PATCHES
    mask[at:at] = [False] * PATCHES
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=random)
    media = (PreparedImage(pixels, ImageSize(SIDE, SIDE)),)
    return EncodedSample(EncodedPrompt(ids, mask, (Span(0, at, PATCHES),)), media, str(number))


def batch_of_rows() -> TrainingBatch:
    """What both engines learn from."""
    return collate([draw_row(i, text) for i, text in enumerate(TEXTS)])


def lapilli_step(path: Path, precision: str) -> Callable[[TrainingBatch], float]:
    """One step of our trainer, as its loop takes it."""
    from lapilli.train.recipe import LoraRecipe, ModelRecipe, OptimRecipe, Recipe, RunRecipe
    from lapilli.train.stages import choose_trainable, load_start
    from lapilli.train.trainer.loop import Loss
    from lapilli.train.trainer.model import TrainedModel
    from lapilli.train.trainer.optim import build_optimizer
    from lapilli.train.trainer.step import take_step

    recipe = Recipe(
        stage="instruct",
        optim=OptimRecipe(lr=LR, schedule="constant"),
        run=RunRecipe(batch_size=len(TEXTS), precision=precision),
        model=ModelRecipe(checkpoint=str(path)),
        lora=LoraRecipe(rank=RANK, alpha=ALPHA, dropout=0.0),
    )
    loaded = load_start(recipe)
    choose_trainable(loaded.model, recipe)

    class Task:
        model = TrainedModel(loaded.model).train()

        def batch(self, step: int, micro: int) -> Any:
            raise NotImplementedError

        def loss(self, batch: TrainingBatch) -> Loss:
            return self.model(batch)

        def evaluate(self) -> dict[str, float]:
            return {}

    task = Task()
    optimizer = build_optimizer(task.model, recipe.optim)

    def step(batch: TrainingBatch) -> float:
        made = {0: (batch, batch.num_valid)}
        return take_step(task, optimizer, recipe, made, step=0).metrics["loss"]

    return step


def transformers_step(path: Path, precision: str) -> Callable[[TrainingBatch], float]:
    """A plain loop over transformers' model with peft's adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaForConditionalGeneration

    dtype = getattr(torch, precision)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype)
    layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=layers)
    peft = get_peft_model(model, config).train()
    for name, parameter in peft.named_parameters():
        if "multi_modal_projector" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    learned = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LR, weight_decay=0.0, betas=(0.9, 0.95), fused=True)

    def step(batch: TrainingBatch) -> float:
        ids = batch.input_ids.clone()
        for span in batch.spans:
            ids[span.row, span.start : span.start + span.length] = IMAGE_ID
        lengths = torch.tensor([sum(row) for row in batch.segments])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = peft(
                input_ids=ids,
                pixel_values=torch.cat([item.pixel_values for item in batch.media]).to(dtype),
                attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
                labels=torch.where(batch.loss_mask, ids, -100),
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


STEPS = {"lapilli": lapilli_step, "transformers": transformers_step}


def measure(name: str, path: Path, precision: str, steps: int) -> dict[str, Any]:
    """Seconds of every step after the first, all losses, and the most memory.

    Seconds of the CPU are those of all threads: a machine that does other things disturbs them
    least.
    """
    step, batch = STEPS[name](path, precision), batch_of_rows()
    losses, seconds, of_cpu = [], [], []
    for _ in range(steps + 1):
        started, begun = time.perf_counter(), time.process_time()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - started)
        of_cpu.append(time.process_time() - begun)
    return {
        "seconds": seconds[1:],
        "cpu_seconds": of_cpu[1:],
        "losses": losses,
        "peak_bytes": peak_bytes(),
    }


def measure_packing(path: Path, precision: str, steps: int) -> dict[str, Any]:
    """The same samples padded and packed, in turn: seconds of every step after the first."""
    rows = [
        draw_row(i, n - PATCHES if n > 600 else n, has_picture=n > 600)
        for i, n in enumerate(MIXTURE)
    ]
    bins = pack([len(row.prompt) for row in rows], 1024)
    batches = {
        "padded": collate(rows),
        "packed": collate_packed([[rows[i] for i in numbers] for numbers in bins]),
    }
    step = lapilli_step(path, precision)
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(steps + 1):
        for name, batch in batches.items():
            started = time.perf_counter()
            step(batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def child(wanted: argparse.Namespace, task: str, precision: str, path: Path) -> dict[str, Any]:
    """What a process of its own found."""
    command = [sys.executable, "-m", "benchmarks.training", "--child", task]
    command += ["--precision", precision, "--files", str(path)]
    command += ["--threads", str(wanted.threads), "--steps", str(wanted.steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{task} {precision} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(wanted: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Both engines in every precision, in rounds."""
    found: dict[str, Any] = {}
    for precision in wanted.precision:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in STEPS}
        for _ in range(wanted.rounds):
            for name in STEPS:
                runs[name].append(child(wanted, name, precision, path))
        medians, of_cpu = (
            {
                name: statistics.median(s for run in every for s in run[kind])
                for name, every in runs.items()
            }
            for kind in ("seconds", "cpu_seconds")
        )
        peaks = {name: max(run["peak_bytes"] for run in every) for name, every in runs.items()}
        found[precision] = {
            "seconds": medians,
            "times_as_fast": medians["transformers"] / medians["lapilli"],
            "times_as_little_cpu": of_cpu["transformers"] / of_cpu["lapilli"],
            "peak_bytes": peaks,
            "peak_share": peaks["lapilli"] / peaks["transformers"],
            "losses": {name: every[0]["losses"] for name, every in runs.items()},
        }
    return found


def compare_packing(wanted: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Packed beside padded rows in every precision."""
    found = {}
    for precision in wanted.precision:
        every = [child(wanted, "packing", precision, path) for _ in range(wanted.rounds)]
        medians = {
            name: statistics.median(s for run in every for s in run[name])
            for name in ("padded", "packed")
        }
        found[precision] = {
            "seconds": medians,
            "times_as_fast": medians["padded"] / medians["packed"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=("steps", "packing"), default="steps")
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, help="the figures as JSON")
    parser.add_argument("--child", choices=(*STEPS, "packing"), help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.child:
        torch.set_num_threads(wanted.threads)
        [precision] = wanted.precision
        if wanted.child == "packing":
            print(json.dumps(measure_packing(wanted.files, precision, wanted.steps)))
        else:
            print(json.dumps(measure(wanted.child, wanted.files, precision, wanted.steps)))
        return
    depth = "" if wanted.layers is None else f"-{wanted.layers}"
    path = wanted.folder / f"lapilli-training-{wanted.shape}{depth}"
    write_checkpoint(wanted.shape, path, layers=wanted.layers)
    found = (compare_packing if wanted.task == "packing" else compare)(wanted, path)
    work = {"task": wanted.task, "shape": wanted.shape, "layers": wanted.layers}
    text = json.dumps({**work, "machine": machine(), **found}, indent=1)
    print(text)  # first: a file that cannot be written must not lose a quarter of an hour
    if wanted.out:
        wanted.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

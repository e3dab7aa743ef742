"""A whole run with everything that draws or remembers: pictures, adapters, noise, averages, groups.

In a module of its own, so that a process that runs it imports nothing but the trainer.
"""

import json
import time
from pathlib import Path

from PIL import Image

from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.launch import TrainingTask, launch
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    NoiseRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SourceRecipe,
)

STEPS = 6


def write_samples(folder: Path) -> Path:
    """A file of samples with no, one and two pictures, of several lengths."""
    lines = []
    for i in range(14):
        names = [f"{i}_{n}.png" for n in range(i % 3)]
        for name in names:
            Image.new("RGB", (30 + i, 40), (15 * i, 90, 200)).save(folder / name)
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + "What about it? " * (i % 4 + 1)},
            {"from": "gpt", "value": f"It is {i}." * (i % 5 + 1)},
        ]
        lines.append(json.dumps({"id": f"s{i}", "image": names, "conversations": turns}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


def recipe_of(checkpoint: str, file: Path, *, alpha: float = 5.0, dropout: float = 0.1) -> Recipe:
    """Adapters with dropout, noise on all embeddings, averages, a held-out part, groups."""
    return Recipe(
        stage="instruct",
        optim=OptimRecipe(lr=1e-2, warmup_steps=2, weight_decay=0.1, ema=0.9, z_loss=1e-3),
        run=RunRecipe(
            batch_size=2, gradient_accumulation_steps=2,
            steps=STEPS, save_every=2, log_every=1, evaluate_every=3,
            keep_best=True, plot=False, threads=1, workers=1,
        ),
        model=ModelRecipe(checkpoint=checkpoint),
        data=DataRecipe(sources=(SourceRecipe(path=str(file)),), held_out=0.2, group="modality"),
        lora=LoraRecipe(rank=2, alpha=4.0, dropout=dropout),
        noise=NoiseRecipe(alpha=alpha),
    )  # fmt: skip


def run(folder: Path, checkpoint: str, file: Path, pause: float = 0.0) -> None:
    """Train from where the folder stands; `pause` seconds are spent on every batch."""
    draw = TrainingTask.batch

    def slowly(self, step, micro):
        time.sleep(pause)
        return draw(self, step, micro)

    TrainingTask.batch = slowly
    try:
        launch(recipe_of(checkpoint, file), folder, parallel=SINGLE_PROCESS)
    finally:
        TrainingTask.batch = draw

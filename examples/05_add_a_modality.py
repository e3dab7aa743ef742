"""Give a model a sense of your own: python 05_add_a_modality.py [FOLDER].

A sensor's series is cut into windows, each a token for pebble, whose language model rests.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import lapilli
from lapilli.config.modalities import register_kind
from lapilli.config.model import ModalityConfig, ProjectorConfig
from lapilli.modality.vector import PreparedVectors, VectorModality
from lapilli.train.build import add_modalities
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.launch import launch
from lapilli.train.recipe import DataRecipe, ModelRecipe, OptimRecipe, Recipe, RunRecipe
from lapilli.train.recipe import SourceRecipe as Source


@dataclass(frozen=True, kw_only=True)
class SeriesConfig(ModalityConfig):  # the settings under "lapilli_modalities" in config.json
    kind: ClassVar[str] = "series"
    window: int


class Series(VectorModality):  # every window becomes the vector of its spectrum
    def __init__(self, config: SeriesConfig, *, name: str, hidden_size: int) -> None:
        sizes = {"vision_size": config.window // 2 + 1, "hidden_size": hidden_size}
        super().__init__(ProjectorConfig(kind="mlp", depth=2, **sizes), name=name)
        self.window = config.window

    def prepare(self, raw: object) -> PreparedVectors:
        windows = torch.as_tensor(raw, dtype=torch.float32).unfold(0, self.window, self.window)
        return super().prepare(torch.fft.rfft(windows).abs().log1p())


def hum(speed: float, seed: int) -> list[float]:
    noise = 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return (torch.sin(torch.arange(64) * speed) + noise).tolist()


register_kind(SeriesConfig, Series)  # before a checkpoint that declares it is loaded
folder, ask = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp()), "Which lamp is on?"
add_modalities("pebble", folder / "fresh", {"sensor": {"kind": "series", "window": 16}})
lamps = [(hum(speed, i), lamp) for i in range(16) for speed, lamp in ((0.2, "green"), (1.5, "red"))]
rows = [{"sensor": series, "question": ask, "answer": lamp} for series, lamp in lamps]
(folder / "lamps.json").write_text(json.dumps(rows))
data = DataRecipe(sources=(Source(path=str(folder / "lamps.json")),), template="vicuna_v1")
run, optim = RunRecipe(steps=40, batch_size=8, plot=False), OptimRecipe(lr=1e-2)
model = ModelRecipe(checkpoint=str(folder / "fresh"))
recipe = Recipe(stage="align", optim=optim, run=run, model=model, data=data)
launch(recipe, folder / "run", parallel=SINGLE_PROCESS)
chat = lapilli.load(str(folder / "run" / "model"))
print(*(chat.ask(ask, sensor=hum(speed, 99), max_new_tokens=4) for speed in (0.25, 1.4)))

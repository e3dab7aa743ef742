"""transformers: `LlavaForConditionalGeneration.generate` with its own defaults.

It keeps nothing between two calls: a second question reads the picture again.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, StoppingCriteria, StoppingCriteriaList

from benchmarks.engines import Options
from benchmarks.figures import Question


class Clock(StoppingCriteria):
    """Notes when a token of all rows has been chosen; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Transformers:
    """The engine."""

    def __init__(self, files: Path, dtype: torch.dtype) -> None:
        self._model = LlavaForConditionalGeneration.from_pretrained(files, dtype=dtype).eval()
        config = self._model.config
        self._dtype, self._image_id = dtype, config.image_token_id
        self.side = config.vision_config.image_size
        self._positions = (self.side // config.vision_config.patch_size) ** 2
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
        self._mean, self._std = mean.view(3, 1, 1), std.view(3, 1, 1)

    @property
    def facts(self) -> dict[str, float]:
        """Bytes of weights that one decoded token reads."""
        model = self._model.model.language_model
        size = sum(p.nbytes for p in model.parameters()) - model.embed_tokens.weight.nbytes
        return {"weight_bytes": float(size + self._model.lm_head.weight.nbytes)}

    def _pixels(self, pictures: Sequence[bytes]) -> torch.Tensor:
        size = (self.side, self.side, 3)
        rows = [torch.frombuffer(bytearray(p), dtype=torch.uint8).view(size) for p in pictures]
        pixels = torch.stack(rows).permute(0, 3, 1, 2) / 255
        return ((pixels - self._mean) / self._std).to(self._dtype)

    @torch.inference_mode()
    def look(self, picture: bytes) -> None:
        """Tower and projector."""
        self._model.get_image_features(pixel_values=self._pixels([picture]))

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], new_tokens: int) -> list[list[float]]:
        """All rows have one length here, so no row is padded."""
        clock = Clock()
        started = time.perf_counter()
        pictures = [picture for question in questions for picture in question.pictures]
        ids = torch.tensor(
            [[1, *[self._image_id] * self._positions * len(q.pictures), *q.text] for q in questions]
        )
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **({"pixel_values": self._pixels(pictures)} if pictures else {}),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return [[moment - started for moment in clock.times]] * len(questions)


def load(options: Options) -> Transformers:
    """kind: a torch dtype."""
    torch.set_num_threads(options.threads)
    return Transformers(options.files / "float", getattr(torch, options.kind))

"""OpenVINO GenAI on the GGUF file of llama.cpp: the language model alone, no tower.

Its pipeline for pictures wants files that optimum-intel exports, which replaces torch by a CUDA
build and brings torchvision along; GGUF files it reads by itself, without pictures. So a picture is
576 token ids here, different ones for every picture, and the figures of the tower are missing: the
time to first token is that of 616 positions of text.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.engines import Options
from benchmarks.figures import PICTURE_POSITIONS, Question, words


class OpenVino:
    """Requests by hand, a step at a time: the only interface that tells when tokens come."""

    has_tower = False

    def __init__(self, options: Options) -> None:
        folder = options.files / "gguf"
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(folder / f"{options.kind}.gguf"),
            scheduler,
            "CPU",
            {"INFERENCE_NUM_THREADS": options.threads},
            {},
            {},
        )
        self.side = 336
        known = json.loads((folder / "complete.json").read_text())
        self.facts = {"weight_bytes": float(known[options.kind])}
        self._count = 0

    def look(self, picture: bytes) -> None:
        """Nothing: there is no tower."""

    def answer(self, questions: Sequence[Question], new_tokens: int) -> list[list[float]]:
        """All requests at the same time."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.apply_chat_template = False
        started = time.perf_counter()
        handles = [self._submit(question, config) for question in questions]
        times: list[list[float]] = [[] for _ in handles]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter() - started
            for moments, handle in zip(times, handles, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        moments += [now] * len(output.generated_ids)
        return times

    def _submit(self, question: Question, config: Any) -> Any:
        seen = [
            words(int.from_bytes(one[:8], "big"), PICTURE_POSITIONS, 900)
            for one in question.pictures
        ]
        ids = np.array([[1, *(token for one in seen for token in one), *question.text]])
        self._count += 1
        return self._pipeline.add_request(self._count, openvino.Tensor(ids), config)


def load(options: Options) -> OpenVino:
    """kind: of the GGUF file."""
    return OpenVino(options)

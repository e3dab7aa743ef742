"""Compiled layers beside plain ones: same loss, same gradients, one translation for all layers.

python -m tests.train.compiled BACKEND alone|packed; ends with an error where they differ.
"""

import sys

import torch
from PIL import Image
from torch._dynamo.utils import counters

from lapilli.modality.image.image import ImageModality
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.recipe import LoraRecipe
from lapilli.train.stages import choose_trainable, set_up_layers
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import TrainingBatch, collate_packed
from tests.train.test_stages import new_llava, staged

LAYERS = 12
"""Of the language model and of the tower: more than the 8 translations that torch makes of a
function."""

BATCHES = {
    "alone": (((18,), (24,)), ((15,), (27,))),
    "packed": (((9, 12), (7, 5, 9)), ((4, 4, 4), (20, 3))),
}
"""Of every batch the lengths of the texts that share a row, row after row."""

PROGRAMS = {"alone": 6, "packed": 5}
"""One for the tower's layers; the rest for the decoder's, which attention cuts into pieces."""


def batch_of(image: ImageModality, lengths: tuple[tuple[int, ...], ...]) -> TrainingBatch:
    """Texts that all count, a picture before each."""
    prepared = image.prepare(Image.new("RGB", (56, 28), (200, 30, 60)))
    count = image.num_tokens(prepared)

    def row(length: int) -> EncodedSample:
        ids = [*[0] * count, *range(1, length + 1)]
        mask = [*[False] * count, *[True] * length]
        return EncodedSample(EncodedPrompt(ids, mask, (Span(0, 0, count),)), (prepared,), "0")

    return collate_packed([[row(length) for length in bin] for bin in lengths])


def compare(kind: str) -> None:
    """Losses, gradients and the number of programs of two batches; packed ones are recomputed.

    Raises:
        AssertionError: another loss or gradient.
        SystemExit: more programs than there are kinds of layers.
    """
    vlm = new_llava(num_layers=LAYERS, tower_layers=LAYERS)
    choose_trainable(vlm, staged(lora=LoraRecipe(rank=2, dropout=0.0), tune_tower=True))
    batches = [batch_of(vlm.modality("image"), lengths) for lengths in BATCHES[kind]]
    results, programs = [], []
    recomputes = kind == "packed"
    for compiles in (False, True):
        set_up_layers(vlm, staged(compile=compiles, gradient_checkpointing=recomputes).run)
        model = TrainedModel(vlm, compiles=compiles).train()
        for batch in batches:
            model.zero_grad()
            loss = model(batch).total
            loss.backward()
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results.append((loss.detach(), found))
            programs.append(counters["stats"]["unique_graphs"])
    for plain, compiled in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)
    if programs != [0, 0, PROGRAMS[kind], PROGRAMS[kind]]:
        raise SystemExit(
            f"{LAYERS} layers, rows {kind}: {programs} programs after two plain and two compiled "
            f"batches, expected {PROGRAMS[kind]} from the first compiled one on"
        )


def main(backend: str, kind: str) -> None:
    torch.compiler.set_default_backend(backend)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compare(kind)


if __name__ == "__main__":
    main(*sys.argv[1:])

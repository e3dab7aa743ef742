"""Compiled layers with adapters beside plain ones; ends with an error where they differ."""

import torch
from torch._dynamo.utils import counters

from lapilli.config.model import DecoderConfig
from lapilli.lm.decoder import Decoder
from lapilli.lora import LoraConfig, inject
from lapilli.model.vlm import VisionLanguageModel
from lapilli.prompt.encode import EncodedPrompt
from lapilli.train.batch import collate_bins
from lapilli.train.data.rows import Row
from lapilli.train.model import TrainedModel
from lapilli.train.recipe import RunRecipe
from lapilli.train.stages import set_up_layers

CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, norm_eps=1e-5, rope_theta=1e4, max_positions=64,
)  # fmt: skip


LENGTHS = ((18,), (24,)), ((9, 12), (7, 5, 9))
"""Of the samples of a row, batch after batch; the second two rows are packed."""


def rows_of(lengths: tuple[int, ...]) -> list[Row]:
    return [Row(EncodedPrompt(list(range(1, n + 1)), [True] * n), (), "0") for n in lengths]


def main() -> None:
    for batches in LENGTHS:
        torch.manual_seed(0)
        vlm = VisionLanguageModel(Decoder(CONFIG))
        inject(vlm, LoraConfig(rank=2, alpha=4, targets=("language_model.model.*_proj",)))
        results, programs = [], []
        for compiles in (False, True):
            set_up_layers(vlm, RunRecipe(batch_size=1, compile=compiles))
            model = TrainedModel(vlm, compiles=compiles).train()
            for lengths in batches:
                model.zero_grad()
                loss = model(collate_bins([rows_of(lengths)])).total
                loss.backward()
                parameters = model.named_parameters()
                found = {n: p.grad.clone() for n, p in parameters if p.grad is not None}
                results.append((loss.detach(), found))
                programs.append(counters["stats"]["unique_graphs"])
        for plain, compiled in zip(results[:2], results[2:], strict=True):
            torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)
    if programs[-1] != programs[-2]:
        raise SystemExit("other lengths of the samples of a row made other programs")


if __name__ == "__main__":
    main()

"""Beam search that a stopping criterion may end, as transformers' generate has it.

Without criteria our own generation does the whole search; here every beam of every row is shown to
the criteria after each token.
"""

from collections.abc import Callable, Sequence

import torch

from lapilli.generate.beam import BeamRow, Hypothesis, search
from lapilli.generate.decode import DecodingBatch
from lapilli.generate.reference import GenerationContext
from lapilli.generate.sampler import logits_processors, new_generator
from lapilli.model.outputs import FusedBatch
from lapilli.shapes import Int, Tensor

Stops = Callable[[Int[Tensor, "beams N"]], bool]


def search_until(
    setting: GenerationContext, batch: FusedBatch, *, bos: int, pad: int, stops: Stops
) -> list[tuple[float, tuple[int, ...]]]:
    """Score and tokens of the best beam of every row.

    Args:
        setting: model, end tokens, width and limit.
        batch: prepared rows.
        bos: stands in front of the tokens that `stops` sees.
        pad: fills up shorter beams.
        stops: asked after every token with all beams; True ends the search, and what runs then
            counts as finished.

    Source: transformers 4.37 beam search, which asks once for all rows of the batch.
    """
    params = setting.params
    limit = params.max_new_tokens

    def ends(token_ids: Sequence[int]) -> bool:
        return len(token_ids) >= limit or token_ids[-1] in setting.stop_ids

    rows, length = batch.attention_mask.shape
    language_model = setting.language_model
    decoding = DecodingBatch(
        language_model, batch, language_model.new_cache(rows, length + limit), room=limit
    )
    logits = decoding.prefill()
    device = logits.device
    searched = [
        BeamRow(
            params.num_beams,
            params.length_penalty,
            ends,
            new_generator(params.seed, device) if params.temperature > 0 else None,
        )
        for _ in range(rows)
    ]
    processors = logits_processors(params, [[bos]] * rows, logits.shape[-1], device)
    steps = search(
        decoding,
        logits,
        searched,
        params,
        num_stop_ids=len(setting.stop_ids),
        processors=processors,
    )
    stopped = any(stops(_as_rows(searched, bos, pad)) for _ in steps)
    return [_best(row, params.length_penalty, stopped=stopped) for row in searched]


def _as_rows(searched: Sequence[BeamRow], bos: int, pad: int) -> Int[Tensor, "beams N"]:
    # All rows may be done, with nothing running any more.
    beams = [[bos, *beam.token_ids] for row in searched for beam in row.running] or [[bos]]
    width = max(map(len, beams))
    return torch.tensor([[*beam, *[pad] * (width - len(beam))] for beam in beams])


def _best(row: BeamRow, length_penalty: float, *, stopped: bool) -> tuple[float, tuple[int, ...]]:
    candidates: list[tuple[float, Hypothesis]] = list(row.finished)
    if stopped and not row.is_done:
        candidates += [(beam.score(length_penalty), beam) for beam in row.running]
    score, best = max(candidates or [row.best()], key=lambda item: item[0])
    return score, best.token_ids

"""From logits to tokens: pure functions of logits [B, V]; knows no model, no tokenizer and no loop.

The order is that of the transformers library: the repetition penalty first, then temperature,
top-k, top-p and min-p, each on what the one before it left over.
"""

from collections.abc import Sequence

import torch

from lapilli.config.generation import SamplingParams
from lapilli.generate.outputs import TokenLogprob
from lapilli.shapes import Bool, Float, Int, Tensor


def penalize_repetition(
    logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"], penalty: float
) -> Float[Tensor, "B V"]:
    """Logits with those of seen tokens made smaller: positive ones divided, negative multiplied."""
    punished = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, punished, logits)


def filter_top_k(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Only the k best tokens of every row (and those that tie with the last one); others -inf."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def filter_top_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """The smallest set of best tokens whose probabilities sum to at least p; others -inf."""
    ascending, order = logits.sort(dim=-1)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    dropped[:, -1] = False  # rounding must not drop the best token
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def filter_min_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Tokens at least p times as probable as the best one of their row; others -inf."""
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)


def warp(logits: Float[Tensor, "B V"], params: SamplingParams) -> Float[Tensor, "B V"]:
    """Logits after temperature, top-k, top-p and min-p, in this order; temperature above 0."""
    logits = logits / params.temperature
    if params.top_k is not None:
        logits = filter_top_k(logits, params.top_k)
    if params.top_p is not None and params.top_p < 1.0:
        logits = filter_top_p(logits, params.top_p)
    if params.min_p is not None:
        logits = filter_min_p(logits, params.min_p)
    return logits


def row_generators(rows: int, seed: int | None, device: torch.device) -> list[torch.Generator]:
    """One random source per row, so that what a row draws does not depend on its neighbours.

    With a seed every row starts from it: a row of a batch draws what it would draw alone.
    Without one the rows get different seeds from torch's global source (`torch.manual_seed`).
    """
    seeds = [seed] * rows if seed is not None else torch.randint(2**62, (rows,)).tolist()
    return [torch.Generator(device=device).manual_seed(row_seed) for row_seed in seeds]


def draw(logits: Float[Tensor, "B V"], generators: Sequence[torch.Generator]) -> Int[Tensor, " B"]:
    """One token per row, each with its row's own random source."""
    probabilities = logits.softmax(dim=-1)
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)


def choose(
    logits: Float[Tensor, "B V"],
    params: SamplingParams,
    generators: Sequence[torch.Generator],
    *,
    seen: Bool[Tensor, "B V"] | None = None,
) -> Int[Tensor, " B"]:
    """The next token of every row.

    Args:
        logits: raw logits in any floating type; the arithmetic is float32.
        params: greedy at temperature 0.
        generators: one per row, unused by greedy.
        seen: tokens that the repetition penalty applies to; None: no penalty.
    """
    logits = logits.float()
    if seen is not None:
        logits = penalize_repetition(logits, seen, params.repetition_penalty)
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    return draw(warp(logits, params), generators)


def report_logprobs(
    logits: Float[Tensor, "B V"], tokens: Sequence[int], alternatives: int
) -> list[TokenLogprob]:
    """The log-probability of each row's token, and of its `alternatives` best tokens."""
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(min(alternatives, logits.shape[-1]))
    return [
        TokenLogprob(
            token, float(row[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
        )
        for row, token, ids, values in zip(logprobs, tokens, best.indices, best.values, strict=True)
    ]

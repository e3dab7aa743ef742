"""Beam search: the most likely answer among several that are decoded at the same time.

With a temperature above 0 the continuations are drawn (beam sampling).
Knows hypotheses and scores; one row's search does not depend on the other rows of its batch.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from math import pow as power
from typing import TYPE_CHECKING

import torch

from lapilli.config.generation import SamplingParams
from lapilli.generate.output import TokenLogprob
from lapilli.generate.sampler import LogitsProcessors, report_logprobs, warp
from lapilli.shapes import Float, Int, Tensor

if TYPE_CHECKING:  # the loop starts the search
    from lapilli.generate.reference import DecodingBatch


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Answer of one beam and the sum of its log-probabilities.

    In beam sampling these are divided by the temperature, as in the transformers library.
    """

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    reports: tuple[TokenLogprob, ...] = ()

    def score(self, length_penalty: float) -> float:
        """Return the score by which finished hypotheses are ranked."""
        return self.logprob / power(len(self.token_ids), length_penalty)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One more token for a running hypothesis, given by its number."""

    beam: int
    token_id: int
    logprob: float


@dataclass(slots=True)
class BeamRow:
    """Beam search of one row.

    Args:
        width: number of running hypotheses, and of finished ones that are kept.
        length_penalty: see SamplingParams.
        ends: returns whether an answer of these tokens is finished.
        generator: for beam sampling; None: the best continuations are taken.
    """

    width: int
    length_penalty: float
    ends: Callable[[Sequence[int]], bool]
    generator: torch.Generator | None = None
    running: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])
    finished: list[tuple[float, Hypothesis]] = field(default_factory=list)

    def advance(
        self,
        candidates: Sequence[Candidate],
        report: Callable[[int, int], tuple[TokenLogprob, ...]],
    ) -> list[int]:
        """Continue with the best candidates, best first; return the number of each one's parent.

        Only the first `width` candidates may finish; the others are there so that enough
        hypotheses go on.
        """
        running: list[tuple[int, Hypothesis]] = []
        for rank, candidate in enumerate(candidates):
            parent = self.running[candidate.beam]
            token_ids = (*parent.token_ids, candidate.token_id)
            over = self.ends(token_ids)
            if (over and rank >= self.width) or (not over and len(running) == self.width):
                continue
            reports = parent.reports + report(candidate.beam, candidate.token_id)
            grown = Hypothesis(token_ids, candidate.logprob, reports)
            if over:
                self.finished.append((grown.score(self.length_penalty), grown))
            else:
                running.append((candidate.beam, grown))
        self.finished.sort(key=lambda item: item[0], reverse=True)
        del self.finished[self.width :]
        self.running = [hypothesis for _, hypothesis in running]
        return [beam for beam, _ in running]

    @property
    def is_done(self) -> bool:
        """True when no running hypothesis is expected to beat the worst finished one.

        Source: `early_stopping=False` of the transformers library, which scores the best running
        hypothesis at its present length.
        """
        if not self.running:
            return True
        if len(self.finished) < self.width:
            return False
        return self.running[0].score(self.length_penalty) <= self.finished[-1][0]

    def best(self) -> tuple[float, Hypothesis]:
        """Return the best finished hypothesis, or the best running one if none has finished."""
        if self.finished:
            return self.finished[0]
        hypothesis = self.running[0]
        score = hypothesis.score(self.length_penalty) if hypothesis.token_ids else 0.0
        return score, hypothesis


def search(
    decoding: "DecodingBatch",
    logits: Float[Tensor, "B V"],
    rows: Sequence[BeamRow],
    params: SamplingParams,
    *,
    num_stop_ids: int,
    processors: LogitsProcessors | None = None,
) -> Generator[None, None, None]:
    """Search for all rows until each is done, one token per turn of the iterator.

    Rows that are done leave the batch. Bias and penalties are applied after the softmax, to
    log-probabilities, as in the beam search of the transformers library.

    Args:
        decoding: the rows, after their prefill.
        logits: after the prompts.
        rows: one search per row of the batch.
        params: number of beams, filters, reports; with a temperature above 0 every row needs a
            generator.
        num_stop_ids: number of tokens that end an answer.
        processors: bias and penalties of the rows, if there are any.
    """
    active = list(rows)
    # Enough that `num_beams` hypotheses can go on even if every end token is among the best.
    wanted = max(2, 1 + num_stop_ids) * params.num_beams
    while True:
        scores, candidates = best_candidates(logits, active, wanted, params, processors)
        width = logits.shape[0] // len(active)
        parents = [
            row.advance(found, reporter(scores, at * width, params.logprobs))
            for at, (row, found) in enumerate(zip(active, candidates, strict=True))
        ]
        yield
        going = [not row.is_done for row in active]
        order = [at * width + beam for at, row in enumerate(parents) if going[at] for beam in row]
        active = list(compress(active, going))
        if not active:
            return
        tokens = torch.tensor(
            [hypothesis.token_ids[-1] for row in active for hypothesis in row.running],
            device=logits.device,
        )
        if processors is not None:
            processors.take(order)
            processors.push(tokens)
        decoding.take(order)
        logits = decoding.advance(tokens)


def best_candidates(
    logits: Float[Tensor, "beams V"],
    rows: Sequence[BeamRow],
    wanted: int,
    params: SamplingParams,
    processors: LogitsProcessors | None,
) -> tuple[Float[Tensor, "beams V"], list[list[Candidate]]]:
    """Return the log-probabilities of all beams, and the candidates of every row."""
    vocabulary = logits.shape[-1]
    logprobs = logits.float().log_softmax(dim=-1)
    scores = logprobs if processors is None else processors(logprobs)
    generators = [row.generator for row in rows if row.generator is not None]
    if generators:
        scores = warp_keeping(scores, wanted, params)
    so_far = logprobs.new_tensor([[h.logprob] for row in rows for h in row.running])
    scores = (scores + so_far).view(len(rows), -1)
    wanted = min(wanted, scores.shape[-1])
    values, indices = (
        draw_several(scores, wanted, generators) if generators else scores.topk(wanted)
    )
    found = [
        [
            Candidate(place // vocabulary, place % vocabulary, value)
            for place, value in zip(*row, strict=True)
        ]
        for row in zip(indices.tolist(), values.tolist(), strict=True)
    ]
    return logprobs, found


def warp_keeping(
    logprobs: Float[Tensor, "beams V"], least: int, params: SamplingParams
) -> Float[Tensor, "beams V"]:
    """Apply temperature and filters, but keep at least the `least` best tokens of every beam."""
    kept = logprobs.topk(min(least, logprobs.shape[-1])).indices
    tempered = logprobs / params.temperature
    return warp(logprobs, params).scatter(-1, kept, tempered.gather(-1, kept))


def draw_several(
    scores: Float[Tensor, "B N"], number: int, generators: Sequence[torch.Generator]
) -> tuple[Float[Tensor, "B n"], Int[Tensor, "B n"]]:
    """Draw several places per row without replacement by the softmax of its scores, best first.

    Source: the Gumbel top-k trick (Kool et al. 2019, arXiv 1903.06059), which works too where most
    probabilities round to 0.
    """
    noise = [
        -torch.empty_like(row).exponential_(generator=generator).log()
        for row, generator in zip(scores, generators, strict=True)
    ]
    drawn = (scores + torch.stack(noise)).topk(number).indices
    values, order = scores.gather(-1, drawn).sort(dim=-1, descending=True, stable=True)
    return values, drawn.gather(-1, order)


def reporter(
    logprobs: Float[Tensor, "beams V"], first_beam: int, alternatives: int | None
) -> Callable[[int, int], tuple[TokenLogprob, ...]]:
    """Return a function that reports a token of a beam; () unless reports were asked for."""

    def report(beam: int, token_id: int) -> tuple[TokenLogprob, ...]:
        if alternatives is None:
            return ()
        at = first_beam + beam
        return tuple(report_logprobs(logprobs[at : at + 1], [token_id], alternatives))

    return report

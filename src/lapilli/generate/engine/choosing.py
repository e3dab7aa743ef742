"""The next token of every sequence in a step, each by its own rules and its own random source."""

from collections.abc import Sequence as Items

import torch

from lapilli.generate.engine.sequence import Sequence
from lapilli.generate.outputs import TokenLogprob
from lapilli.generate.sample import choose, report_logprobs
from lapilli.shapes import Float, Tensor


def choose_tokens(
    logits: Float[Tensor, "R V"], sequences: Items[Sequence]
) -> list[tuple[int, TokenLogprob | None]]:
    """One token per sequence and what is to be reported about it.

    The greedy ones are read from the device together.
    """
    best = logits.argmax(dim=-1).tolist() if any(map(is_plain, sequences)) else []
    return [
        (best[at], None) if is_plain(sequence) else choose_one(logits[at : at + 1], sequence)
        for at, sequence in enumerate(sequences)
    ]


def is_plain(sequence: Sequence) -> bool:
    """Whether the token is the best one and nothing is said about it."""
    params = sequence.params
    return params.is_greedy and sequence.seen is None and params.logprobs is None


def choose_one(logits: Float[Tensor, "1 V"], sequence: Sequence) -> tuple[int, TokenLogprob | None]:
    """The token of one sequence."""
    params = sequence.params
    generators = [] if sequence.generator is None else [sequence.generator]
    token_id = int(choose(logits, params, generators, seen=sequence.seen).item())
    if params.logprobs is None:
        return token_id, None
    [report] = report_logprobs(logits, [token_id], params.logprobs)
    return token_id, report


def prepare_choosing(sequence: Sequence, vocabulary: int, device: torch.device) -> None:
    """The random source and the tokens seen, for sequences that need them."""
    params = sequence.params
    if params.temperature > 0:
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(2**62, (1,)).item())
        sequence.generator = torch.Generator(device=device).manual_seed(seed)
    if params.repetition_penalty != 1:
        seen = torch.zeros(1, vocabulary, dtype=torch.bool, device=device)
        seen[0, list(sequence.ticket.request.seen_ids or ())] = True
        sequence.seen = seen

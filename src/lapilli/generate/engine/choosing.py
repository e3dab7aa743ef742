"""The next token of every sequence in a step, each by its own rules and its own random source."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from lapilli.generate.engine.sequence import Sequence
from lapilli.generate.outputs import TokenLogprob
from lapilli.generate.sampler import choose, report_logprobs
from lapilli.shapes import Float, Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """What one sequence does in a step: its next `count` tokens are read, then its guesses."""

    sequence: Sequence
    count: int
    draft: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Positions of this step."""
        return self.count + len(self.draft)

    @property
    def ends(self) -> bool:
        """Whether its last token is read, so that the next one can be chosen."""
        return self.count == self.sequence.unread

    @property
    def tokens(self) -> list[int]:
        """What is read."""
        row = self.sequence
        return [*row.tokens[row.length : row.length + self.count], *self.draft]


def extend(logits: Float[Tensor, "R V"], shares: Items[Share]) -> dict[Sequence, Exception]:
    """New tokens for the sequences of `shares`; returns those that have none, and why.

    Each token is drawn as if nothing had been guessed; the guess says only whether the logits for
    the token after it are there already. So the answer is the same as without guesses, seed for
    seed: drawing a token and comparing it with the guess accepts the guess with its probability,
    and a token that differs from it follows the distribution of the others.

    Args:
        logits: of each share one row, and one more per guess.
        shares: those that end.
    """
    best = logits.argmax(dim=-1).tolist() if any(is_plain(s.sequence) for s in shares) else []
    failures: dict[Sequence, Exception] = {}
    start = 0
    for share in shares:
        try:
            _extend_one(logits, best, share, start)
        except Exception as error:  # noqa: BLE001  logits without numbers, a tokenizer: one request's own
            failures[share.sequence] = error
        start += 1 + len(share.draft)
    return failures


def _extend_one(logits: Float[Tensor, "R V"], best: Items[int], share: Share, start: int) -> None:
    """The tokens of one sequence, whose logits begin at row `start`."""
    sequence = share.sequence
    sequence.is_open = True  # until all of it fits together again, see Stepper._deliver
    for at, guess in enumerate((*share.draft, None), start):
        if is_plain(sequence):
            token_id, report = best[at], None
        else:
            token_id, report = choose_one(logits[at : at + 1], sequence)
        sequence.push(token_id, report)
        if token_id != guess or sequence.answer.is_finished:
            break


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

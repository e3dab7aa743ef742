"""One request while the engine works on it: its tokens, its blocks, its answer."""

from collections.abc import Sequence as Items
from typing import Any

import torch

from lapilli.config.generation import SamplingParams
from lapilli.generate.engine.block_pool import BlockTable, media_keys
from lapilli.generate.engine.request import Ticket
from lapilli.generate.output import Answer
from lapilli.generate.outputs import TokenLogprob
from lapilli.generate.speculative import Drafting, IsWorth
from lapilli.nn.paged import MOST_TOGETHER
from lapilli.prompt.encode import EncodedPrompt
from lapilli.shapes import Bool, Float, Tensor

MOST_GUESSES = MOST_TOGETHER - 1
"""In one pass, of one sequence: more positions would take a slower way through the model."""


class Sequence:
    """Prompt and answer of one request.

    Args:
        ticket: where pieces go.
        answer: the empty answer.
        digests: content of every medium of the prompt.
        order: when it was submitted.
    """

    def __init__(
        self, ticket: Ticket, answer: Answer, *, digests: Items[bytes], order: int
    ) -> None:
        self.ticket = ticket
        self.answer = answer
        self.digests = tuple(digests)
        self.rank = (-ticket.request.priority, order)
        self.prompt_length = len(self.prompt.input_ids)
        self.tokens = list(self.prompt.input_ids)
        self.keys = position_keys(self.prompt, digests)
        self.features: list[Float[Tensor, "n D"] | None] = [None] * len(self.prompt.spans)
        self.chain: tuple[bytes, ...] = ()
        """Digests of the beginnings of the prompt, see BlockPool.chain."""
        self.table: BlockTable | None = None
        self.length = 0
        """Positions whose keys and values are known."""
        self.is_stale = False
        """The model changed while it was read: nobody else may find its keys and values."""
        self.is_ready = False
        """What it draws and guesses with is there."""
        self.is_open = False
        """It is being changed: where an interrupt leaves it so, it cannot be trusted."""
        self.drafting: Drafting | None = None
        self.generator: torch.Generator | None = None
        self.seen: Bool[Tensor, "1 V"] | None = None

    @property
    def prompt(self) -> EncodedPrompt:
        """Ids and spans."""
        return self.ticket.request.prompt

    @property
    def media(self) -> tuple[Any, ...]:
        """What goes over the spans."""
        return self.ticket.request.media

    @property
    def params(self) -> SamplingParams:
        """How tokens are chosen."""
        return self.ticket.request.params

    @property
    def unread(self) -> int:
        """Tokens that the model has not seen yet; 1 while the answer grows."""
        return len(self.tokens) - self.length

    @property
    def is_growing(self) -> bool:
        """Whether the prompt is read and the answer has begun."""
        return len(self.tokens) > self.prompt_length

    @property
    def positions_needed(self) -> int:
        """Positions of prompt and longest answer; its last token is never read."""
        return self.prompt_length + self.answer.limit - 1

    @property
    def blocks(self) -> list[int]:
        """Where keys and values are; none before it begins."""
        return [] if self.table is None else self.table.blocks

    def begin(self, table: BlockTable) -> None:
        """Blocks are reserved, their beginning is known."""
        self.table = table
        self.length = table.length

    def draft(self, is_worth: IsWorth) -> list[int]:
        """Guesses of the next tokens, none beyond the last that the answer may have."""
        most = min(MOST_GUESSES, self.answer.limit - len(self.answer.token_ids) - 1)
        if self.drafting is None or most < 1:
            return []
        return self.drafting.propose(self.keys, most, is_worth)

    def push(self, token_id: int, report: TokenLogprob | None = None) -> None:
        """One more token of the answer."""
        self.tokens.append(token_id)
        self.keys.append(token_id)
        if self.seen is not None:
            self.seen[0, token_id] = True
        self.answer.push(token_id, report)


def position_keys(prompt: EncodedPrompt, digests: Items[bytes]) -> list[int]:
    """What stands at every position: a token id, or a place in a medium."""
    keys = list(prompt.input_ids)
    for span, digest in zip(prompt.spans, digests, strict=True):
        keys[span.start : span.start + span.length] = media_keys(digest, span.length)
    return keys

"""Continuous-batching scheduler: who begins, and who computes how many tokens in a step.

    enter -> inbox --take_in--> waiting --admit: blocks for prompt and answer--> running --remove-->

    schedule: decoding sequences one token and their drafts each | a chunk of the prompts

`enter` and the counts may be asked by any thread, everything else by the one that holds the model.
"""

import hashlib
import logging
import threading
from bisect import insort
from collections import deque
from collections.abc import Iterator

import torch

from lapilli.config.generation import EngineOptions
from lapilli.errors import GenerationError, LapilliError
from lapilli.generate.engine.block_pool import BlockPool
from lapilli.generate.engine.model_runner import MediaEncoder
from lapilli.generate.engine.sequence import ScheduledSequence, Sequence
from lapilli.generate.sampler import SamplingState
from lapilli.generate.speculative import (
    NewProposer,
    Proposer,
    SpeculationBudget,
    SpeculationController,
)

LOG = logging.getLogger(__name__)


class Scheduler:
    """The unfinished sequences of an engine.

    Args:
        pool: blocks of keys and values.
        encoder: gives features of media when their positions are scheduled.
        options: limits.
        vocab_size: of the model.
        device: of its logits.
        new_proposer: makes what proposes draft tokens.

    Attributes:
        waiting: sequences that no block is reserved for, in their order.
        running: those that have blocks.
        speculation: says which draft tokens make tokens come faster.
    """

    def __init__(
        self,
        pool: BlockPool,
        encoder: MediaEncoder,
        options: EngineOptions,
        *,
        vocab_size: int,
        device: torch.device,
        new_proposer: NewProposer,
    ) -> None:
        self._pool = pool
        self._encoder = encoder
        self._options = options
        self._vocab_size = vocab_size
        self._device = device
        self._new_proposer = new_proposer
        self._lock = threading.Lock()
        self._inbox: deque[Sequence] = deque()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.speculation = SpeculationController(is_timed=options.speculate == "auto")

    @property
    def has_work(self) -> bool:
        """True while there is any unfinished sequence."""
        return bool(self._inbox or self.waiting or self.running)

    @property
    def num_waiting(self) -> int:
        """Number of sequences that no block is reserved for yet."""
        return len(self._inbox) + len(self.waiting)

    def __iter__(self) -> Iterator[Sequence]:
        """Iterate over a copy of all sequences: they may be removed meanwhile."""
        return iter([*self.running, *self.waiting])

    def enter(self, sequence: Sequence) -> bool:
        """Add a sequence; False where as many wait already as may.

        Raises:
            RequestError: its handle was submitted before.
        """
        with self._lock:
            if self.num_waiting >= self._options.max_waiting:
                return False
            sequence.handle.claim()
            self._inbox.append(sequence)
            return True

    def take_in(self) -> None:
        """Let those wait in their order that came since the last call."""
        while self._inbox:
            # In this order: an interrupt may leave it in both places, never in none.
            insort(self.waiting, self._inbox[0], key=lambda sequence: sequence.rank)
            self._inbox.popleft()

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that is over."""
        for places in (self.waiting, self.running):
            if sequence in places:
                places.remove(sequence)

    def settle(self) -> None:
        """Give every sequence one place again, after a change that was broken off."""
        self.take_in()
        self.running = [row for row in _once(self.running) if row.table is not None or row.is_open]
        self.waiting = [one for one in _once(self.waiting) if one not in self.running]
        for one in self.waiting:
            one.table, one.length = None, 0

    def admit(self, *, weights_version: int) -> None:
        """Reserve blocks for those who wait, and make ready what they sample and draft with.

        The first one that does not fit ends it, so that small requests do not starve a large one.
        One whose next block is being computed for another waits for that, and takes nobody's turn.

        Args:
            weights_version: what was kept of another one is not found.
        """
        root = root_digest(weights_version)
        for sequence in list(self.waiting):
            if len(self.running) >= self._options.max_rows:
                break
            if not sequence.chain or sequence.chain[0] != root:
                sequence.chain = self._pool.chain(root, sequence.keys)
            prefix = self._pool.find(sequence.chain, sequence.keys)
            if is_being_computed(sequence, len(prefix.blocks), self.running):
                continue
            table = self._pool.reserve(prefix, sequence.num_needed_positions)
            if table is None:
                break
            sequence.begin(table)
            self.running.append(sequence)
            self.waiting.remove(sequence)
            self._pool.stats.tokens += sequence.prompt_length
            self._pool.stats.cached_tokens += table.length
        for row in self.running:
            if row.sampling is None:
                row.proposer = self._start_proposer()
                seen = row.handle.request.seen_ids or ()
                row.sampling = SamplingState(
                    row.handle.request.params, self._vocab_size, self._device, prompt_ids=seen
                )

    def _start_proposer(self) -> Proposer | None:
        if self._options.speculate == "off":
            return None
        try:
            return self._new_proposer()
        except Exception:  # foreign code; an answer needs no drafts
            LOG.exception("a proposer failed; an answer goes on without drafts")
            return None

    def schedule(
        self, *, weights_version: int
    ) -> tuple[list[ScheduledSequence], dict[Sequence, LapilliError]]:
        """Return what the running sequences compute in this step, and those that fail, and why.

        Decoding sequences come first, then prompts by rank. Media are encoded here, when their
        positions are scheduled: at most one in a step in which somebody waits for a token.
        """
        rows = [row for row in self.running if row.is_decoding]
        budget = self.speculation.budget(len(rows))
        decoding = [ScheduledSequence(row, 1, self._draft(row, budget)) for row in rows]
        prompts = sorted((r for r in self.running if not r.is_decoding), key=lambda row: row.rank)
        left = self._options.chunk if decoding else self._options.max_step
        encodes = self._encoder.num_encoded + (1 if decoding else len(prompts))
        prefill: list[ScheduledSequence] = []
        failed: dict[Sequence, LapilliError] = {}
        for row in prompts:
            # A prompt that keeps nobody waiting is computed at once, attention is faster then.
            most = left if decoding or prefill else 4 * left
            try:
                count = self._encoder.encode(
                    row,
                    min(row.num_uncomputed_tokens, most),
                    weights_version=weights_version,
                    most=encodes - self._encoder.num_encoded,
                )
            except LapilliError as error:
                failed[row] = error
                continue
            except Exception as error:  # noqa: BLE001  a modality may be anybody's, and meet anything
                failed[row] = GenerationError(f"the model failed to look at a medium: {error}")
                continue
            if count:
                prefill.append(ScheduledSequence(row, count))
                left -= count
            if left <= 0:
                break
        return sorted([*decoding, *prefill], key=lambda one: one.length), failed

    def _draft(self, row: Sequence, budget: SpeculationBudget) -> tuple[int, ...]:
        """Return draft tokens; a proposer that fails, or proposes no tokens, is asked no more."""
        try:
            draft = tuple(row.propose(budget.accepts))
            if all(0 <= token_id < self._vocab_size for token_id in draft):
                return draft
            LOG.warning("a proposer returned %s, which are no token ids", draft)
        except Exception:  # foreign code; an answer needs no drafts
            LOG.exception("a proposer failed; this answer goes on without drafts")
        row.proposer = None
        return ()


def is_being_computed(sequence: Sequence, known: int, running: list[Sequence]) -> bool:
    """Return whether a row is about to compute the block that `sequence` needs after `known`."""
    if known + 1 >= len(sequence.chain):
        return False
    wanted = sequence.chain[known + 1]
    return any(
        known + 1 < len(row.chain) and row.chain[known + 1] == wanted
        for row in running
        if not row.is_decoding
    )


def root_digest(weights_version: int) -> bytes:
    """Return what the chains of sequences begin with that these weights computed."""
    return hashlib.sha256(f"{weights_version}".encode()).digest()


def _once(sequences: list[Sequence]) -> list[Sequence]:
    return list(dict.fromkeys(sequences))

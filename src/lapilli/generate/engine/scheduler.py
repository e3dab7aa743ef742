"""Continuous-batching scheduler: which sequences run, and the tokens each computes.

    enter -> inbox --take_in--> waiting --admit: blocks for prompt and answer--> running --remove-->

    schedule: decoding sequences one token and their drafts each | a chunk of the prompts

Any thread may call `enter` and read the counts; all else is for the one that holds the model.
"""

import hashlib
import logging
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Iterator

from lapilli.config.generation import EngineOptions
from lapilli.errors import LapilliError, ModelFailedError
from lapilli.generate.engine.block_pool import BlockPool
from lapilli.generate.engine.model_runner import MediaEncoder
from lapilli.generate.engine.sequence import ScheduledSequence, Sequence
from lapilli.generate.grammar import GrammarProposer
from lapilli.generate.sampler import SamplingState
from lapilli.generate.speculative import (
    NewProposer,
    Proposer,
    SpeculationBudget,
    SpeculationController,
)

LOG = logging.getLogger(__name__)


class Scheduler:
    """Unfinished sequences of an engine.

    Attributes:
        waiting: sequences without reserved blocks, in their order.
        running: sequences with blocks.
        speculation: decides how many draft tokens are worth their time.
    """

    def __init__(
        self,
        pool: BlockPool,
        encoder: MediaEncoder,
        options: EngineOptions,
        *,
        vocab_size: int,
        new_proposer: NewProposer,
    ) -> None:
        self._pool = pool
        self._encoder = encoder
        self._options = options
        self._vocab_size = vocab_size
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
        """Number of sequences without reserved blocks."""
        return len(self._inbox) + len(self.waiting)

    def __iter__(self) -> Iterator[Sequence]:
        """Iterate over a copy of all sequences: they may be removed meanwhile."""
        return iter([*self.running, *self.waiting])

    def enter(self, sequence: Sequence) -> bool:
        """Add a sequence; return False when the queue is full.

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
        """Sort new sequences into the queue by their rank."""
        while self._inbox:
            # In this order an interrupt may leave it in both places, never in none.
            insort(self.waiting, self._inbox[0], key=lambda sequence: sequence.rank)
            self._inbox.popleft()

    def remove(self, sequence: Sequence) -> None:
        """Remove a finished sequence."""
        for places in (self.waiting, self.running):
            if sequence in places:
                places.remove(sequence)

    def settle(self) -> None:
        """Give every sequence exactly one place again after an interrupted change."""
        self.take_in()
        running, waiting = dict.fromkeys(self.running), dict.fromkeys(self.waiting)
        self.running = [row for row in running if row.table is not None or row.is_open]
        self.waiting = [one for one in waiting if one not in self.running]
        for one in self.waiting:
            one.table, one.length = None, 0

    def admit(self, *, weights_version: int) -> None:
        """Reserve blocks for waiting sequences in their order, and create their sampling states.

        The first one that does not fit ends the admission, so that small requests do not starve a
        large one. One whose next block is being computed by another sequence is passed over, to
        share that block later. Nothing is shared across weights versions.
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
            sequence.table, sequence.length = table, table.length
            sequence.handle.cached_tokens = table.length
            sequence.handle.admitted_at = time.monotonic()
            self.running.append(sequence)
            self.waiting.remove(sequence)
            self._pool.stats.tokens += sequence.prompt_length
            self._pool.stats.cached_tokens += table.length
        for row in self.running:
            if row.sampling is None:
                self._start(row)

    def _start(self, row: Sequence) -> None:
        """Create the sampling state and the proposer of a sequence."""
        request, matcher = row.handle.request, None
        proposer = self._start_proposer()
        if row.grammar is not None:
            matcher = row.grammar.matcher(row.answer.stop_ids)
            proposer = proposer and GrammarProposer(matcher, proposer)
        row.proposer = proposer
        row.sampling = SamplingState(
            request.params,
            self._vocab_size,
            self._pool.store.device,
            prompt_ids=request.seen_ids or (),
            matcher=matcher,
        )

    def _start_proposer(self) -> Proposer | None:
        if self._options.speculate == "off":
            return None
        try:
            return self._new_proposer()
        except Exception:  # a proposer may be any code; an answer needs no drafts
            LOG.exception("a proposer failed; an answer goes on without drafts")
            return None

    def schedule(
        self, *, weights_version: int
    ) -> tuple[list[ScheduledSequence], dict[Sequence, LapilliError]]:
        """Return the tokens to compute in this step, and the errors of sequences that fail.

        Decoding sequences come first, then prompts by rank. Media are encoded when their positions
        are scheduled: at most one in a step with decoding sequences.
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
            # A prompt alone is computed in larger chunks: attention is faster then.
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
            except Exception as error:  # noqa: BLE001  a modality may be any code
                failed[row] = ModelFailedError(f"the model failed to look at a medium: {error}")
                continue
            if count:
                prefill.append(ScheduledSequence(row, count))
                left -= count
            if left <= 0:
                break
        return sorted([*decoding, *prefill], key=lambda one: one.length), failed

    def _draft(self, row: Sequence, budget: SpeculationBudget) -> tuple[int, ...]:
        """Return draft tokens; a proposer that fails, or returns other things, is dropped."""
        try:
            draft = tuple(row.propose(budget.accepts))
            if all(0 <= token_id < self._vocab_size for token_id in draft):
                return draft
            LOG.warning("a proposer returned %s, which are no token ids", draft)
        except Exception:  # a proposer may be any code; an answer needs no drafts
            LOG.exception("a proposer failed; this answer goes on without drafts")
        row.proposer = None
        return ()


def is_being_computed(sequence: Sequence, known: int, running: list[Sequence]) -> bool:
    """Return whether a running prompt computes the block that `sequence` needs after `known`."""
    if known + 1 >= len(sequence.chain):
        return False
    wanted = sequence.chain[known + 1]
    return any(
        known + 1 < len(row.chain) and row.chain[known + 1] == wanted
        for row in running
        if not row.is_decoding
    )


def root_digest(weights_version: int) -> bytes:
    """Return the digest that the chains of all sequences of a weights version begin with."""
    return hashlib.sha256(f"{weights_version}".encode()).digest()

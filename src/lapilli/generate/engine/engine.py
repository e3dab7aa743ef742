"""The engine: requests join and leave between steps, a step is one pass for all of them.

    submit -> waiting --admit: blocks for prompt and longest answer--> rows --step--> answers

Knows prompts as ids and spans, media as things that a modality embeds; must not know templates,
files or conversations. What a step does is in stepper.py; here is who may ask for what, and when.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from lapilli.errors import GenerationError, LapilliError, UnsupportedModelError
from lapilli.generate.cache.features import FeatureCache
from lapilli.generate.detokenizer import TokenBytes
from lapilli.generate.engine.arrival import Arrivals, readable_context
from lapilli.generate.engine.block_pool import PrefixStats
from lapilli.generate.engine.completed import answer_as_completed
from lapilli.generate.engine.core import Stepper
from lapilli.generate.engine.feature_cache import media_digest
from lapilli.generate.engine.memory import new_pool
from lapilli.generate.engine.options import EngineOptions
from lapilli.generate.engine.prefix_file import (
    model_digest,
    place_prefix,
    read_prefix,
    write_prefix,
)
from lapilli.generate.engine.request import Request, Ticket, tell
from lapilli.generate.engine.scheduler import Roster
from lapilli.generate.engine.stream import EngineStream
from lapilli.generate.model_lock import lock_of
from lapilli.generate.outputs import Generation
from lapilli.generate.payoff import Payoff
from lapilli.generate.speculative import Drafter, DraftModel, PromptLookup
from lapilli.model.vlm import VisionLanguageModel
from lapilli.shapes import Float, Tensor

T = TypeVar("T")


class Engine:
    """Answers requests, many at a time.

    Everything may be called from any thread, at any time: the model is run by one thread at a time
    (generate/model_lock.py), and a step works for the requests of all. What is wrong with a request
    is found by `submit` and told to its caller alone.

    An interrupt (KeyboardInterrupt) may come anywhere. Requests that were not being changed at
    that moment go on with the next step, and all blocks come back.

    Args:
        model: with a language model of lapilli's own.
        tokenizer: turns ids into text.
        eos_ids: end tokens; None: the tokenizer's.
        context_length: most positions of prompt and answer; None: what the language model reads.
        options: limits.
        drafter: where guesses of the next tokens come from.

    Raises:
        UnsupportedModelError: a language model from elsewhere.
        GenerationError: memory for less than one block, or a draft model of other tokens.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: TokenBytes,
        *,
        eos_ids: Collection[int] | None = None,
        context_length: int | None = None,
        options: EngineOptions | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        language_model = model.language_model
        if not language_model.takes_ragged:
            raise UnsupportedModelError(
                f"{type(language_model).__name__} reads rows of one length only, the engine needs "
                "a language model of lapilli's own: use generate()"
            )
        if isinstance(drafter, DraftModel):
            drafter.check_vocabulary(language_model.config.vocab_size)
        self.model = model
        self.options = options or EngineOptions()
        self.context_length = readable_context(model, context_length)
        like = language_model.embed(torch.zeros(1, dtype=torch.long, device=model.device))
        self.pool = new_pool(model, self.options, context_length=self.context_length, like=like)
        self.features = FeatureCache(self.options.feature_bytes)
        if eos_ids is None:
            eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self._arrivals = Arrivals(
            model, tokenizer, eos_ids=eos_ids, context_length=self.context_length, pool=self.pool
        )
        self._roster = Roster()
        self._stepper = Stepper(
            model,
            self._roster,
            self.pool,
            self.features,
            self.options,
            context_length=self.context_length,
            drafter=drafter or PromptLookup(),
            payoff=Payoff(is_timed=self.options.speculate == "auto"),
        )
        self._reader = self._stepper.reader
        self._lock = lock_of(language_model)
        self._held_by: object | None = None
        """The lock under which something is going on; only the thread that holds it finds it."""
        self._is_broken_off = False

    @property
    def prefix_stats(self) -> PrefixStats:
        """How much of the prompts was known."""
        return self.pool.stats

    @property
    def payoff(self) -> Payoff:
        """Which guesses make tokens come faster."""
        return self._stepper.payoff

    @payoff.setter
    def payoff(self, payoff: Payoff) -> None:
        self._stepper.payoff = payoff

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return self._roster.has_work

    @property
    def num_waiting(self) -> int:
        """Requests that no block is reserved for yet."""
        return self._roster.num_waiting

    def submit(self, request: Request, *, ticket: Ticket | None = None) -> Ticket:
        """Take a request; the work is done by `step`, whoever calls it.

        Args:
            request: what to answer.
            ticket: made before, by somebody who wants to be woken.

        Raises:
            ContextTooLongError: the prompt leaves no room for a single token.
            MediaCountMismatchError: another number of media than of spans.
            FusionError: a medium that does not fit its span.
            UnsupportedModelError: a modality that the model does not have.
            RequestError: ids, spans or options that the model cannot work with.
            GenerationError: beams, no tokens, too large for the memory, or too many wait already.
        """
        ticket = ticket or Ticket(request)
        sequence = self._arrivals.new_sequence(request, ticket)
        if not self._roster.enter(sequence, most=self.options.max_waiting):
            raise GenerationError(
                f"{self.num_waiting} requests are waiting, the limit: try again later, or set "
                "EngineOptions(max_waiting=...)"
            )
        return ticket

    def queue(self, request: Request, *, ticket: Ticket) -> None:
        """`submit`, working until there is room where too many wait already."""
        sequence = self._arrivals.new_sequence(request, ticket)
        most = self.options.max_waiting
        while not self._roster.enter(sequence, most=most):
            self.work(lambda: self.num_waiting < most)

    def run(self, requests: Iterable[Request]) -> list[Generation]:
        """The answers to all requests, in their order.

        Raises:
            LapilliError: the first request that cannot be answered; the others are cancelled.
        """
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(Ticket(request))
                self.queue(request, ticket=tickets[-1])
            for ticket in tickets:
                while not ticket.is_finished:
                    self.work(lambda: ticket.is_finished)  # noqa: B023  called at once
            return [ticket.generation for ticket in tickets]
        finally:
            self.leave(tickets)

    def as_completed(
        self, requests: Iterable[Request]
    ) -> Iterator[tuple[int, Generation | LapilliError]]:
        """Number and answer of every request as it is finished; errors are handed out too.

        Requests are taken from the iterable when there is room: it may be long, or made meanwhile.
        """
        return answer_as_completed(self, requests, most=2 * self.options.max_rows)

    def stream(self, request: Request) -> EngineStream:
        """One answer, piece by piece, while other requests go on too."""
        return EngineStream(
            request,
            submit=lambda ticket: self.submit(request, ticket=ticket),
            work=self.work,
            leave=lambda ticket: self.leave([ticket]),
        )

    def step(self) -> bool:
        """One pass of the model for everybody; False when there is nothing to do.

        Those who have something to read are woken afterwards, when the engine is free again.

        Raises:
            RuntimeError: the model failed (out of memory, for instance). All requests of the step
                have failed with it; the engine can go on.
        """
        self._do(self._stepper.step, alone=True)
        return self.has_work

    def work(self, until: Callable[[], bool]) -> None:
        """A step for somebody who waits; none where another thread has done enough meanwhile.

        What a step raises is in the tickets that it failed, so nothing is raised here.

        Args:
            until: what is waited for.

        Raises:
            GenerationError: asked for from within a step, which would wait for itself.
        """
        asked: list[bool] = []

        def step() -> None:
            asked.append(until())
            if not asked[-1]:
                self._stepper.step()

        with suppress(Exception):  # it is in the tickets
            self._do(step, alone=True)
        if not asked:
            raise GenerationError(
                "this engine is in the middle of a step: what a step calls cannot wait for an "
                "answer of the same engine"
            )

    def abandon(self, error: LapilliError, tickets: Iterable[Ticket] | None = None) -> None:
        """Fail requests that are not finished: those of `tickets`, or all."""
        meant = None if tickets is None else set(tickets)
        self._do(lambda: self._stepper.abandon(error, meant))

    def leave(self, tickets: Iterable[Ticket]) -> None:
        """Let go of requests that nobody waits for any more."""
        open_tickets = [ticket for ticket in tickets if not ticket.is_finished]
        try:
            for ticket in open_tickets:
                ticket.cancel()
        except BaseException:  # an interrupt: all the more nobody waits for them
            for ticket in open_tickets:
                ticket.cancel()
            raise
        if open_tickets:
            self._do(self._stepper.drop_cancelled, alone=True)

    def keep_features(self, modality: str, item: Any, features: Float[Tensor, "n D"]) -> None:  # noqa: ANN401
        """Remember what a modality made of an item, for somebody who had to look before asking."""
        digest = media_digest(modality, item)
        self._do(lambda: self.features.put((digest, self._stepper.notice_changes()), features))

    def save_prefix(self, path: Path, keys: Items[int]) -> int:
        """What is kept of a sequence of these position keys, in a file; returns positions.

        Args:
            path: of a new safetensors file.
            keys: `Ticket.keys` of a finished request.

        Raises:
            CheckpointError: nothing is kept of it any more.
        """
        probe = [*keys, 0]  # a last position that is not looked for

        def save() -> int:
            known = self.pool.find(self.pool.chain(self._stepper.root(), probe), probe)
            return write_prefix(path, self.pool, known, keys, model_digest(self.model))

        return self._do(save)

    def load_prefix(self, path: Path) -> int:
        """Keys and values from a file, found by every prompt that begins so; returns positions.

        Raises:
            MissingFileError: there is no such file.
            CheckpointError: it is of another model, or larger than the memory.
        """

        def load() -> int:
            saved = read_prefix(path, self.pool, model_digest(self.model))
            return place_prefix(saved, self.pool, self._stepper.root())

        return self._do(load)

    def renew(self) -> None:
        """Forget everything kept, after weights were changed in a way that nobody can see."""
        self._do(self._stepper.renew)

    def _do(self, work: Callable[[], T], *, alone: bool = False) -> T:
        """Let this thread alone work with the model, then wake those who have something to read.

        Args:
            work: what to do.
            alone: leave it undone where this thread is in the middle of something here: a ticket
                may be let go of by the garbage collector, in any line.
        """
        news: deque[Ticket] = deque()
        try:
            return self._do_locked(work, news, alone=alone)
        finally:
            tell(news)

    def _do_locked(self, work: Callable[[], T], news: deque[Ticket], *, alone: bool) -> T:
        with self._lock.turn:
            if self._held_by is self._lock.turn:
                return None if alone else work()  # type: ignore[return-value]  # alone: T is None
            try:
                self._held_by = self._lock.turn
                self._stepper.news = news
                if self._is_broken_off:
                    self._stepper.settle()
                self._is_broken_off = True
                done = work()
                self._is_broken_off = False
                return done
            finally:
                self._held_by = None

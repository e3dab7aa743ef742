"""The engine: requests join and leave between steps, a step is one pass for all of them.

    submit -> waiting --admit: blocks for prompt and longest answer--> rows
    step      rows that grow: one token each  |  rows that are read: a chunk of their prompt
              one pass over all of it -> a token per row that has been read -> pieces, ends

Knows prompts as ids and spans, media as things that a modality embeds; must not know templates,
files or conversations.
"""

import threading
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lapilli.errors import GenerationError, LapilliError, UnsupportedModelError
from lapilli.generate.cache.blocks import PrefixStats
from lapilli.generate.cache.features import FeatureCache
from lapilli.generate.cache.identity import WeightWatch, media_digest
from lapilli.generate.cache.prefix_file import (
    model_digest,
    place_prefix,
    read_prefix,
    write_prefix,
)
from lapilli.generate.engine.admission import Admission, root_digest
from lapilli.generate.engine.arrival import Arrivals, readable_context
from lapilli.generate.engine.choosing import Share, extend, prepare_choosing
from lapilli.generate.engine.completed import answer_as_completed
from lapilli.generate.engine.media import MediaReader
from lapilli.generate.engine.memory import new_pool
from lapilli.generate.engine.options import EngineOptions
from lapilli.generate.engine.reading import Reader
from lapilli.generate.engine.request import Request, Ticket
from lapilli.generate.engine.sequence import Sequence
from lapilli.generate.engine.stream import EngineStream
from lapilli.generate.outputs import Generation
from lapilli.generate.payoff import Payoff
from lapilli.generate.speculate import Drafter, DraftModel, PromptLookup
from lapilli.generate.text import TokenBytes
from lapilli.model.vlm import VisionLanguageModel
from lapilli.shapes import Float, Tensor


class Engine:
    """Answers requests, many at a time.

    `submit`, `Ticket.cancel` and `Ticket.take` may be called from any thread; `step` and what calls
    it (`run`, `stream`, `as_completed`) from one thread at a time.

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
        self.model = model
        self.options = options or EngineOptions()
        if eos_ids is None:
            eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.context_length = readable_context(model, context_length)
        like = language_model.embed(torch.zeros(1, dtype=torch.long, device=model.device))
        self._device = like.device
        self.pool = new_pool(model, self.options, context_length=self.context_length, like=like)
        self._reader = Reader(
            model, self.pool.store, self.options, context_length=self.context_length
        )
        self.features = FeatureCache(self.options.feature_bytes)
        self._media = MediaReader(model, self.features)
        self._watch = WeightWatch(model)
        self._epoch = self._watch.epoch
        self._text_watch = WeightWatch(cast("nn.Module", language_model))
        self._text_epoch = self._text_watch.epoch
        self._drafter = drafter or PromptLookup()
        if isinstance(drafter, DraftModel):
            drafter.check_vocabulary(language_model.config.vocab_size)
        self.payoff = Payoff(is_timed=self.options.speculate == "auto")
        """Which guesses make tokens come faster."""
        self._arrivals = Arrivals(
            tokenizer, eos_ids=eos_ids, context_length=self.context_length, pool=self.pool
        )
        self._admission = Admission(self.pool, self.options.max_rows)
        self._vocabulary = language_model.config.vocab_size
        self._lock = threading.Lock()
        self._inbox: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._rows: list[Sequence] = []

    @property
    def prefix_stats(self) -> PrefixStats:
        """How much of the prompts was known."""
        return self.pool.stats

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._inbox or self._waiting or self._rows)

    @property
    def num_waiting(self) -> int:
        """Requests that no block is reserved for yet."""
        return len(self._inbox) + len(self._waiting)

    def submit(self, request: Request, *, ticket: Ticket | None = None) -> Ticket:
        """Take a request; the work is done by `step`.

        Args:
            request: what to answer.
            ticket: made before, by somebody who wants to be woken.

        Raises:
            ContextTooLongError: the prompt leaves no room for a single token.
            MediaCountMismatchError: another number of media than of spans.
            GenerationError: beams, no tokens, too large for the memory, or too many wait already.
        """
        sequence = self._arrivals.new_sequence(request, ticket or Ticket(request))
        with self._lock:
            if self.num_waiting >= self.options.max_waiting:
                raise GenerationError(
                    f"{self.num_waiting} requests are waiting, the limit: try again later, or set "
                    "EngineOptions(max_waiting=...)"
                )
            self._inbox.append(sequence)
        return sequence.ticket

    def run(self, requests: Iterable[Request]) -> list[Generation]:
        """The answers to all requests, in their order.

        Raises:
            LapilliError: the first request that cannot be answered; the others are cancelled.
        """
        tickets: list[Ticket] = []
        try:
            for request in requests:
                while self.num_waiting >= self.options.max_waiting:
                    self.step()
                tickets.append(self.submit(request))
            while not all(ticket.is_finished for ticket in tickets):
                self.step()
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
            step=self.step,
            leave=lambda ticket: self.leave([ticket]),
        )

    def step(self) -> bool:
        """One pass of the model for everybody; False when there is nothing to do.

        Raises:
            RuntimeError: the model failed (out of memory, for instance). All requests of the step
                have failed with it; the engine can go on.
        """
        self._take_inbox()
        self._drop_cancelled()
        self._watch_rows()
        self._admit()
        started = self.payoff.clock()
        shares = self._share_out()
        if shares:
            self._advance(shares, started=started)
        if not self.has_work:
            self._watch.rest()
            self._text_watch.rest()
        return self.has_work

    def abandon(self, error: LapilliError) -> None:
        """Fail every request that is not finished."""
        self._take_inbox()
        for sequence in [*self._waiting, *self._rows]:
            self._fail(sequence, error)

    def keep_features(self, modality: str, item: Any, features: Float[Tensor, "n D"]) -> None:  # noqa: ANN401
        """Remember what a modality made of an item, for somebody who had to look before asking."""
        self.features.put((media_digest(modality, item), self._notice_changes()), features)

    def save_prefix(self, path: Path, keys: Items[int]) -> int:
        """What is kept of a sequence of these position keys, in a file; returns positions.

        Args:
            path: of a new safetensors file.
            keys: `Ticket.keys` of a finished request.

        Raises:
            CheckpointError: nothing is kept of it any more.
        """
        probe = [*keys, 0]  # a last position that is not looked for
        known = self.pool.find(self.pool.chain(self._root(), probe), probe)
        return write_prefix(path, self.pool, known, keys, model_digest(self.model))

    def load_prefix(self, path: Path) -> int:
        """Keys and values from a file, found by every prompt that begins so; returns positions.

        Raises:
            MissingFileError: there is no such file.
            CheckpointError: it is of another model, or larger than the memory.
        """
        saved = read_prefix(path, self.pool, model_digest(self.model))
        return place_prefix(saved, self.pool, self._root())

    def _root(self) -> bytes:
        return root_digest(self._notice_changes())

    def _notice_changes(self) -> int:
        """The epoch of the weights; what was kept in the one before is let go."""
        epoch = self._watch.epoch
        if epoch != self._epoch:
            self._epoch = epoch
            self.pool.forget()
            self.features.clear()
            self._reader.forget()
            for row in self._rows:
                row.is_stale = True
        return epoch

    def _watch_rows(self) -> None:
        """Look for changes before every step.

        A setting that is turned and turned back between two requests must not leave behind what
        was read in between. While answers grow the modalities are not asked, so the language model
        is watched alone: it costs a third.
        """
        if self._waiting or not all(row.is_growing for row in self._rows):
            self._notice_changes()
        elif self._rows and self._text_watch.epoch != self._text_epoch:
            self._text_epoch = self._text_watch.epoch
            self.renew()
            self._notice_changes()

    def renew(self) -> None:
        """Forget everything kept, after weights were changed in a way that nobody can see."""
        self._watch.renew()

    def leave(self, tickets: Iterable[Ticket]) -> None:
        """Let go of requests that nobody waits for any more."""
        open_tickets = [ticket for ticket in tickets if not ticket.is_finished]
        for ticket in open_tickets:
            ticket.cancel()
        if open_tickets:
            self._take_inbox()
            self._drop_cancelled()

    def _take_inbox(self) -> None:
        with self._lock:
            new, self._inbox = self._inbox, []
        if new:
            self._waiting = sorted([*self._waiting, *new], key=lambda sequence: sequence.rank)

    def _drop_cancelled(self) -> None:
        for sequence in [*self._waiting, *self._rows]:
            if sequence.ticket.is_cancelled:
                self._end(sequence)

    def _admit(self) -> None:
        """Give blocks to those who wait, as long as there are rows."""
        if not self._waiting or len(self._rows) >= self.options.max_rows:
            return
        for sequence in self._admission.admit(self._waiting, self._rows, epoch=self._epoch):
            prepare_choosing(sequence, self._vocabulary, self._device)
            if self.options.speculate != "off":
                sequence.drafting = self._drafter.begin()

    def _share_out(self) -> list[Share]:
        """Who reads how much in this step: growing rows a token, then prompts by rank."""
        rows = [row for row in self._rows if row.is_growing]
        offer = self.payoff.offer(len(rows))
        growing = [Share(row, 1, tuple(row.draft(offer.takes))) for row in rows]
        waits = sorted((r for r in self._rows if not r.is_growing), key=lambda row: row.rank)
        left = self.options.chunk if growing else self.options.max_step
        looks = self._media.looks + (1 if growing else len(waits))
        reading: list[Share] = []
        for row in waits:
            # A prompt that keeps nobody waiting is read at once, attention is faster then.
            most = left if growing or reading else 4 * left
            count = self._look(row, min(row.unread, most), looks - self._media.looks)
            if count:
                reading.append(Share(row, count))
                left -= count
            if left <= 0:
                break
        return sorted([*growing, *reading], key=lambda share: share.length)

    def _look(self, row: Sequence, count: int, looks: int) -> int:
        """Positions that a row can read now; a row whose media do not fit has failed."""
        try:
            return self._media.readable(row, count, epoch=self._epoch, looks=looks)
        except LapilliError as error:
            self._fail(row, error)
        except RuntimeError as error:
            self._fail(row, GenerationError(f"the model failed to look at a medium: {error}"))
        return 0

    def _advance(self, shares: list[Share], *, started: float) -> None:
        """Read, choose, deliver."""
        ending = [share for share in shares if share.ends]
        is_growth = all(share.sequence.is_growing for share in shares)
        try:
            logits = self._reader.read(shares, unchanged=self._watch.token)
            if logits is not None:
                extend(logits, ending)
        except KeyboardInterrupt:
            for share in shares:
                self._end(share.sequence)
            raise
        except (RuntimeError, LapilliError) as error:
            for share in shares:
                self._fail(share.sequence, GenerationError(f"the model failed: {error}"))
            raise
        if is_growth and self._reader.is_steady:
            seconds = self.payoff.clock() - started
            guesses = sum(len(share.draft) for share in shares)
            self.payoff.learn(seconds, rows=len(shares), guesses=guesses)
        for share in shares:
            row = share.sequence
            # After a choice everything but the newest token has been read, rejected guesses apart.
            row.length = len(row.tokens) - 1 if row.is_growing else row.length + share.count
            self._deliver(row)

    def _deliver(self, sequence: Sequence) -> None:
        """Hand out what settled; publish full blocks; end what is over."""
        if sequence.table is not None and not sequence.is_stale:
            self.pool.publish(sequence.table, sequence.keys, sequence.length)
        if sequence.answer.is_finished:
            self._end(sequence)
            return
        piece = sequence.answer.take()
        if piece is not None:
            sequence.ticket.deliver(piece)

    def _end(self, sequence: Sequence) -> None:
        """The answer is over, cancelled if nothing else ended it."""
        self._remove(sequence)
        generation = sequence.answer.result()
        piece = sequence.answer.take()
        if piece is not None:
            sequence.ticket.deliver(piece)
        sequence.ticket.finish(generation)

    def _fail(self, sequence: Sequence, error: LapilliError) -> None:
        self._remove(sequence)
        sequence.ticket.fail(error)

    def _remove(self, sequence: Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._rows:
            self._rows.remove(sequence)
        sequence.ticket.keys = tuple(sequence.keys[: sequence.length])
        table, sequence.table = sequence.table, None
        if table is not None:
            self.pool.release(table, sequence.keys, 0 if sequence.is_stale else sequence.length)

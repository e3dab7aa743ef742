"""A step of the engine: who begins, who reads how much, one pass for all, what settled.

    rows that grow: one token each  |  rows that are read: a chunk of their prompt
    one pass over all of it -> a token per row that has been read -> pieces, ends

Everything here is done by the thread that holds the model. Nothing foreign is called: whoever has
to be told of something is noted in `news` and told when the model is free again. An interrupt may
end any line; `settle` puts in order what it left.
"""

import logging
from collections import deque
from collections.abc import Container
from typing import cast

from torch import nn

from lapilli.errors import GenerationError, LapilliError
from lapilli.generate.cache.features import FeatureCache
from lapilli.generate.engine.admission import Admission, root_digest
from lapilli.generate.engine.block_pool import BlockPool
from lapilli.generate.engine.choosing import Share, extend, prepare_choosing
from lapilli.generate.engine.feature_cache import WeightWatch
from lapilli.generate.engine.media import MediaReader
from lapilli.generate.engine.model_runner import Reader
from lapilli.generate.engine.options import EngineOptions
from lapilli.generate.engine.request import Ticket
from lapilli.generate.engine.scheduler import Roster
from lapilli.generate.engine.sequence import Sequence
from lapilli.generate.payoff import Offer, Payoff
from lapilli.generate.speculative import Drafter, Drafting
from lapilli.model.vlm import VisionLanguageModel

LOG = logging.getLogger(__name__)


class Stepper:
    """What an engine does with its requests.

    Args:
        model: the model.
        roster: the requests.
        pool: blocks of keys and values.
        features: of pictures, kept.
        options: limits.
        context_length: most positions of a sequence.
        drafter: where guesses of the next tokens come from.
        payoff: which of them make tokens come faster.

    Attributes:
        reader: runs passes of the model.
        payoff: which guesses make tokens come faster.
        news: the tickets that have something to tell since the last step began.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        roster: Roster,
        pool: BlockPool,
        features: FeatureCache,
        options: EngineOptions,
        *,
        context_length: int,
        drafter: Drafter,
        payoff: Payoff,
    ) -> None:
        self._roster = roster
        self._pool = pool
        self._features = features
        self._options = options
        self._drafter = drafter
        self.payoff = payoff
        self._admission = Admission(pool, options.max_rows)
        self._media = MediaReader(model, features)
        self._watch = WeightWatch(model)
        self._epoch = self._watch.epoch
        self._text_watch = WeightWatch(cast("nn.Module", model.language_model))
        self._text_epoch = self._text_watch.epoch
        self._vocabulary = model.language_model.config.vocab_size
        self._device = pool.store.device
        self.reader = Reader(model, pool.store, options, context_length=context_length)
        self.news: deque[Ticket] = deque()

    def step(self) -> None:
        """One pass of the model for everybody, if there is something to do.

        Raises:
            Exception: what went wrong; some requests have failed with it, so the next step does
                not do the same again.
        """
        try:
            self.drop_cancelled()
            self._watch_rows()
            self._admit()
            started = self.payoff.clock()
            shares = self._share_out()
        except Exception as error:  # nothing of this is any request's own
            self.abandon(GenerationError(f"the engine failed: {error}"))
            raise
        if shares:
            self._advance(shares, started=started)
        if not self._roster.has_work:
            self._watch.rest()
            self._text_watch.rest()

    def drop_cancelled(self) -> None:
        """End what nobody waits for any more."""
        self._roster.take_in()
        for sequence in self._roster:
            if sequence.ticket.is_cancelled:
                self._end(sequence)

    def abandon(self, error: LapilliError, tickets: Container[Ticket] | None = None) -> None:
        """Fail requests that are not finished: these, or all."""
        self._roster.take_in()
        for sequence in self._roster:
            if tickets is None or sequence.ticket in tickets:
                self._fail(sequence, error)

    def settle(self) -> None:
        """Put in order what an interrupted step left; where none was, nothing changes.

        Sequences that it did not touch go on. Blocks belong to those who are still here.
        """
        self._roster.settle()
        for sequence in self._roster:
            if not (sequence.is_open or sequence.ticket.is_finished):
                continue
            sequence.table = None  # who owned what is counted below
            if not sequence.ticket.is_finished:
                sequence.ticket.fail(
                    GenerationError("the engine was interrupted while this answer grew: ask again")
                )
                self._note(sequence.ticket)
            self._roster.remove(sequence)
        self._pool.recount(row.table for row in self._roster.rows if row.table is not None)
        self._features.recount()

    def root(self) -> bytes:
        """What the chains of all sequences begin with now."""
        return root_digest(self.notice_changes())

    def notice_changes(self) -> int:
        """The epoch of the weights; what was kept in the one before is let go."""
        epoch = self._watch.epoch
        if epoch != self._epoch:
            self._pool.forget()
            self._features.clear()
            self.reader.forget()
            for row in self._roster.rows:
                row.is_stale = True
            self._epoch = epoch  # last: what an interrupt leaves undone is done the next time
        return epoch

    def renew(self) -> None:
        """Forget everything kept, after weights were changed in a way that nobody can see."""
        self._watch.renew()

    def _watch_rows(self) -> None:
        """Look for changes before every step.

        A setting that is turned and turned back between two requests must not leave behind what
        was read in between. While answers grow the modalities are not asked, so the language model
        is watched alone: it costs a third.
        """
        rows = self._roster.rows
        if self._roster.waiting or not all(row.is_growing for row in rows):
            self.notice_changes()
        elif rows and (epoch := self._text_watch.epoch) != self._text_epoch:
            self.renew()
            self.notice_changes()
            self._text_epoch = epoch

    def _admit(self) -> None:
        """Give blocks to those who wait, as long as there are rows."""
        rows = self._roster.rows
        if self._roster.waiting and len(rows) < self._options.max_rows:
            self._admission.admit(self._roster.waiting, rows, epoch=self._epoch)
        for row in [row for row in rows if not row.is_ready]:
            prepare_choosing(row, self._vocabulary, self._device)
            row.drafting = self._begin_drafting()
            row.is_ready = True

    def _begin_drafting(self) -> Drafting | None:
        if self._options.speculate == "off":
            return None
        try:
            return self._drafter.begin()
        except Exception:  # foreign code; an answer needs no guesses
            LOG.exception("a drafter failed; an answer goes on without guesses")
            return None

    def _share_out(self) -> list[Share]:
        """Who reads how much in this step: growing rows a token, then prompts by rank."""
        rows = [row for row in self._roster.rows if row.is_growing]
        offer = self.payoff.offer(len(rows))
        growing = [Share(row, 1, self._guesses(row, offer)) for row in rows]
        waits = sorted((r for r in self._roster.rows if not r.is_growing), key=lambda row: row.rank)
        left = self._options.chunk if growing else self._options.max_step
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

    def _guesses(self, row: Sequence, offer: Offer) -> tuple[int, ...]:
        """What may follow; a drafter that fails, or guesses no tokens, is asked no more."""
        try:
            guesses = tuple(row.draft(offer.takes))
            if all(0 <= guess < self._vocabulary for guess in guesses):
                return guesses
            LOG.warning("a drafter guessed %s, which are no token ids", guesses)
        except Exception:  # foreign code; an answer needs no guesses
            LOG.exception("a drafter failed; this answer goes on without guesses")
        row.drafting = None
        return ()

    def _look(self, row: Sequence, count: int, looks: int) -> int:
        """Positions that a row can read now; a row whose media do not fit has failed."""
        try:
            return self._media.readable(row, count, epoch=self._epoch, looks=looks)
        except LapilliError as error:
            self._fail(row, error)
        except Exception as error:  # noqa: BLE001  a modality may be anybody's, and meet anything
            self._fail(row, GenerationError(f"the model failed to look at a medium: {error}"))
        return 0

    def _advance(self, shares: list[Share], *, started: float) -> None:
        """Read, choose, deliver."""
        ending = [share for share in shares if share.ends]
        is_growth = all(share.sequence.is_growing for share in shares)
        failures: dict[Sequence, Exception] = {}
        try:
            # If an interrupt comes this is done again: no row has changed yet.
            logits = self.reader.read(shares, unchanged=self._watch.token)
            if logits is not None:
                failures = extend(logits, ending)
        except Exception as error:
            failure = GenerationError(f"the model failed: {error}")
            failure.__cause__ = error
            for share in shares:
                self._fail(share.sequence, failure)
            raise
        if is_growth and self.reader.is_steady:
            seconds = self.payoff.clock() - started
            guesses = sum(len(share.draft) for share in shares)
            self.payoff.learn(seconds, rows=len(shares), guesses=guesses)
        for share in shares:
            row = share.sequence
            if row in failures:
                self._fail(row, GenerationError(f"no token can be chosen: {failures[row]}"))
                continue
            # After a choice everything but the newest token has been read, rejected guesses apart.
            row.length = len(row.tokens) - 1 if row.is_growing else row.length + share.count
            self._deliver(row)

    def _deliver(self, sequence: Sequence) -> None:
        """Hand out what settled; publish full blocks; end what is over."""
        if sequence.table is not None and not sequence.is_stale:
            self._pool.publish(sequence.table, sequence.keys, sequence.length)
        if sequence.answer.is_finished:
            self._end(sequence)
            return
        piece = sequence.answer.take()
        if piece is not None:
            sequence.ticket.deliver(piece)
            self._note(sequence.ticket)
        sequence.is_open = False

    def _end(self, sequence: Sequence) -> None:
        """The answer is over, cancelled if nothing else ended it."""
        sequence.is_open = True
        generation = sequence.answer.result()
        piece = sequence.answer.take()
        self._give_back(sequence)
        if piece is not None:
            sequence.ticket.deliver(piece)
        sequence.ticket.finish(generation)
        self._note(sequence.ticket)
        self._roster.remove(sequence)

    def _fail(self, sequence: Sequence, error: LapilliError) -> None:
        sequence.is_open = True
        self._give_back(sequence)
        sequence.ticket.fail(error)
        self._note(sequence.ticket)
        self._roster.remove(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Blocks come back before the reader knows that it is over."""
        sequence.ticket.keys = tuple(sequence.keys[: sequence.length])
        table, sequence.table = sequence.table, None
        if table is not None:
            self._pool.release(table, sequence.keys, 0 if sequence.is_stale else sequence.length)

    def _note(self, ticket: Ticket) -> None:
        if not self.news or self.news[-1] is not ticket:
            self.news.append(ticket)

"""Steps of the engine: schedule, run the model, sample, deliver.

    step       drop what was cancelled -> admit -> schedule -> run the model -> sample -> deliver

All of it runs in the thread that holds the model's lock and calls no callbacks. Handles with
something to tell are noted in `news`, and their readers are woken after the lock is released. A
KeyboardInterrupt may end any line; `settle` restores a consistent state after one.
"""

from collections import deque
from collections.abc import Container
from itertools import accumulate
from typing import cast

from torch import nn

from lapilli.errors import GenerationError, GrammarError, LapilliError, ModelFailedError
from lapilli.generate.engine.block_pool import BlockPool
from lapilli.generate.engine.feature_cache import FeatureCache, WeightWatch
from lapilli.generate.engine.model_runner import ModelRunner
from lapilli.generate.engine.request import RequestHandle
from lapilli.generate.engine.scheduler import Scheduler, root_digest
from lapilli.generate.engine.sequence import ScheduledSequence, Sequence
from lapilli.generate.sampler import Sampler
from lapilli.model import VisionLanguageModel
from lapilli.shapes import Float, Tensor


class EngineCore:
    """Steps of an engine, which owns the scheduler and the caches.

    Attributes:
        runner: runs passes of the model.
        news: handles that have something to tell since the last step began.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        runner: ModelRunner,
        scheduler: Scheduler,
        pool: BlockPool,
        features: FeatureCache,
    ) -> None:
        self.runner = runner
        self._scheduler = scheduler
        self._pool = pool
        self._features = features
        self._watch = WeightWatch(model)
        self._version = self._watch.version
        self._text_watch = WeightWatch(cast("nn.Module", model.language_model))
        self._text_version = self._text_watch.version
        self.news: deque[RequestHandle] = deque()

    def step(self) -> None:
        """Run the model once for all running sequences.

        Raises:
            Exception: what went wrong; the requests that caused it have failed, so the next step
                does not repeat it.
        """
        try:
            self.drop_cancelled()
            self._check_weights()
            self._scheduler.admit(weights_version=self._version)
            started = self._scheduler.speculation.clock()
            scheduled, failed = self._scheduler.schedule(weights_version=self._version)
            for sequence, failure in failed.items():
                self._fail(sequence, failure)
        except Exception as error:  # no single request caused it
            self.abort_all(ModelFailedError(f"the engine failed: {error}"))
            raise
        if scheduled:
            self._advance(scheduled, started=started)
        if not self._scheduler.has_work:
            self._watch.release()
            self._text_watch.release()

    def drop_cancelled(self) -> None:
        """End the sequences whose requests were cancelled."""
        self._scheduler.take_in()
        for sequence in self._scheduler:
            if sequence.handle.is_cancelled:
                self._end(sequence)

    def abort_all(
        self, error: LapilliError, handles: Container[RequestHandle] | None = None
    ) -> None:
        """Fail requests that are not finished: these, or all."""
        self._scheduler.take_in()
        for sequence in self._scheduler:
            if handles is None or sequence.handle in handles:
                self._fail(sequence, error)

    def settle(self) -> None:
        """Restore a consistent state after an interrupted step.

        Sequences that were being changed fail, all others go on, and blocks are counted again.
        """
        self._scheduler.settle()
        for sequence in self._scheduler:
            if not (sequence.is_open or sequence.handle.is_finished):
                continue
            sequence.table = None  # who owned what is counted below
            if not sequence.handle.is_finished:
                sequence.handle.fail(
                    GenerationError("the engine was interrupted while this answer grew: ask again")
                )
                self._note(sequence.handle)
            self._scheduler.remove(sequence)
        self._pool.recount(row.table for row in self._scheduler.running if row.table is not None)
        self._features.recount()

    def root(self) -> bytes:
        """Return the digest that the chains of all sequences begin with now."""
        return root_digest(self.weights_version())

    def weights_version(self) -> int:
        """Return the version of the weights; clear all caches when it is a new one."""
        version = self._watch.version
        if version != self._version:
            self._pool.clear()
            self._features.clear()
            self.runner.clear()
            for row in self._scheduler.running:
                row.is_stale = True
            self._version = version  # last, so that an interrupted clearing is repeated
        return version

    def reset_cache(self) -> None:
        """Clear all caches at the next step, after changes that torch's counters miss."""
        self._watch.reset()

    def _check_weights(self) -> None:
        """Check for changes of the model before every step.

        A setting that is changed and changed back between two requests must not leave cached what
        was computed in between. While every sequence is decoding no modality is used, so only the
        language model is checked, which takes a third of the time.
        """
        rows = self._scheduler.running
        if self._scheduler.waiting or not all(row.is_decoding for row in rows):
            self.weights_version()
        elif rows and (version := self._text_watch.version) != self._text_version:
            self.reset_cache()
            self.weights_version()
            self._text_version = version

    def _advance(self, scheduled: list[ScheduledSequence], *, started: float) -> None:
        """Run the model over what is scheduled, sample, deliver."""
        is_decode = all(one.sequence.is_decoding for one in scheduled)
        failures: dict[Sequence, Exception] = {}
        try:
            # Repeated after an interrupt: no sequence has changed yet.
            rows = [(one.sequence.table, one.sequence.length + one.length) for one in scheduled]
            self._pool.make_ready((table, end) for table, end in rows if table is not None)
            logits = self.runner.execute_model(scheduled, unchanged=self._watch.token)
            if logits is not None:
                failures = sample(logits, [one for one in scheduled if one.is_sampled])
        except Exception as error:
            failure = ModelFailedError(f"the model failed: {error}")
            failure.__cause__ = error
            for one in scheduled:
                self._fail(one.sequence, failure)
            raise
        if is_decode and self.runner.is_steady:
            speculation = self._scheduler.speculation
            drafts = sum(len(one.draft) for one in scheduled)
            speculation.learn(speculation.clock() - started, rows=len(scheduled), drafts=drafts)
        for one in scheduled:
            row = one.sequence
            if row in failures:
                self._fail(row, _sampling_failure(failures[row]))
                continue
            # After sampling all but the newest token is computed, rejected draft tokens apart.
            row.length = len(row.tokens) - 1 if row.is_decoding else row.length + one.count
            self._deliver(row)

    def _deliver(self, sequence: Sequence) -> None:
        """Deliver text that is certain, publish full blocks, end a finished sequence."""
        if sequence.table is not None and not sequence.is_stale:
            self._pool.publish(sequence.table, sequence.keys, sequence.length)
        if sequence.answer.is_finished:
            self._end(sequence)
            return
        piece = sequence.answer.take()
        if piece is not None:
            sequence.handle.deliver(piece)
            self._note(sequence.handle)
        sequence.is_open = False

    def _end(self, sequence: Sequence) -> None:
        """End an answer; it is cancelled unless it is finished."""
        sequence.is_open = True
        generation = sequence.answer.result()
        piece = sequence.answer.take()
        self._free_blocks(sequence)
        if piece is not None:
            sequence.handle.deliver(piece)
        sequence.handle.finish(generation)
        self._note(sequence.handle)
        self._scheduler.remove(sequence)

    def _fail(self, sequence: Sequence, error: LapilliError) -> None:
        sequence.is_open = True
        self._free_blocks(sequence)
        sequence.handle.fail(error)
        self._note(sequence.handle)
        self._scheduler.remove(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        """Free the blocks before the reader is told that the answer is over."""
        sequence.handle.keys = tuple(sequence.keys[: sequence.length])
        table, sequence.table = sequence.table, None
        if table is not None:
            self._pool.release(table, sequence.keys, 0 if sequence.is_stale else sequence.length)

    def _note(self, handle: RequestHandle) -> None:
        if not self.news or self.news[-1] is not handle:
            self.news.append(handle)


def sample(
    logits: Float[Tensor, "R V"], scheduled: list[ScheduledSequence]
) -> dict[Sequence, Exception]:
    """Sample tokens and verify draft tokens; return the sequences that failed, and why.

    Each token is sampled as if there were no draft; a draft token that equals it only saves the
    pass that the next token would need. So the answer is the same as without drafts, seed for seed:
    the draft token is accepted with its probability, and a token that differs from it follows the
    distribution of the others.

    Args:
        logits: one row per sequence, and one more per draft token.
        scheduled: the sequences that are sampled.
    """
    sampler = Sampler(logits)
    failures: dict[Sequence, Exception] = {}
    starts = accumulate((1 + len(one.draft) for one in scheduled), initial=0)
    rows = [(start, one) for start, one in zip(starts, scheduled, strict=False)]
    sampler.constrain(
        [(at, one.sequence.sampling, one.draft) for at, one in rows if one.sequence.sampling]
    )
    for start, one in rows:
        try:
            _sample_one(sampler, one, start)
        except Exception as error:  # noqa: BLE001  NaN logits or a tokenizer fail one request alone
            failures[one.sequence] = error
    return failures


def _sampling_failure(error: Exception) -> LapilliError:
    """Return the error of a request that has no next token: its grammar's, or the model's."""
    if isinstance(error, GrammarError):
        return error
    return ModelFailedError(f"no token can be chosen: {error}")


def _sample_one(sampler: Sampler, one: ScheduledSequence, start: int) -> None:
    """Add the tokens of one sequence, whose logits begin at row `start`."""
    sequence = one.sequence
    state = sequence.sampling
    if state is None:
        raise RuntimeError("a sequence was scheduled before it was admitted")
    sequence.is_open = True  # until EngineCore._deliver
    for row, draft_token in enumerate((*one.draft, None), start):
        token_id, report = sampler.sample(row, state)
        sequence.push(token_id, report)
        if token_id != draft_token or sequence.answer.is_finished:
            break

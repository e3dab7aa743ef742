"""Engine with continuous batching: requests join and leave between steps, one pass for all.

    submit -> waiting --admit: blocks for prompt and longest answer--> running --step--> answers
    step       schedule -> run the model -> sample -> deliver

EngineCore takes the steps: all of it runs in the thread that holds the model's lock and calls no
callbacks. Handles with something to tell are noted in `news`, and their readers are woken after the
lock is released. A KeyboardInterrupt may end any line; `settle` restores a consistent state after
one. Engine is the interface for any number of threads.

Knows prompts as ids and spans, media as items that a modality embeds; must not know templates,
files or conversations.
"""

from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import suppress
from itertools import accumulate, islice
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import nn

from lapilli.config.generation import EngineOptions
from lapilli.errors import GenerationError, LapilliError, UnsupportedModelError
from lapilli.generate.engine.block_pool import BlockPool, PrefixStats, new_pool
from lapilli.generate.engine.feature_cache import FeatureCache, WeightWatch
from lapilli.generate.engine.model_runner import MediaEncoder, ModelRunner
from lapilli.generate.engine.prefix_file import (
    model_digest,
    place_prefix,
    read_prefix,
    write_prefix,
)
from lapilli.generate.engine.request import EngineStream, Request, RequestHandle, wake_all
from lapilli.generate.engine.scheduler import Scheduler, root_digest
from lapilli.generate.engine.sequence import InputProcessor, ScheduledSequence, Sequence
from lapilli.generate.output import Generation, TokenBytes
from lapilli.generate.reference import lock_of
from lapilli.generate.sampler import Sampler
from lapilli.generate.speculative import DraftModel, NewProposer, PromptLookup
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
            self.abort_all(GenerationError(f"the engine failed: {error}"))
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
            logits = self.runner.execute_model(scheduled, unchanged=self._watch.token)
            if logits is not None:
                failures = sample(logits, [one for one in scheduled if one.is_sampled])
        except Exception as error:
            failure = GenerationError(f"the model failed: {error}")
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
                self._fail(row, GenerationError(f"no token can be chosen: {failures[row]}"))
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


T = TypeVar("T")


class Engine:
    """Continuous-batching engine.

    Every method may be called from any thread at any time: one thread at a time runs the model
    (generate/reference.py), and a step serves the requests of all. An invalid request is refused by
    `submit`, in its caller alone.

    A KeyboardInterrupt may come anywhere. Requests that were not being changed at that moment go
    on with the next step, and all blocks are freed.

    Args:
        model: with a language model of lapilli's own.
        tokenizer: turns ids into text.
        eos_ids: end tokens; None: the tokenizer's.
        context_length: most tokens of prompt and answer, where the options do not say fewer; None:
            what the language model reads.
        options: limits.
        proposer: makes what proposes draft tokens; None: prompt lookup.
        features: cache of the features of media, where others use it too; None: one of its own.

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
        proposer: NewProposer | None = None,
        features: FeatureCache | None = None,
    ) -> None:
        language_model = model.language_model
        if not language_model.supports_varlen:
            raise UnsupportedModelError(
                f"{type(language_model).__name__} reads rows of one length only, the engine needs "
                "a language model of lapilli's own: use generate()"
            )
        if isinstance(proposer, DraftModel):
            proposer.check_vocabulary(language_model.config.vocab_size)
        self.model = model
        self.options = options or EngineOptions()
        lengths = (context_length, self.options.context_length)
        wanted = min((one for one in lengths if one is not None), default=None)
        self.context_length = readable_context(model, wanted)
        like = language_model.embed(torch.zeros(1, dtype=torch.long, device=model.device))
        self.pool = new_pool(model, self.options, context_length=self.context_length, like=like)
        self.features = features or FeatureCache(self.options.feature_bytes)
        self._inputs = InputProcessor(
            model, tokenizer, eos_ids=eos_ids, context_length=self.context_length, pool=self.pool
        )
        self.scheduler = Scheduler(
            self.pool,
            MediaEncoder(model, self.features),
            self.options,
            vocab_size=language_model.config.vocab_size,
            new_proposer=proposer or PromptLookup,
        )
        self._runner = ModelRunner(
            model, self.pool.store, self.options, context_length=self.context_length
        )
        self._core = EngineCore(model, self._runner, self.scheduler, self.pool, self.features)
        self._lock = lock_of(language_model)
        self._held_by: object | None = None
        """The lock under which work goes on; seen by the thread that holds it only."""
        self._is_broken_off = False
        """True while work goes on, and after an interrupt ended it."""

    @property
    def prefix_stats(self) -> PrefixStats:
        """Counts of prompt tokens, and of those found in the prefix cache."""
        return self.pool.stats

    @property
    def has_work(self) -> bool:
        """True while a step would do something."""
        return self.scheduler.has_work

    @property
    def num_waiting(self) -> int:
        """Requests that no block is reserved for yet."""
        return self.scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests with reserved blocks."""
        return len(self.scheduler.running)

    def submit(self, request: Request, *, handle: RequestHandle | None = None) -> RequestHandle:
        """Submit a request, which is answered by the steps that any thread takes.

        Args:
            request: what to answer.
            handle: made before, to set its `wake`.

        Raises:
            ContextTooLongError: the prompt leaves no room for a single token.
            MediaCountMismatchError: another number of media than of spans.
            FusionError: a medium that does not fit its span.
            UnsupportedModelError: a modality that the model does not have.
            RequestError: ids, spans or options that the model cannot work with.
            GrammarError: a grammar that cannot be followed, or llguidance is not installed.
            GenerationError: beams, no tokens, too large for the memory, or too many wait already.
        """
        handle = handle or RequestHandle(request)
        sequence = self._inputs.new_sequence(request, handle)
        if not self.scheduler.enter(sequence):
            raise GenerationError(
                f"{self.num_waiting} requests are waiting, the limit: try again later, or set "
                "EngineOptions(max_waiting=...)"
            )
        return handle

    def queue(self, request: Request, *, handle: RequestHandle) -> None:
        """Submit a request, working until there is room where too many wait already."""
        sequence = self._inputs.new_sequence(request, handle)
        while not self.scheduler.enter(sequence):
            self.work(lambda: self.num_waiting < self.options.max_waiting)

    def run(self, requests: Iterable[Request]) -> list[Generation]:
        """Return the answers to all requests, in their order.

        Raises:
            LapilliError: the first request that cannot be answered; the others are cancelled.
        """
        handles: list[RequestHandle] = []
        try:
            for request in requests:
                handles.append(RequestHandle(request))
                self.queue(request, handle=handles[-1])
            for handle in handles:
                while not handle.is_finished:
                    self.work(lambda: handle.is_finished)  # noqa: B023  called at once
            return [handle.generation for handle in handles]
        finally:
            self.abort(handles)

    def as_completed(
        self, requests: Iterable[Request]
    ) -> Iterator[tuple[int, Generation | LapilliError]]:
        """Yield number and answer of every request as it is finished; errors are handed out too.

        Requests are taken from the iterable when there is room: it may be long, or made meanwhile.
        """
        source = enumerate(requests)
        handles: dict[int, RequestHandle] = {}
        try:
            while True:
                for number, request in islice(source, 2 * self.options.max_rows - len(handles)):
                    handle = handles[number] = RequestHandle(request)
                    try:
                        self.queue(request, handle=handle)
                    except LapilliError as error:
                        handle.fail(error)
                if not handles:
                    return
                self.work(lambda: any(handle.is_finished for handle in handles.values()))
                for number, handle in list(handles.items()):
                    if handle.is_finished:
                        del handles[number]
                        yield number, handle.error or handle.generation
        finally:
            self.abort(handles.values())

    def stream(self, request: Request) -> EngineStream:
        """Return one answer as an iterator of pieces, while other requests go on too."""
        return EngineStream(self, request)

    def step(self) -> bool:
        """Run the model once for all requests; return False when there is nothing more to do.

        Readers with news are woken afterwards, when the engine is free again.

        Raises:
            RuntimeError: the model failed (out of memory, for instance). All requests of the step
                have failed with it; the engine can go on.
        """
        self._do(self._core.step, alone=True)
        return self.has_work

    def work(self, until: Callable[[], bool]) -> None:
        """Take a step, unless another thread's steps have made `until` true meanwhile.

        Errors of the step are in the handles that it failed and are not raised here.

        Raises:
            GenerationError: called from within a step, which would wait for itself.
        """
        asked: list[bool] = []

        def step() -> None:
            asked.append(until())
            if not asked[-1]:
                self._core.step()

        with suppress(Exception):  # the handles have it
            self._do(step, alone=True)
        if not asked:
            raise GenerationError(
                "this engine is in the middle of a step: what a step calls cannot wait for an "
                "answer of the same engine"
            )

    def abort_all(
        self, error: LapilliError, handles: Iterable[RequestHandle] | None = None
    ) -> None:
        """Fail requests that are not finished: those of `handles`, or all."""
        meant = None if handles is None else set(handles)
        self._do(lambda: self._core.abort_all(error, meant))

    def abort(self, handles: Iterable[RequestHandle]) -> None:
        """Cancel the requests that are not finished."""
        open_handles = [handle for handle in handles if not handle.is_finished]
        try:
            for handle in open_handles:
                handle.cancel()
        except BaseException:  # an interrupt must not leave some of them running
            for handle in open_handles:
                handle.cancel()
            raise
        if open_handles:
            self._do(self._core.drop_cancelled, alone=True)

    def save_prefix(self, path: Path, keys: Items[int]) -> int:
        """Save the cached keys and values of a sequence; return the number of its tokens.

        Args:
            path: of a new safetensors file.
            keys: `RequestHandle.keys` of a finished request.

        Raises:
            CheckpointError: none of them is cached any more.
        """
        probe = [*keys, 0]  # the last position is never looked up

        def save() -> int:
            known = self.pool.find(self.pool.chain(self._core.root(), probe), probe)
            return write_prefix(path, self.pool, known, keys, model_digest(self.model))

        return self._do(save)

    def load_prefix(self, path: Path) -> int:
        """Load saved keys and values into the prefix cache; return the number of their tokens.

        Raises:
            MissingFileError: there is no such file.
            CheckpointError: it is of another model, or larger than the memory.
        """

        def load() -> int:
            saved = read_prefix(path, self.pool, model_digest(self.model))
            return place_prefix(saved, self.pool, self._core.root())

        return self._do(load)

    def reset_cache(self) -> None:
        """Clear prefix and feature caches; call after changes that torch does not count.

        Those are in-place changes through `tensor.data` and under `torch.inference_mode()`.
        """
        self._do(self._core.reset_cache)

    def _do(self, work: Callable[[], T], *, alone: bool = False) -> T:
        """Call `work` while this thread holds the model's lock, then wake readers with news.

        With alone=True nothing is done where this thread is in the middle of other work here: the
        garbage collector may close a stream in any line.
        """
        news: deque[RequestHandle] = deque()
        try:
            with self._lock.turn:
                if self._held_by is self._lock.turn:
                    return None if alone else work()  # type: ignore[return-value]  # alone: T is None
                try:
                    self._held_by = self._lock.turn
                    self._core.news = news
                    if self._is_broken_off:
                        self._core.settle()
                    self._is_broken_off = True
                    done = work()
                    self._is_broken_off = False
                    return done
                finally:
                    self._held_by = None
        finally:
            wake_all(news)


def readable_context(model: VisionLanguageModel, wanted: int | None) -> int:
    """Return the most tokens of a sequence in the engine.

    Note: with dynamic NTK scaling the rotation of the keys depends on the length of the pass, so
    beyond the trained length the result would depend on the chunks of a prompt; there the limit is
    the trained length.
    """
    config = model.language_model.config
    length = config.max_positions if wanted is None else wanted
    scaling = getattr(config, "rope_scaling", None)
    if scaling is not None and scaling.kind == "dynamic":
        return min(length, config.max_positions)
    return length

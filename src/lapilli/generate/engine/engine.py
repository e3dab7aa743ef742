"""Engine with continuous batching: requests join and leave between steps, one pass for all.

    submit -> waiting --admit: blocks for prompt and longest answer--> running --step--> answers
    step       schedule -> run the model -> sample -> deliver

EngineCore (core.py) takes the steps. Engine is the interface for any number of threads, one of
which holds the model's lock and takes a step for all.

Knows prompts as ids and spans, media as items that a modality embeds; must not know templates,
files or conversations.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

from lapilli.config.generation import EngineOptions
from lapilli.errors import BusyError, GenerationError, LapilliError, UnsupportedModelError
from lapilli.generate.engine.block_pool import PrefixStats, new_pool
from lapilli.generate.engine.core import EngineCore
from lapilli.generate.engine.feature_cache import FeatureCache
from lapilli.generate.engine.model_runner import MediaEncoder, ModelRunner
from lapilli.generate.engine.prefix_file import (
    model_digest,
    place_prefix,
    read_prefix,
    write_prefix,
)
from lapilli.generate.engine.request import EngineStream, Request, RequestHandle, wake_all
from lapilli.generate.engine.scheduler import Scheduler
from lapilli.generate.engine.sequence import InputProcessor
from lapilli.generate.output import Generation, TokenBytes
from lapilli.generate.reference import lock_of
from lapilli.generate.speculative import DraftModel, NewProposer, PromptLookup
from lapilli.model import VisionLanguageModel

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
            GenerationError: beams, no tokens, or too large for the memory.
            BusyError: too many wait already.
        """
        handle = handle or RequestHandle(request)
        sequence = self._inputs.new_sequence(request, handle)
        if not self.scheduler.enter(sequence):
            raise BusyError(
                f"{self.num_waiting} requests are waiting, the limit (max_waiting): try again later"
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

"""Request of an engine, the handle by which its answer is read or cancelled, and its stream.

    Request --Engine.submit--> RequestHandle: take() the pieces, cancel(), generation

Knows no model.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lapilli.config.generation import SamplingParams
from lapilli.errors import LapilliError, RequestError
from lapilli.generate.output import Generation, Piece
from lapilli.prompt.encode import EncodedPrompt

if TYPE_CHECKING:  # the engine makes the streams
    from lapilli.generate.engine.engine import Engine

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to answer it.

    Attributes:
        prompt: ids and spans.
        media: per span what its modality prepared, or features [n, D].
        params: how to sample tokens and when to stop; no beams.
        seen_ids: tokens that the repetition penalty counts as seen, see reference.generate.
        priority: a higher one is begun and read before all lower ones.
    """

    prompt: EncodedPrompt
    media: tuple[Any, ...] = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    seen_ids: Sequence[int] | None = None
    priority: int = 0


class RequestHandle:
    """A submitted request, written by the engine and read by one reader, in any threads.

    A slow reader makes no queue grow: all text since its last `take` is one piece.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.is_cancelled = False
        self.wake: Callable[[], None] = lambda: None
        """Called when there is something to take, by a thread that has taken a step and released
        the engine, so it may use the engine. Exceptions are logged."""
        self.keys: tuple[int, ...] = ()
        """Position keys of the computed tokens, once it is finished (Engine.save_prefix)."""
        self.cached_tokens = 0
        """Tokens of the prompt that the prefix cache had."""
        self.admitted_at: float | None = None
        """When its blocks were reserved, of `time.monotonic`."""
        self._lock = threading.Lock()
        self._is_submitted = False
        self._waiting: list[Piece] = []
        self._generation: Generation | None = None
        self.error: LapilliError | None = None
        """The reason why there is no answer."""

    def cancel(self) -> None:
        """Stop at the next step; the answer is the text generated until then."""
        self.is_cancelled = True

    @property
    def is_finished(self) -> bool:
        """True once nothing more comes, after an error too."""
        return self._generation is not None or self.error is not None

    @property
    def has_news(self) -> bool:
        """True while `take` returns a piece, or the request is finished."""
        return bool(self._waiting) or self.is_finished

    @property
    def generation(self) -> Generation:
        """The finished answer.

        Raises:
            LapilliError: the request failed.
            RuntimeError: it is not finished.
        """
        if self.error is not None:
            raise self.error
        if self._generation is None:
            raise RuntimeError("this request is not finished")
        return self._generation

    def take(self) -> Piece | None:
        """Return the text since the last call as one piece; None while there is none.

        Raises:
            LapilliError: the request failed.
        """
        with self._lock:
            pieces, self._waiting = self._waiting, []
        if not pieces:
            if self.error is not None:
                raise self.error
            return None
        return Piece(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.token_ids),
            pieces[-1].finish_reason,
            tuple(report for piece in pieces for report in piece.logprobs),
        )

    def claim(self) -> None:
        """Mark it as submitted; called by the engine that takes it.

        Raises:
            RequestError: it was submitted before.
        """
        with self._lock:
            if self._is_submitted or self.is_finished:
                raise RequestError(
                    "this request handle was submitted before: make a new one for every request"
                )
            self._is_submitted = True

    def deliver(self, piece: Piece) -> None:
        """Add a piece; called by the engine, which wakes the reader after the step."""
        with self._lock:
            self._waiting.append(piece)

    def finish(self, generation: Generation) -> None:
        """End with an answer; called by the engine."""
        self._generation = generation

    def fail(self, error: LapilliError) -> None:
        """End without an answer; called by the engine."""
        self.error = error


class EngineStream(Iterator[Piece]):
    """The answer to one request, pulled piece by piece; the engine works when a piece is wanted.

    The request is submitted when the first piece is asked for. `close` cancels. The twin of
    reference.Stream.
    """

    def __init__(self, engine: "Engine", request: Request) -> None:
        self.handle = RequestHandle(request)
        self._engine = engine
        self._is_submitted = False

    def __next__(self) -> Piece:
        """Return the next piece.

        Raises:
            LapilliError: the request is invalid or failed.
        """
        if not self._is_submitted:
            self._is_submitted = True  # first, so that `close` aborts it after an interrupt
            self._engine.submit(self.handle.request, handle=self.handle)
        while True:
            is_finished = self.handle.is_finished  # asked first: a piece may come between
            piece = self.handle.take()
            if piece is not None:
                return piece
            if is_finished:
                raise StopIteration
            self._engine.work(lambda: self.handle.has_news)

    def close(self) -> None:
        """Cancel the rest of the answer."""
        self.handle.cancel()
        if self._is_submitted and not self.handle.is_finished:
            self._engine.abort([self.handle])

    @property
    def generation(self) -> Generation:
        """The answer so far; asked before its end, the answer is cancelled.

        Raises:
            LapilliError: the request failed.
            RuntimeError: it was never submitted.
        """
        self.close()
        return self.handle.generation


def wake_all(handles: deque[RequestHandle]) -> None:
    """Wake the readers of all handles and empty the list, whatever some of them raise.

    After an interrupt the remaining ones are woken too: no reader may wait for ever.
    """
    try:
        while handles:
            try:
                _wake(handles[0])
            finally:
                handles.popleft()
    finally:
        if handles:
            wake_all(handles)


def _wake(handle: RequestHandle) -> None:
    try:
        handle.wake()
    except Exception:  # a callback may be any code; its error concerns no other request
        LOG.exception("RequestHandle.wake raised; the engine goes on")

"""Service: the internal request of all protocols, and how it is answered.

    ChatRequest --worker thread: media, template, tokens--> n requests of the engine -> Answers

Knows the model and its engine; must not know protocols.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from lapilli.config.generation import SamplingParams
from lapilli.errors import (
    ClosedError,
    ContextTooLongError,
    MediaCountMismatchError,
    UnsupportedModelError,
)
from lapilli.generate.engine.async_engine import AsyncAnswer, AsyncEngine
from lapilli.generate.engine.request import Request
from lapilli.generate.grammar import compiled
from lapilli.generate.output import Generation
from lapilli.generate.reference import check_context
from lapilli.pipeline import Chat
from lapilli.prompt.encode import EncodedPrompt, encode
from lapilli.prompt.message import MediaPart, Message, TextPart, joined
from lapilli.prompt.template import MediaSlot, Segment, TextSegment
from lapilli.serve.answers import Answers, Usage
from lapilli.serve.connection import STOPPING, close_at_end
from lapilli.serve.errors import ApiError, invalid
from lapilli.serve.files import Files
from lapilli.serve.media import MediaReader, Part
from lapilli.serve.metrics import Metrics
from lapilli.serve.options import ServeOptions
from lapilli.serve.pool import Pool

T = TypeVar("T")

CLOSE_SECONDS: Final = 2.0
"""How long the end waits for the step that the engine is in."""

PLACE: Final = "<image>"
"""Where a picture stands in a prompt without a conversation."""

LONGEST_TOKEN: Final = 256
"""Letters of a token; the longest ones of known vocabularies have half as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a request, its pictures not opened yet."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What every protocol's request for an answer becomes.

    Attributes:
        turns: the conversation.
        prompt: in place of a conversation a text, or tokens, that the model goes on with as it is.
        media: of a prompt that is a text, one for each `<image>` in it.
        params: how to sample; `max_new_tokens` counts if `has_limit`.
        has_limit: whether the client named a longest answer.
        choices: answers to the same prompt.
        owner: whose key it came with.
    """

    turns: tuple[Turn, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    media: tuple[dict[str, Any], ...] = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    has_limit: bool = False
    choices: int = 1
    owner: str = "anyone"


class Service:
    """One model, as all routes use it.

    Args:
        chat: the model.
        options: limits, and what the model is called.

    Raises:
        UnsupportedModelError: a language model of another library, which has no engine.
    """

    def __init__(self, chat: Chat, options: ServeOptions) -> None:
        if not chat.model.language_model.supports_varlen:
            raise UnsupportedModelError(
                f"{chat.name}: its language model is one of another library, which the engine "
                "cannot run: a server needs one of lapilli's own"
            )
        self.chat = chat
        self.options = options
        self.model_name = options.model_name or chat.name
        self.created = int(time.time())
        self.files = Files(options.limits.upload_bytes)
        self.media = MediaReader(chat, options, self.files)
        self.engine = AsyncEngine(chat.engine)
        self.metrics = Metrics(self)
        self.is_stopping = False
        self._is_closed = False
        limits = options.limits
        self._readers = Pool("reader", limits.workers, limits.waiting, self._check_text)
        self._scorers = Pool("scorer", 1, limits.waiting, self._check_text)

    async def read(self, function: Callable[..., T], *args: object) -> T:
        """Run a function that fetches, decodes or tokenizes, in a worker thread.

        Every text that it tokenizes is checked before, see `_check_text`: so routes tokenize here,
        or in `compute`.
        """
        return await self._readers.run(function, *args)

    async def compute(self, function: Callable[..., T], *args: object) -> T:
        """Run a function that uses the model by itself, between steps of the engine."""
        return await self._scorers.run(function, *args)

    @property
    def num_running(self) -> int:
        """Number of requests that the engine works on, or the thread of scores and embeddings."""
        return self.chat.engine.num_running + self._scorers.num_running

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for a thread, or for blocks of the engine."""
        pools = self._readers.num_waiting + self._scorers.num_waiting
        return self.chat.engine.num_waiting + pools

    async def check_picture(self, data: bytes, owner: str) -> None:
        """Decode a picture, and keep it prepared; raises what `MediaReader.picture` does."""
        await self.read(lambda: self.media.picture(data, owner=owner))

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: 404 with the name of the model that there is.
        """
        if name not in (None, "", self.model_name, f"{self.model_name}:latest", "default"):
            raise ApiError(
                404,
                f"the model {name!r} does not exist: this server has {self.model_name!r}",
                "model_not_found",
                "model",
            )

    async def open(self, request: ChatRequest) -> Answers:
        """Read a request and submit it; what is wrong with it is raised here, not later.

        Raises:
            ApiError: more choices than the server makes.
            ClosedError: the server is stopping.
            LapilliError: a medium, the conversation or the options.
        """
        started = time.monotonic()
        self.check_open()
        most = self.options.limits.choices
        if not 1 <= request.choices <= most:
            raise invalid(f"n must be from 1 to {most}, got {request.choices}", "n")
        asked = await self.read(self.prepare, request)
        answers: list[AsyncAnswer | Generation] = []
        found = Answers(answers, started, prompt_usage(asked[0]), self.metrics.count)
        close_at_end(found.close)  # also where nobody comes to read it
        try:
            for one in asked:
                if isinstance(one, Request):
                    answers.append(await self.engine.open(one, wait=False))
                else:
                    answers.append(one)
        except BaseException:
            found.close()
            raise
        return found

    async def count(self, request: ChatRequest) -> int:
        """Return the number of tokens of a prompt, as `Usage.prompt` has it; nothing is generated.

        Raises:
            LapilliError: a medium or the conversation.
        """
        self.check_open()
        asked = await self.read(
            lambda: self.chat.request(self.messages(request.turns, request.owner), request.params)
        )
        return prompt_usage(asked).prompt

    def check_open(self) -> None:
        """Refuse new work while the server stops.

        Raises:
            ClosedError: it does.
        """
        if self.is_stopping:
            raise ClosedError(STOPPING)

    def messages(self, turns: Sequence[Turn], owner: str) -> list[Message]:
        """Return turns as messages, their pictures opened; called in a worker thread.

        Instructions that come later join those at the beginning, and neighbouring turns of one
        speaker are one message, since templates know no others.
        """
        parts = [part for turn in turns for part in turn.parts]
        self.media.check_count(sum(not isinstance(part, str) for part in parts))
        system = [part for turn in turns if turn.role == "system" for part in turn.parts]
        if not all(isinstance(part, str) for part in system):
            raise invalid("the instructions hold a picture: show it in a message of the user")
        found = [(turn.role, self.media.opened(turn.parts, owner)) for turn in turns]
        self._check_length(
            sum(len(part) for _, parts in found for part in parts if isinstance(part, str))
        )
        return joined(Message(role, text_and_media(parts)) for role, parts in found)

    def prepare(self, request: ChatRequest) -> Sequence[Request | Generation]:
        """Return the engine's requests of all choices; called in a worker thread."""
        chat, params = self.chat, request.params
        # A form that cannot be followed is found before a picture is fetched.
        compiled(params.grammar, chat.tokenizer, chat.model.language_model.config.vocab_size)
        first = self._continued(request, params) or chat.request(
            self.messages(request.turns, request.owner), params
        )
        if isinstance(first, Generation):
            return [first] * request.choices
        prompt, visual = first.prompt, sum(span.length for span in first.prompt.spans)
        room = check_context(len(prompt.input_ids), chat.context_length, visual=visual)
        wanted = first.params.max_new_tokens
        if request.has_limit and wanted > room:
            raise ContextTooLongError(
                f"the prompt has {len(first.prompt.input_ids)} tokens and the answer may have "
                f"{wanted}, the context holds {chat.context_length}: ask for at most {room}"
            )
        first = replace(first, params=first.params.updated(max_new_tokens=min(wanted, room)))
        seed = first.params.seed
        return [first] + [
            replace(
                first,
                params=first.params.updated(
                    seed=None if seed is None else (seed + number) % (1 << 64)
                ),
            )
            for number in range(1, request.choices)
        ]

    def _check_text(self, text: str, letters: int) -> None:
        """Check a text of a request before it is cut into tokens, which takes its time.

        The one way of texts to the tokenizer: no route can forget it.

        Args:
            text: about to be tokenized.
            letters: of the texts that this piece of work tokenized before.

        Raises:
            ContextTooLongError: more letters than a context of long tokens has.
            ApiError: 413, more letters in all texts together than one request may have.
        """
        self._check_length(len(text))
        most = self.options.limits.letters
        if letters + len(text) > most:
            raise ApiError(
                413,
                f"the request has more than {most} letters in all its texts together, the limit: "
                "send them in several requests",
                "too_large",
            )

    def check_tokens(self, count: int, where: str) -> None:
        """Refuse more tokens than the model reads, before anything is done with them.

        Raises:
            ContextTooLongError: there are.
        """
        most = self.chat.context_length
        if count > most:
            raise ContextTooLongError(
                f"{where} has {count} tokens, more than the {most} that the model reads: send less"
            )

    def _check_length(self, letters: int) -> None:
        """Refuse a text that cannot fit.

        Raises:
            ContextTooLongError: more letters than a context of long tokens has.
        """
        most = LONGEST_TOKEN * self.chat.context_length
        if letters > most:
            raise ContextTooLongError(
                f"the request has {letters} letters of text, more than the {most} that "
                f"{self.chat.context_length} tokens may stand for: send less"
            )

    def _continued(self, request: ChatRequest, params: SamplingParams) -> Request | None:
        """Return the engine's request of a prompt without a conversation.

        Raises:
            MediaCountMismatchError: other numbers of pictures than of places for them.
        """
        prompt, chat = request.prompt, self.chat
        if prompt is None:
            return None
        if not isinstance(prompt, str):
            self.check_tokens(len(prompt), "prompt")
            return Request(EncodedPrompt(list(prompt), [False] * len(prompt)), params=params)
        if not request.media:
            ids = chat.tokenizer.encode(prompt)
            return Request(EncodedPrompt(ids, [False] * len(ids)), params=params)
        self._check_length(len(prompt))
        first, *texts = prompt.split(PLACE)
        if len(texts) != len(request.media):
            raise MediaCountMismatchError(
                f"the prompt has {len(texts)} {PLACE} but {len(request.media)} pictures were given"
            )
        items = [chat.prepare(self.media.part(one, request.owner)) for one in request.media]
        segments: list[Segment] = [TextSegment(first)]
        for text in texts:
            segments += [MediaSlot(), TextSegment(text)]
        lengths = [chat.model.span_length("image", item) for item in items]
        image_id = chat.config.tokens.image_id
        encoded = encode(segments, chat.tokenizer, lengths, image_id=image_id)
        return Request(encoded, tuple(items), params)

    async def close(self) -> None:
        """End the engine and the threads; what runs fails, and its clients are told.

        A step of a large model may take longer than `CLOSE_SECONDS`: then it is left alone.
        """
        is_first, self.is_stopping = not self._is_closed, True
        self._is_closed = True
        self._readers.close()
        self._scorers.close()
        if is_first:
            closing = Pool("closer", 1, 1, self._check_text)
            with suppress(TimeoutError):
                await asyncio.wait_for(closing.run(self.engine.close, STOPPING), CLOSE_SECONDS)
            closing.close()


def prompt_usage(asked: Request | Generation) -> Usage:
    """Return the counts of a prompt, before an answer is there."""
    if isinstance(asked, Generation):
        return Usage(prompt=asked.prompt_len)
    visual = sum(span.length for span in asked.prompt.spans)
    return Usage(prompt=len(asked.prompt.input_ids), visual=visual)


def text_and_media(parts: Sequence[str | MediaPart]) -> tuple[TextPart | MediaPart, ...]:
    """Return the parts of a message."""
    return tuple(TextPart(part) if isinstance(part, str) else part for part in parts)

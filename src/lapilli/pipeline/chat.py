"""`load(source) -> Chat`: the order of the walk, and the conversation.

Knows who is asked when; must not know how files look, how pixels are computed or how tokens are
chosen.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from lapilli.checkpoint.load import Loaded, load_checkpoint
from lapilli.checkpoint.out_of_distribution import load_detector
from lapilli.checkpoint.read.assemble import LoadReport, Progress
from lapilli.config.generation import SamplingParams
from lapilli.config.model import ModelConfig
from lapilli.errors import CheckpointError, LapilliError, PromptError
from lapilli.generate.engine import Engine, EngineOptions
from lapilli.generate.output import Generation
from lapilli.generate.reference import check_context
from lapilli.media.fetch import FetchLimits
from lapilli.modality.image.decode import Alpha, check_alpha
from lapilli.model.vlm import VisionLanguageModel
from lapilli.pipeline.answering import Answering, Reply
from lapilli.pipeline.conversation import Conversation, Turn
from lapilli.pipeline.memory import Memory
from lapilli.pipeline.ready import ReadyPrompt, make_ready, prepare
from lapilli.prompt.choose import Template
from lapilli.prompt.message import MediaPart, Message
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.quant import QuantConfig


def load(
    source: str,
    *,
    base: str | None = None,
    adapter: str | None = None,
    template: str | Template | None = None,
    device: str = "auto",
    dtype: str = "auto",
    strict_config: bool = False,
    merge_lora: bool = True,
    progress: Progress | None = None,
    quantize: str | QuantConfig | None = None,
    quantize_tower: bool = False,
    engine: EngineOptions | None = None,
    prefix: str | Path | None = None,
    alpha: Alpha = "drop",
) -> "Chat":
    """A checkpoint, ready to answer.

    Args:
        source: a directory, a hub id, or "pebble".
        base: the language model under a LoRA or a projector; None: what the checkpoint names.
        adapter: a LoRA to lay over the checkpoint.
        template: a name from `lapilli.prompt.templates.TEMPLATES`, "chat_template" for the
            checkpoint's own, or a template of yours; None: what the checkpoint asks for.
        device: "cpu", "cuda", "cuda:1", "mps"; "auto" takes a GPU where there is one.
        dtype: "float32", "bfloat16", "float16"; "auto" takes what suits device and checkpoint.
        strict_config: raise where config.json has a key that nothing reads.
        merge_lora: fold a LoRA into the weights; False keeps it beside them.
        progress: called while the weights are read, with bytes done and bytes in all.
        quantize: "int8" or "int4" packs the language model while it is read (see
            docs/guide/quantize.md); None: as the files are.
        quantize_tower: pack the vision tower and the projector too, in 8 bits.
        engine: limits of what is kept and done at the same time, and whether to guess ahead.
        prefix: a file from `Chat.save_prefix`: what begins like that is not read again.
        alpha: "drop" shows the colours that lie under the transparency of a picture, as the
            original does; "composite" lays the picture on white, as people see it.

    Raises:
        CheckpointError: the files are not usable.
        ConfigError: the configuration cannot be followed.
        PromptError: no template has this name.
    """
    check_alpha(alpha)
    loaded = load_checkpoint(
        source,
        base=base,
        adapter=adapter,
        template=template,
        device=device,
        dtype=dtype,
        strict_config=strict_config,
        merge_lora=merge_lora,
        progress=progress,
        quantization=quantize,
        quantize_tower=quantize_tower,
    )
    chat = Chat(loaded, name=str(source), engine=engine)
    chat.alpha = alpha
    if prefix is not None:
        chat.load_prefix(prefix)
    return chat


class Chat:
    """A model, and the conversation with it.

    Any number of threads may use one: the model is run by one of them at a time. `ask` and `stream`
    are turns of the one conversation and follow each other; `answer`, `batch`, `ask_many` and
    `as_completed` leave it alone and are answered side by side.

    Pictures may be paths, URLs, data URIs, "-" (standard input), bytes, Pillow images, arrays, or
    in place of a picture its features: a floating point tensor [n, width of the language model],
    or [n, width of the tower], which goes through the projector and is laid down as it is.
    """

    def __init__(
        self, loaded: Loaded, *, name: str = "", engine: EngineOptions | None = None
    ) -> None:
        self._loaded = loaded
        vision = loaded.config.vision
        width = None if vision is None else vision.hidden_size
        self._detector = load_detector(loaded.path, width=width)
        without = "" if self._detector is None else self._detector.without_picture
        self._answering = Answering(loaded, engine, without)
        self._turns = threading.RLock()
        self._numbers = count(1)
        self._adopting = threading.Lock()
        self._conversation = Conversation()
        self.name = name or loaded.path.name
        self.template: Template = loaded.template.template
        self.limits = FetchLimits()
        self.alpha: Alpha = "drop"
        """What becomes of the transparency of pictures, see `load`."""
        self.system: str | None = None
        """Instructions in place of the template's own; counted from the next question on."""
        self._last_keys: tuple[int, ...] = ()
        self._last_media: tuple[Any, ...] = ()
        self.last: Generation | None = None
        """The latest answer of `ask` or `stream` in full: tokens, finish reason, logprobs."""

    @property
    def model(self) -> VisionLanguageModel:
        """The model."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self._loaded.tokenizer

    @property
    def engine(self) -> Engine:
        """What answers: all methods share what it keeps. Made when it is first needed.

        Raises:
            UnsupportedModelError: the language model is one of another library; Chat then answers
                without the engine.
        """
        return self._answering.engine

    @property
    def config(self) -> ModelConfig:
        """What the checkpoint is."""
        return self._loaded.config

    @property
    def report(self) -> LoadReport:
        """What became of every tensor in the files."""
        return self._loaded.report

    @property
    def history(self) -> tuple[Message, ...]:
        """Questions and answers so far, without the system message."""
        return self._conversation.history

    def reset(self) -> None:
        """Forget the conversation.

        What the engine keeps by content stays, so a picture that comes again is not read again;
        `chat.engine.reset_cache()` lets go of that too. An answer that is on its way in another
        thread goes on; it belongs to the conversation that is forgotten.
        """
        with self._adopting:
            self._conversation = Conversation(next(self._numbers))
            self._last_keys, self._last_media, self.last = (), (), None

    def ask(self, question: str, *images: object, keep: bool = False, **sampling: object) -> str:
        """The answer, without white space around it.

        Args:
            question: anything; an `<image>` in it stays text.
            images: stand before the question. With images a new conversation begins, without any
                the question follows the one before, whose images are not encoded again.
            keep: the images join the running conversation.
            sampling: fields of SamplingParams.

        Raises:
            PromptError: the question is empty.
            MediaError: an image cannot be fetched or decoded.
            ContextTooLongError: the conversation leaves no room for an answer.
        """
        with self._turns:
            return "".join(self.stream(question, *images, keep=keep, **sampling)).strip()

    def stream(
        self,
        question: str,
        *images: object,
        keep: bool = False,
        **sampling: object,
    ) -> Turn:
        """The answer of `ask`, in pieces as it settles.

        Closing the iterator stops the answer; what was said of it is kept. The question follows the
        history as it is now, and joins it with its answer when that is over.
        """
        if not question.strip():
            raise PromptError("the question is empty: ask something")
        params = self._params(SamplingParams.from_options(**sampling))
        with self._turns:
            begins = bool(images) and not keep
            talk = Conversation(next(self._numbers)) if begins else self._conversation
            messages = (*talk.history, Message.user(question, *images))
            prompt = self._ready(self._with_system(messages), talk.memory)
            media = [part for message in messages for part in message.media]
            new = prompt.media[len(media) - len(messages[-1].media) :]
            return Turn(
                lambda: self._answering.start(prompt, media, talk.memory, params),
                lambda reply, is_whole: self._remember(
                    messages[-1], new, talk, reply, is_whole=is_whole
                ),
            )

    def answer(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Generation:
        """The answer to a conversation given as a whole; the chat's own history is not touched."""
        return self.batch([messages], params)[0]

    def batch(
        self, conversations: Sequence[Sequence[Message]], params: SamplingParams | None = None
    ) -> list[Generation]:
        """The answers to several conversations at once, each as if it were the only one.

        Raises:
            PromptError: a conversation has nothing to answer.
            ContextTooLongError: a conversation leaves no room for an answer.
        """
        params = self._params(params or SamplingParams())
        prompts = [
            self._ready(messages, Memory(), row=row) for row, messages in enumerate(conversations)
        ]
        return self._answering.answer_all(prompts, params)

    def as_completed(
        self, conversations: Iterable[Sequence[Message]], params: SamplingParams | None = None
    ) -> Iterator[tuple[int, Generation | LapilliError]]:
        """Number and answer of every conversation as it is finished, many at the same time.

        What is wrong with one (a picture that cannot be read) is handed out in its place. The
        conversations are taken from the iterable when there is room for them.
        """
        params = self._params(params or SamplingParams())
        prompts = (self._ready_or_error(messages) for messages in conversations)
        return self._answering.as_completed(prompts, params)

    def ask_many(
        self, questions: Sequence[str | tuple[object, ...]], **sampling: object
    ) -> list[str]:
        """The answers to questions that have nothing to do with each other, many at a time.

        The chat's own history is not touched. Pictures and beginnings that several questions share
        are read once.

        Args:
            questions: a text, or a tuple of a text and the pictures before it.
            sampling: fields of SamplingParams.

        Raises:
            LapilliError: the first question that cannot be answered, see `as_completed`.
        """
        asked = [(each,) if isinstance(each, str) else each for each in questions]
        conversations = [
            self._with_system((Message.user(str(text), *images),)) for text, *images in asked
        ]
        answers = self.batch(conversations, SamplingParams.from_options(**sampling))
        return [answer.text.strip() for answer in answers]

    def save_prefix(self, path: str | Path) -> int:
        """Keys and values of the latest question and its answer, in a file; returns positions.

        `load(..., prefix=path)` and `load_prefix` take it up in another process: what begins like
        this (the same instructions, the same picture) is then read from disk instead of computed.

        Raises:
            CheckpointError: nothing was asked yet, or what was read is not kept any more.
        """
        if not self._last_keys:
            raise CheckpointError("there is nothing to save yet: ask something first")
        return self.engine.save_prefix(Path(path), self._last_keys)

    def load_prefix(self, path: str | Path) -> int:
        """Take up what `save_prefix` wrote; returns positions.

        Raises:
            MissingFileError: there is no such file.
            CheckpointError: it is not a saved prefix, or one of another model.
        """
        return self.engine.load_prefix(Path(path))

    def encode(self, messages: Sequence[Message]) -> ReadyPrompt:
        """The parts that `answer` works with: ids, spans and prepared media."""
        return self._ready(messages, Memory())

    def check_image(self, source: object) -> None:
        """Fetch and decode a picture, and throw it away.

        Raises:
            MediaError: it cannot be fetched or decoded.
            UnsupportedModelError: the model reads text only.
        """
        prepare(MediaPart(source), self.model, self.limits, alpha=self.alpha)

    def out_of_distribution(self) -> str | None:
        """Return one line for people if a picture of the latest question is unlike the training's.

        None where it is like them, and where the checkpoint has no detector, as nearly all. The
        tower runs once more for it: what answers keep are features behind the projector.
        """
        if self._detector is None or not any(
            self._detector.is_unknown(item, self.model) for item in self._last_media
        ):
            return None
        return self._detector.warning(self.name)

    def _remember(
        self,
        question: Message,
        media: tuple[Any, ...],
        talk: Conversation,
        reply: Reply,
        *,
        is_whole: bool,
    ) -> None:
        """Keep the turn, unless it was cancelled before it said anything."""
        generation = reply.pieces.generation
        # After an interrupt between two layers the cache cannot be trusted.
        talk.memory.keep_cache(
            reply.cache if is_whole else None, [*reply.positions, *generation.token_ids]
        )
        is_said = bool(generation.text) or generation.finish_reason != "cancelled"
        with self._adopting:
            if is_said:
                answer = Message.assistant(generation.text.strip())
                talk.history = (*talk.history, question, answer)
            if talk.number < self._conversation.number:
                return  # a later conversation has begun, or this one is to be forgotten
            self.last, self._last_keys, self._last_media = generation, reply.keys, media
            if is_said:
                self._conversation = talk

    def _ready(self, messages: Sequence[Message], memory: Memory, *, row: int = 0) -> ReadyPrompt:
        if not messages:
            raise PromptError("the conversation is empty: give at least one message of the user")
        parts = [part for message in messages for part in message.media]
        items = [self._item(part, memory) for part in parts]
        prompt = make_ready(
            messages,
            items,
            model=self.model,
            template=self.template,
            tokenizer=self.tokenizer,
            image_id=self.config.tokens.image_id,
        )
        visual = sum(span.length for span in prompt.encoded.spans)
        check_context(
            len(prompt.encoded.input_ids), self._answering.context_length, row=row, visual=visual
        )
        for part, item in zip(parts, items, strict=True):
            memory.add(part, item)
        return prompt

    def _ready_or_error(self, messages: Sequence[Message]) -> ReadyPrompt | LapilliError:
        try:
            return self._ready(messages, Memory())
        except LapilliError as error:
            return error

    def _item(self, part: MediaPart, memory: Memory) -> object:
        item = memory.item(part)
        if item is not None:
            return item
        return prepare(part, self.model, self.limits, alpha=self.alpha)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return messages if self.system is None else (Message.system(self.system), *messages)

    def _params(self, params: SamplingParams) -> SamplingParams:
        """The parameters, with the template's end of an answer among the stops.

        Where the tokenizer has the stop string as one token, that token stops too: special tokens
        are not part of the text that stop strings are looked for in.
        """
        token_ids = [self.tokenizer.token_to_id(text) for text in self.template.stop]
        return params.updated(
            stop=dict.fromkeys((*params.stop, *self.template.stop)),
            stop_token_ids=(*params.stop_token_ids, *(i for i in token_ids if i is not None)),
        )

"""`load(source) -> Chat`, and the conversation with a loaded model.

Knows who is asked when; must not know how files look, how pixels are computed or how tokens are
chosen.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapilli.checkpoint.load import Loaded, load_checkpoint
from lapilli.checkpoint.out_of_distribution import load_detector
from lapilli.checkpoint.read.assemble import LoadReport, Progress
from lapilli.config.generation import SamplingParams, check_engine_options
from lapilli.config.model import ModelConfig
from lapilli.config.reader import given_path, shown
from lapilli.errors import CheckpointError, ConfigError, GenerationError, LapilliError, PromptError
from lapilli.generate.engine import Engine, EngineOptions
from lapilli.generate.engine.request import EngineStream, Request
from lapilli.generate.output import Generation
from lapilli.media.fetch import FetchLimits
from lapilli.modality.image.decode import Alpha, check_alpha
from lapilli.model import VisionLanguageModel
from lapilli.pipeline.backend import (
    AnswerStream,
    Backend,
    Pieces,
    ProcessedPrompt,
    prepare,
    with_stops,
)
from lapilli.pipeline.questions import Decisions, Question
from lapilli.pipeline.scorer import PREFIX_BYTES
from lapilli.pipeline.stores import Stores
from lapilli.prompt.choose import Template, check_template
from lapilli.prompt.encode import tokens_said
from lapilli.prompt.message import (
    MediaPart,
    Message,
    check_conversation,
    check_text,
    questions_of,
    several,
)
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.quant import QuantConfig
from lapilli.shapes import Float, Tensor
from lapilli.store import Store

if TYPE_CHECKING:
    from lapilli.pipeline.decide import Decider
    from lapilli.pipeline.wording import Wording


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
    stores: Mapping[str, Store | str | Path] | None = None,
) -> "Chat":
    """Load a checkpoint to talk with.

    Args:
        source: a directory, a hub id, or "pebble".
        base: the language model under a LoRA or a projector; None: what the checkpoint names.
        adapter: a LoRA to lay over the checkpoint.
        template: a name from `lapilli.prompt.template.TEMPLATES`, "chat_template" for the
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
        stores: by the names of modalities, stores whose ids may be given in place of their media.

    Raises:
        CheckpointError: the files are not usable.
        ConfigError: the configuration cannot be followed.
        PromptError: no template has this name.
        StoreError: a store that does not fit its modality.
    """
    check_alpha(alpha)
    check_engine_options(engine)
    if str(device).partition(":")[0] == "meta":  # loads, and cannot answer
        raise ConfigError("device 'meta' keeps no numbers: try auto, cpu, cuda or cuda:1")
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress must be a function or None, got {shown(progress)}")
    if stores is not None and not isinstance(stores, Mapping):
        raise ConfigError(f"stores must be {{name of a modality: store}}, got {shown(stores)}")
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
    for name, store in (stores or {}).items():
        chat.stores[name] = store
    if prefix is not None:
        chat.load_prefix(prefix)
    return chat


@dataclass(slots=True)
class Conversation:
    """A conversation: its history, and the media that were shown.

    Attributes:
        number: a later conversation has a higher number.
        history: questions and answers, without the system message.
        media: every part that was shown with what its modality prepared, by the part's id(): two
            pictures of one path may differ, so a medium is known by the object alone.
    """

    number: int = 0
    history: tuple[Message, ...] = ()
    media: dict[int, tuple[MediaPart, Any]] = field(default_factory=dict)


class Chat:
    """A model, and the conversation with it.

    Any number of threads may use one: the model is run by one of them at a time. `ask` and `stream`
    are turns of the one conversation and follow each other; `answer`, `batch`, `ask_many` and
    `as_completed` leave it alone and are answered side by side.

    What the checkpoint declares besides pictures is given by its name: `ask("...", user=history)`,
    or by an id where `stores` has a store for it.

    Pictures may be paths, URLs, data URIs, "-" (standard input), bytes, Pillow images, arrays, or
    in place of a picture its features: a floating point tensor [n, width of the language model],
    or [n, width of the tower], which goes through the projector and is laid down as it is.
    """

    def __init__(
        self, loaded: Loaded, *, name: str = "", engine: EngineOptions | None = None
    ) -> None:
        check_engine_options(engine)
        self._loaded = loaded
        vision = loaded.config.vision
        width = None if vision is None else vision.hidden_size
        self._detector = load_detector(loaded.path, width=width)
        without = "" if self._detector is None else self._detector.without_picture
        self._backend = Backend(loaded, engine, without)
        self._turns = threading.RLock()
        self._numbers = count(1)
        self._adopting = threading.Lock()
        self._conversation = Conversation()
        self.name = name or loaded.path.name
        self.template: Template = loaded.template.template
        self.limits = FetchLimits()
        self.stores = Stores(loaded.model)
        """Stores by the names of modalities, see `pipeline.stores.Stores`."""
        self.alpha: Alpha = "drop"
        """Treatment of transparent pictures, see `load`."""
        self.system: str | None = None
        """Instructions in place of the template's own; counted from the next question on."""
        self._last_keys: tuple[int, ...] = ()
        self._last_media: tuple[Any, ...] = ()
        self.last: Generation | None = None
        """The latest answer of `ask` or `stream` in full: tokens, finish reason, logprobs."""

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute; a setting that nothing could follow is refused here, not later.

        Raises:
            PromptError: instructions that are no text, or no template.
            ConfigError: another `alpha` than there is, or limits of another class.
        """
        check = _SETTINGS.get(name)
        if check is not None:
            check(value)
        super().__setattr__(name, value)

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
        """The engine, whose caches all methods share; made when it is first needed.

        Raises:
            UnsupportedModelError: the language model is one of another library; Chat then answers
                without the engine.
        """
        return self._backend.engine

    @property
    def config(self) -> ModelConfig:
        """The configuration of the checkpoint."""
        return self._loaded.config

    @property
    def context_length(self) -> int:
        """Most positions of prompt and answer."""
        return self._backend.context_length

    @property
    def report(self) -> LoadReport:
        """Report of loading: used, dropped, missing and unexpected tensors."""
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

    def ask(self, question: str, *images: object, keep: bool = False, **options: object) -> str:
        """Return the answer, without white space around it.

        Args:
            question: anything; an `<image>` in it stays text.
            images: stand before the question. With images a new conversation begins, without any
                the question follows the one before, whose images are not encoded again.
            keep: the media join the running conversation.
            options: fields of SamplingParams; `schema`, the form of the answer: a JSON schema, a
                pydantic model class, a list of choices or a regular expression; and a medium under
                the name of a modality that the checkpoint declares, such as `user=history`; no
                modality is called like an option.

        Raises:
            PromptError: the question is empty.
            MediaError: an image cannot be fetched or decoded, or a medium is none of its modality.
            ContextTooLongError: the conversation leaves no room for an answer.
        """
        with self._turns:
            return "".join(self.stream(question, *images, keep=keep, **options)).strip()

    def stream(
        self,
        question: str,
        *images: object,
        keep: bool = False,
        **options: object,
    ) -> AnswerStream:
        """Return the answer of `ask` as an iterator of pieces of text.

        Closing the iterator stops the answer; what was said of it is kept. The question follows the
        history as it is now, and joins it with its answer when that is over.
        """
        media, sampling = self._told_apart(options)
        asked = Message.user(question, *images, **media)
        if not question.strip():
            raise PromptError("the question is empty: ask something")
        params = self._params(SamplingParams.from_options(**sampling))
        detector = self._detector
        if detector is not None and detector.unsure_below and params.num_beams == 1:
            params = replace(params, logprobs=params.logprobs or 0)  # for `doubt`
        with self._turns:
            begins = bool(asked.media) and not keep
            talk = Conversation(next(self._numbers)) if begins else self._conversation
            prompt = self._process(self._with_system((*talk.history, asked)), talk)
            new = prompt.media[len(prompt.media) - len(asked.media) :]
            return AnswerStream(
                lambda: self._backend.stream(prompt, params),
                lambda pieces, answer: self._remember(
                    asked, new, talk, pieces, answer, after=prompt.encoded.input_ids[-1]
                ),
            )

    def answer(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Generation:
        """Return the answer to a whole conversation; the chat's own history is not touched."""
        return self.batch([messages], params)[0]

    def batch(
        self, conversations: Sequence[Sequence[Message]], params: SamplingParams | None = None
    ) -> list[Generation]:
        """Return the answers to several conversations, each as if it were the only one.

        Raises:
            PromptError: a conversation has nothing to answer.
            ContextTooLongError: a conversation leaves no room for an answer.
        """
        params = self._params(params or SamplingParams())
        prompts = [
            self._process(messages, row=row) for row, messages in enumerate(several(conversations))
        ]
        return self._backend.generate(prompts, params)

    def as_completed(
        self, conversations: Iterable[Sequence[Message]], params: SamplingParams | None = None
    ) -> Iterator[tuple[int, Generation | LapilliError]]:
        """Yield number and answer of every conversation as it is finished, many at the same time.

        What is wrong with one (a picture that cannot be read) is handed out in its place. The
        conversations are taken from the iterable when there is room for them.
        """
        params = self._params(params or SamplingParams())
        prompts = (self._process_or_error(messages) for messages in several(conversations))
        return self._backend.as_completed(prompts, params)

    def ask_many(
        self, questions: Sequence[str | tuple[object, ...] | Message], **sampling: object
    ) -> list[str]:
        """Return the answers to questions that have nothing to do with each other, many at a time.

        The chat's own history is not touched. Pictures and beginnings that several questions share
        are read once.

        A question is a text, a tuple of a text and the pictures before it, or a Message.

        Raises:
            LapilliError: the first question that cannot be answered, see `as_completed`.
        """
        asked = questions_of(questions)
        conversations = [self._with_system((question,)) for question in asked]
        answers = self.batch(conversations, SamplingParams.from_options(**sampling))
        return [answer.text.strip() for answer in answers]

    def decide(
        self, given: object, questions: Sequence[Question], *, wording: "Wording | None" = None
    ) -> Decisions:
        """Return probabilities for the answers to many questions about one input.

        The input is read once, all questions behind it together; every answer is that of the
        question alone, up to the rounding of floats. The chat's own history is not touched.

        Args:
            given: a text, a picture, a list of texts and pictures, or messages. A picture on disk
                is a pathlib.Path or a MediaPart, since a string is a text.
            questions: Predicate, Choice and Score, in any order.
            wording: what is written around a question; None: a predicate with a question mark
                stands as it is, others are followed by how they are to be answered.

        Raises:
            PromptError: an input or a question with nothing in it.
            MediaError: a picture cannot be fetched or decoded.
            ContextTooLongError: the input with one of the questions is longer than the context.
        """
        return self._decider.decide(given, questions, wording)

    def embed(self, inputs: Sequence[object]) -> Float[Tensor, "n D"]:
        """Return one vector of length 1 for each input, float32 on the CPU.

        A vector is the mean of the last hidden states, behind the final norm, over the positions of
        text, or over those of the pictures where there is no text.

        Args:
            inputs: texts, pictures, lists of texts and pictures, which are read as they are; or
                lists of messages, which the template writes. A picture on disk is a pathlib.Path.

        Raises:
            PromptError: no list, or an input with nothing in it.
            MediaError: a picture cannot be fetched or decoded.
            ContextTooLongError: an input that is longer than the context.
        """
        from lapilli.pipeline.embed import Embedder  # here, as it asks a Chat

        return Embedder(self).embed(inputs)

    def save_prefix(self, path: str | Path) -> int:
        """Save keys and values of the latest question and its answer; return the positions.

        `load(..., prefix=path)` and `load_prefix` take it up in another process: what begins like
        this (the same instructions, the same picture) is then read from disk instead of computed.

        Raises:
            CheckpointError: nothing was asked yet, or what was read is not kept any more.
        """
        if not self._last_keys:
            raise CheckpointError("there is nothing to save yet: ask something first")
        return self.engine.save_prefix(given_path(path), self._last_keys)

    def load_prefix(self, path: str | Path) -> int:
        """Load what `save_prefix` wrote; return the number of positions.

        Raises:
            MissingFileError: there is no such file.
            CheckpointError: it is not a saved prefix, or one of another model.
        """
        return self.engine.load_prefix(given_path(path))

    def encode(self, messages: Sequence[Message]) -> ProcessedPrompt:
        """Return the prompt that `answer` works with: ids, spans and prepared media."""
        return self._process(messages)

    def request(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Request | Generation:
        """Return what `answer` asks the engine, or the answer where no model is needed for it.

        Whoever runs the engine in a way of its own, as a server does, submits the request.

        Raises:
            PromptError: a conversation with nothing to answer.
            ContextTooLongError: it leaves no room for an answer.
        """
        prompt = self._process(messages)
        return self._backend.request(prompt, self._params(params or SamplingParams()))

    def prepare(self, part: MediaPart) -> Any:  # noqa: ANN401 - every modality has its own
        """Return a medium as its modality takes it; features stay features.

        Raises:
            MediaError: it cannot be fetched or decoded, or features of another shape.
            StoreError: an id that the modality's store does not have.
            UnsupportedModelError: the model does not read this kind of medium.
        """
        return prepare(part, self.model, self.limits, alpha=self.alpha, stores=self.stores)

    def check_image(self, source: object) -> None:
        """Fetch and decode a picture, and throw it away.

        Raises:
            MediaError: it cannot be fetched or decoded.
            UnsupportedModelError: the model reads text only.
        """
        self.prepare(MediaPart(source))

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

    def doubt(self) -> str | None:
        """Return one line for people if the model was not sure of the latest answer.

        None where it was sure, and where the checkpoint does not say below which probability an
        answer is one to doubt, as nearly all. An answer of beam search is not doubted.
        """
        if self._detector is None or self.last is None or not self.last.logprobs:
            return None
        probability = math.exp(sum(token.logprob for token in self.last.logprobs))
        return self._detector.doubt(probability, self.name)

    def decider(self, *, prefix_bytes: int = PREFIX_BYTES) -> "Decider":
        """Return what answers as `decide` does, with so many bytes for what it keeps of inputs."""
        from lapilli.pipeline.decide import Decider  # here, as it asks a Chat

        without = "" if self._detector is None else self._detector.without_picture
        return Decider(self, without, prefix_bytes=prefix_bytes)

    @cached_property
    def _decider(self) -> "Decider":
        return self.decider()

    def _remember(
        self,
        question: Message,
        media: tuple[Any, ...],
        talk: Conversation,
        pieces: Pieces,
        generation: Generation,
        *,
        after: int,
    ) -> None:
        """Keep the turn, unless it was cancelled before it said anything.

        An interrupt may end any line; a second call then does what is left.
        """
        is_said = bool(generation.text) or generation.finish_reason != "cancelled"
        text = generation.text.strip()
        said = tokens_said(text, generation.token_ids, after, self.tokenizer)
        with self._adopting:
            if is_said and not any(turn is question for turn in talk.history):
                answer = Message.assistant(text, said)
                talk.history = (*talk.history, question, answer)
            if talk.number < self._conversation.number:
                return  # a later conversation has begun, or this one is to be forgotten
            self._last_keys = pieces.handle.keys if isinstance(pieces, EngineStream) else ()
            self.last, self._last_media = generation, media
            if is_said:
                self._conversation = talk

    def _process(
        self,
        messages: Sequence[Message],
        talk: Conversation | None = None,
        *,
        row: int | None = None,
    ) -> ProcessedPrompt:
        """Return the prompt of these messages.

        The media of `talk`, the conversation that they belong to, are not prepared again.
        """
        check_conversation(messages)
        known = {} if talk is None else talk.media
        parts = [part for message in messages for part in message.media]
        shown = {id(part): known.get(id(part)) or (part, self.prepare(part)) for part in parts}
        items = [shown[id(part)][1] for part in parts]
        prompt = self._backend.process(messages, items, self.template, row=row)
        known.update(shown)
        return prompt

    def _process_or_error(self, messages: Sequence[Message]) -> ProcessedPrompt | LapilliError:
        try:
            return self._process(messages)
        except LapilliError as error:
            return error

    def _told_apart(
        self, options: Mapping[str, object]
    ) -> tuple[dict[str, object], dict[str, object]]:
        """Return the media among keyword options, and the rest, which sampling knows or refuses."""
        names = set(self.model.modalities) - {"image"}
        media = {name: value for name, value in options.items() if name in names}
        known = {"schema", *(one.name for one in fields(SamplingParams))}
        strange = sorted(options.keys() - known - names)
        if names and strange:
            raise GenerationError(
                f"unknown sampling option {', '.join(strange)}, and no modality either: the "
                f"checkpoint declares {', '.join(sorted(names))}"
            )
        return media, {name: value for name, value in options.items() if name not in names}

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return messages if self.system is None else (Message.system(self.system), *messages)

    def _params(self, params: SamplingParams) -> SamplingParams:
        if not isinstance(params, SamplingParams):
            raise GenerationError(f"params must be SamplingParams, got {shown(params)}")
        return with_stops(params, self.template, self.tokenizer)


def _check_limits(limits: object) -> None:
    if not isinstance(limits, FetchLimits):
        raise ConfigError(f"limits must be FetchLimits, got {shown(limits)}")


_SETTINGS: dict[str, Callable[[Any], None]] = {
    "alpha": check_alpha,
    "limits": _check_limits,
    "system": lambda system: None if system is None else check_text(system),
    "template": check_template,
}

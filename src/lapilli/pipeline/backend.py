"""Backend of a conversation: its messages become a prompt, and the prompt an answer.

    messages   prepare, process    ProcessedPrompt: media fetched, prepared, counted; text encoded
    prompts    greedy, sampled                    Engine     features, prefixes, blocks are shared
               beams, foreign language models     generate()/stream(), the plain loop

Knows where a medium goes on its way; must not know the conversation before.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lapilli.checkpoint.load import Loaded
from lapilli.config.generation import SamplingParams
from lapilli.config.reader import shown
from lapilli.errors import GenerationError, LapilliError, MediaError, UnsupportedModelError
from lapilli.generate.engine import Engine, EngineOptions, Request
from lapilli.generate.engine.feature_cache import FeatureCache, WeightWatch, media_digest
from lapilli.generate.engine.request import EngineStream
from lapilli.generate.output import Generation, Piece, TokenLogprob
from lapilli.generate.reference import Stream, check_context, generate, lock_of, stream
from lapilli.media.fetch import FetchLimits, fetch
from lapilli.modality.image.decode import Alpha, to_rgb
from lapilli.modality.image.image import ImageModality
from lapilli.modality.image.pixels import PreparedImage
from lapilli.modality.vector import VectorModality
from lapilli.model import FusedBatch, VisionLanguageModel
from lapilli.pipeline.stores import Stores, is_id
from lapilli.prompt.choose import Template
from lapilli.prompt.encode import EncodedPrompt, encode
from lapilli.prompt.message import MediaPart, Message
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.shapes import Float, Tensor


@dataclass(frozen=True, slots=True)
class ProcessedPrompt:
    """A conversation as the model takes it: `model.embed_prompts([encoded], [media])`.

    Attributes:
        encoded: ids, and where the media go.
        media: per medium what its modality prepared, or features [n, D].
    """

    encoded: EncodedPrompt
    media: tuple[Any, ...]

    @property
    def text_ids(self) -> list[int]:
        """Token ids outside the media."""
        covered = {i for s in self.encoded.spans for i in range(s.start, s.start + s.length)}
        return [token for i, token in enumerate(self.encoded.input_ids) if i not in covered]


def with_stops(params: SamplingParams, template: Template, tokenizer: Tokenizer) -> SamplingParams:
    """Return the parameters with the template's end of an answer among the stops.

    Where the tokenizer has the stop string as one token, that token stops too: special tokens
    are not part of the text that stop strings are looked for in. An answer that follows a grammar
    ends where that ends, and may have the stop string in its text.
    """
    token_ids = [tokenizer.token_to_id(text) for text in template.stop]
    strings = template.stop if params.grammar is None else ()
    return params.updated(
        stop=dict.fromkeys((*params.stop, *strings)),
        stop_token_ids=(*params.stop_token_ids, *(i for i in token_ids if i is not None)),
    )


def prepare(
    part: MediaPart,
    model: VisionLanguageModel,
    limits: FetchLimits,
    *,
    alpha: Alpha = "drop",
    stores: Stores | None = None,
) -> Any:  # noqa: ANN401 - every modality has its own
    """Return a medium prepared for its modality; features stay features.

    Raises:
        UnsupportedModelError: the model does not read this kind of medium.
        MediaError: it cannot be fetched or decoded, or features of another shape.
        StoreError: an id that the modality's store does not have.
    """
    if part.modality not in model.modalities:
        known = ", ".join(model.modalities) or "text only"
        advice = "load a LLaVA checkpoint"
        if part.modality != "image":
            advice = "declare it (lapilli build --modality)"
        raise UnsupportedModelError(
            f"this model cannot take {'an' if part.modality == 'image' else 'the medium'} "
            f"{part.modality}, it reads {known}: leave it out, or {advice}"
        )
    modality = model.modality(part.modality)
    source = part.source
    if stores is not None and stores.has_id(part.modality, source):
        return stores.look_up(part.modality, source)
    if type(modality) is VectorModality and is_id(source):
        raise MediaError(
            f"{part.modality}: {shown(source)} is no vector, and as an id it needs a store: "
            f"chat.stores[{part.modality!r}] = a folder, load(..., stores=...), or --store"
        )
    if not isinstance(modality, ImageModality):
        return modality.prepare(source)
    if isinstance(source, PreparedImage):
        return source
    if isinstance(source, Tensor):
        return _project_features(source, modality, model.language_model.config.hidden_size)
    fetched = fetch(source, limits=limits, stdin=getattr(sys.stdin, "buffer", None))
    return modality.prepare(to_rgb(fetched.data, alpha=alpha, name=fetched.name))


@torch.inference_mode()
def _project_features(
    features: Tensor, modality: ImageModality, width: int
) -> Float[Tensor, "n D"]:
    """Return features that somebody computed before, as wide as the language model reads them.

    They are [n, width], or [n, width of the tower], which go through the projector; `width` is that
    of the language model, which counts if both are equal.

    Raises:
        MediaError: another shape, or whole numbers.
    """
    tower = modality.vision.hidden_size
    shape = list(features.shape)
    fits = features.ndim == 2 and shape[0] > 0 and shape[1] in (width, tower)
    if not fits or not features.is_floating_point():
        raise MediaError(
            f"features must be floating point [n, {width}] (language model) or [n, {tower}] "
            f"(vision tower), got {features.dtype} {shape}: a tensor is read as features, "
            "never as a picture"
        )
    weight = next(modality.parameters())
    features = features.to(weight.device, weight.dtype)
    if shape[1] == width:
        return features
    projected: Tensor = modality.projector(features)
    return projected


class FixedAnswer(Iterator[Piece]):
    """An answer that needs no model, as a stream of one piece."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._is_read = False

    def __next__(self) -> Piece:
        """Return the whole answer, once."""
        if self._is_read:
            raise StopIteration
        self._is_read = True
        return Piece(self.generation.text, self.generation.token_ids, self.generation.finish_reason)


Pieces = EngineStream | Stream | FixedAnswer
"""An answer on its way, from any backend."""


class AnswerStream(Iterator[str]):
    """The text of an answer, piece by piece as it settles; any threads may read it.

    Closing it, from any thread, or letting go of it stops the answer; what was said of it is kept.

    Args:
        begin: starts the answer; called when the first piece is wanted.
        keep: called with the answer when it is over, unless it failed; called once more where an
            interrupt ended the call.
    """

    def __init__(
        self, begin: Callable[[], Pieces], keep: Callable[[Pieces, Generation], None]
    ) -> None:
        self._is_over = False
        self._said: list[Piece] = []
        self._begin = begin
        self._keep = keep
        self._lock = threading.RLock()
        self._pieces: Pieces | None = None

    def __next__(self) -> str:
        """Return the next piece.

        Raises:
            LapilliError: what went wrong with the answer.
        """
        with self._lock:
            try:
                text = self._pull()
            except Exception:  # whatever it was, there is no more of this answer
                self._is_over = True
                raise
            except BaseException:  # an interrupt: what was said until now is the answer
                with suppress(LapilliError, RuntimeError):
                    self._end()
                raise
            if text is None:
                raise StopIteration
            return text

    def close(self) -> None:
        """Stop here; what was said is the answer."""
        pieces = self._pieces
        if isinstance(pieces, EngineStream):
            pieces.handle.cancel()  # whoever is pulling a piece now need not end it
        with self._lock:
            self._end()

    def __del__(self) -> None:
        """Stop an answer that nobody reads any more."""
        if not self._is_over:
            # What it was in the middle of may be in the middle of something else.
            with suppress(LapilliError, RuntimeError):
                self.close()

    def _pull(self) -> str | None:
        """Return the next piece that has text; None when the answer is over."""
        if self._pieces is None and not self._is_over:
            self._pieces = self._begin()
        while not self._is_over and self._pieces is not None:
            piece = next(self._pieces, None)
            if piece is None:
                self._end()
            else:
                self._said.append(piece)
                if piece.text:
                    return piece.text
        return None

    def _end(self) -> None:
        """Keep what was said; over only then, so that an interrupted end is made up for."""
        if self._pieces is not None and not self._is_over:
            try:
                self._keep(self._pieces, self._generation(self._pieces))
            except Exception:  # it failed: there is nothing to keep
                self._is_over = True
                raise
        self._is_over = True

    def _generation(self, pieces: Pieces) -> Generation:
        """Return the answer; where an interrupt broke the engine's, what was handed out of it."""
        try:
            return pieces.generation
        except (LapilliError, RuntimeError):
            if not any(piece.text for piece in self._said):
                raise
            ids = tuple(token for piece in self._said for token in piece.token_ids)
            return Generation(ids, "".join(piece.text for piece in self._said), "cancelled")


class Backend:
    """A loaded model that answers prompts, through the engine or by the plain loop.

    Args:
        without_media: the answer to every prompt without a picture, where the checkpoint has one;
            "": the model answers those too.
    """

    def __init__(
        self, loaded: Loaded, options: EngineOptions | None = None, without_media: str = ""
    ) -> None:
        self._loaded = loaded
        self._options = options or EngineOptions()
        wanted, readable = self._options.context_length, self._readable_length
        if wanted is not None and wanted > readable:
            raise GenerationError(
                f"context_length must be at most {readable}, what the model reads, got {wanted}"
            )
        self._without_media = without_media
        self._features = FeatureCache(self._options.feature_bytes)
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine, made when it is first needed.

        Raises:
            UnsupportedModelError: a language model of another library.
        """
        with self._lock:
            if self._engine is None:
                self._engine = Engine(
                    self._loaded.model,
                    self._loaded.tokenizer,
                    eos_ids=self._eos_ids,
                    context_length=self.context_length,
                    options=self._options,
                    features=self._features,
                )
            return self._engine

    @property
    def context_length(self) -> int:
        """Most positions of prompt and answer."""
        wanted = self._options.context_length
        return self._readable_length if wanted is None else wanted

    @property
    def _readable_length(self) -> int:
        """Most positions that the checkpoint reads."""
        config = self._loaded.config
        return max(config.context_length, config.text.max_positions)

    def process(
        self,
        messages: Sequence[Message],
        items: Sequence[Any],
        template: Template,
        *,
        row: int | None = None,
    ) -> ProcessedPrompt:
        """Return the prompt of a conversation; its spans have the lengths of its media.

        `items` are what `prepare` made of the media of all messages, in their order; `row` is named
        where the prompt is too long.

        Raises:
            ContextTooLongError: the conversation leaves no room for an answer.
            PromptError: the template cannot render these messages.
        """
        model, image_id = self._loaded.model, self._loaded.config.tokens.image_id
        parts = [part for message in messages for part in message.media]
        lengths = [
            model.span_length(part.modality, item) for part, item in zip(parts, items, strict=True)
        ]
        segments = template.render(messages)
        encoded = encode(segments, self._loaded.tokenizer, lengths, image_id=image_id)
        visual = sum(lengths)
        check_context(len(encoded.input_ids), self.context_length, row=row, visual=visual)
        return ProcessedPrompt(encoded, tuple(items))

    def stream(self, prompt: ProcessedPrompt, params: SamplingParams) -> Pieces:
        """Return one answer piece by piece."""
        fixed = self._fixed(prompt, params)
        if fixed is not None:
            return FixedAnswer(fixed)
        request = self._request(prompt, params)
        if self._has_engine(params):
            return self.engine.stream(request)
        return stream(batch=self._fuse([request]), **self._plain_options([request]))

    def request(self, prompt: ProcessedPrompt, params: SamplingParams) -> Request | Generation:
        """Return the engine's request for a prompt, or the answer where there is a fixed one."""
        fixed = self._fixed(prompt, params)
        return self._request(prompt, params) if fixed is None else fixed

    def generate(
        self, prompts: Sequence[ProcessedPrompt], params: SamplingParams
    ) -> list[Generation]:
        """Return the answers, each as if it were the only one."""
        fixed = [self._fixed(prompt, params) for prompt in prompts]
        requests = [
            self._request(prompt, params)
            for prompt, known in zip(prompts, fixed, strict=True)
            if known is None
        ]
        run = self.engine.run if self._has_engine(params) else self._generate_plain
        answers = iter(run(requests) if requests else [])
        return [next(answers) if known is None else known for known in fixed]

    def as_completed(
        self, prompts: Iterable[ProcessedPrompt | LapilliError], params: SamplingParams
    ) -> Iterator[tuple[int, Generation | LapilliError]]:
        """Yield number and answer of every prompt as it is finished; errors keep their number."""
        asked: list[int] = []
        known: list[tuple[int, Generation | LapilliError]] = []

        def requests() -> Iterator[Request]:
            for number, prompt in enumerate(prompts):
                if isinstance(prompt, LapilliError):
                    known.append((number, prompt))
                elif (fixed := self._fixed(prompt, params)) is not None:
                    known.append((number, fixed))
                else:
                    asked.append(number)
                    yield self._request(prompt, params)

        if self._has_engine(params):
            answers = self.engine.as_completed(requests())
        else:
            answers = enumerate(self._generate_or_error(request) for request in requests())
        for at, answer in answers:
            while known:
                yield known.pop()
            yield asked[at], answer
        yield from known

    def _fixed(self, prompt: ProcessedPrompt, params: SamplingParams) -> Generation | None:
        """Return the answer to a prompt that no model is needed for, unless it needs a form.

        Who asks for log-probabilities finds one per token as in every answer, of certain tokens.
        """
        if not self._without_media or prompt.encoded.spans or params.grammar is not None:
            return None
        ids = self._loaded.tokenizer.encode(self._without_media, add_bos=False)
        length = len(prompt.encoded.input_ids)
        sure = [TokenLogprob(token, 0.0, ((token, 0.0),) * bool(params.logprobs)) for token in ids]
        logprobs = None if params.logprobs is None else tuple(sure)
        text = self._without_media
        return Generation(tuple(ids), text, "stop", logprobs=logprobs, prompt_len=length)

    def _generate_or_error(self, request: Request) -> Generation | LapilliError:
        try:
            return self._generate_plain([request])[0]
        except LapilliError as error:
            return error

    def _generate_plain(self, requests: Sequence[Request]) -> list[Generation]:
        return generate(batch=self._fuse(requests), **self._plain_options(requests))

    def _plain_options(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the arguments of the plain loop that are no embeddings."""
        return {
            "model": self._loaded.model,
            "params": requests[0].params,
            "tokenizer": self._loaded.tokenizer,
            "prompt_ids": [request.seen_ids or () for request in requests],
            "eos_ids": self._eos_ids,
            "context_length": self.context_length,
        }

    @torch.inference_mode()
    def _fuse(self, requests: Sequence[Request]) -> FusedBatch:
        """Return the prompts as embeddings, the features of pictures from the cache if they are."""
        model = self._loaded.model
        with lock_of(model.language_model).turn:
            version = self._watch.version, self._watch.token  # asked for in this order
            media = [
                [
                    self._encode(item, span.modality, version)
                    for item, span in zip(request.media, request.prompt.spans, strict=True)
                ]
                for request in requests
            ]
            return model.embed_prompts([request.prompt for request in requests], media)

    def _encode(self, item: Any, modality: str, version: object) -> Tensor:  # noqa: ANN401
        if isinstance(item, Tensor):
            return item
        key = (media_digest(modality, item), version)
        features = self._features.get(key)
        if features is None:
            [features] = self._loaded.model.modality(modality).embed([item])
            self._features.put(key, features)
        return features

    @cached_property
    def _watch(self) -> WeightWatch:
        return WeightWatch(self._loaded.model)

    @property
    def _eos_ids(self) -> tuple[int, ...] | None:
        return self._loaded.config.tokens.eos_ids or None

    def _has_engine(self, params: SamplingParams) -> bool:
        return params.num_beams == 1 and self._loaded.model.language_model.supports_varlen

    def _request(self, prompt: ProcessedPrompt, params: SamplingParams) -> Request:
        """Return the request.

        The repetition penalty counts as seen the text and the image token, if any, as the
        transformers library does, whose prompts hold that token once per visual position.
        """
        seen, image_id = prompt.text_ids, self._loaded.config.tokens.image_id
        if image_id is not None and prompt.encoded.spans:
            seen.append(image_id)
        return Request(prompt.encoded, prompt.media, params, seen_ids=seen)

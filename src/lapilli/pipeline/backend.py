"""Backends of a conversation: processed prompts go in, answers come out.

    greedy, sampled                    Engine     features, prefixes and blocks are shared
    beams, foreign language models     generate()/stream(), the plain loop

Knows processed prompts; must not know messages, templates or the conversation before.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any

import torch

from lapilli.checkpoint.load import Loaded
from lapilli.config.generation import SamplingParams
from lapilli.errors import LapilliError
from lapilli.generate.decode import lock_of
from lapilli.generate.engine import Engine, EngineOptions, Request
from lapilli.generate.engine.feature_cache import FeatureCache, WeightWatch, media_digest
from lapilli.generate.engine.request import EngineStream
from lapilli.generate.output import Generation, Piece
from lapilli.generate.reference import Stream, generate, stream
from lapilli.model.outputs import FusedBatch
from lapilli.nn.kv_cache import KVCache
from lapilli.pipeline.processor import ProcessedPrompt
from lapilli.shapes import Tensor


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


class CachedStream(Iterator[Piece]):
    """A stream of the plain loop whose KV cache is kept when it is over.

    Args:
        pieces: the stream.
        keep: keeps the cache of the finished answer.
    """

    def __init__(self, pieces: Stream, keep: Callable[[Generation], None]) -> None:
        self._pieces = pieces
        self._keep = keep
        self._is_torn = False

    def __next__(self) -> Piece:
        """Return the next piece."""
        # After an interrupt between two layers the cache cannot be trusted.
        self._is_torn = True
        piece = next(self._pieces, None)
        self._is_torn = False
        if piece is None:
            raise StopIteration
        return piece

    @property
    def generation(self) -> Generation:
        """The answer so far; asked before its end, the answer is cancelled."""
        generation = self._pieces.generation
        if not self._is_torn:
            self._keep(generation)
        return generation


Pieces = EngineStream | Stream | CachedStream | FixedAnswer
"""An answer on its way, from any backend."""


class AnswerStream(Iterator[str]):
    """The text of an answer, piece by piece as it settles; any threads may read it.

    Closing it, from any thread, or letting go of it stops the answer; what was said of it is kept.

    Args:
        begin: starts the answer; called when the first piece is wanted.
        keep: called when it is over, unless it failed.
    """

    def __init__(self, begin: Callable[[], Pieces], keep: Callable[[Pieces], None]) -> None:
        self._is_over = False
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
            elif piece.text:
                return piece.text
        return None

    def _end(self) -> None:
        was_over, self._is_over = self._is_over, True
        if self._pieces is not None and not was_over:
            self._keep(self._pieces)


class PlainLoop:
    """The plain loop, with the features and the KV cache that it keeps between answers.

    Args:
        loaded: model, tokenizer, configuration.
        features: those of pictures, shared with the engine.
        context_length: most positions of prompt and answer.
    """

    def __init__(self, loaded: Loaded, features: FeatureCache, context_length: int) -> None:
        self._loaded = loaded
        self._features = features
        self._watch = WeightWatch(loaded.model)
        self._lock = threading.Lock()
        self._cache: KVCache | None = None
        self._cached: tuple[object, list[int]] = (None, [])
        """Version of the weights and token ids of what the cache holds."""
        self._settings: dict[str, Any] = {
            "tokenizer": loaded.tokenizer,
            "eos_ids": loaded.config.tokens.eos_ids or None,
            "context_length": context_length,
        }

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return the answers, each as if it were the only one; the parameters are the first's."""
        model, seen = self._loaded.model, [request.seen_ids or () for request in requests]
        fused, _ = self._fuse(requests)
        return generate(model, fused, requests[0].params, prompt_ids=seen, **self._settings)

    def stream(self, request: Request) -> Stream | CachedStream:
        """Return one answer piece by piece.

        A prompt without pictures that begins like the latest one and its answer takes up their KV
        cache; beams need a cache of their own.
        """
        model, params, ids = self._loaded.model, request.params, request.prompt.input_ids
        fused, version = self._fuse([request])
        cache = None
        if params.num_beams == 1 and not request.prompt.spans:
            cache = self._take_cache(ids, version) or model.language_model.new_cache(
                1, len(ids) + params.max_new_tokens
            )
        seen = [request.seen_ids or ()]
        pieces = stream(model, fused, params, prompt_ids=seen, cache=cache, **self._settings)
        if cache is None:
            return pieces
        return CachedStream(
            pieces, lambda answer: self._keep_cache(cache, version, [*ids, *answer.token_ids])
        )

    @torch.inference_mode()
    def _fuse(self, requests: Sequence[Request]) -> tuple[FusedBatch, object]:
        """Return the prompts as embeddings, and the version of the weights that made them."""
        with lock_of(self._loaded.model.language_model).turn:
            _ = self._watch.version  # looks whether the weights have changed
            version = self._watch.token
            media = [
                [
                    self._encode(item, span.modality, version)
                    for item, span in zip(request.media, request.prompt.spans, strict=True)
                ]
                for request in requests
            ]
            prompts = [request.prompt for request in requests]
            return self._loaded.model.embed_prompts(prompts, media), version

    def _encode(self, item: Any, modality: str, version: object) -> Tensor:  # noqa: ANN401
        if isinstance(item, Tensor):
            return item
        key = (media_digest(modality, item), version)
        features = self._features.get(key)
        if features is None:
            [features] = self._loaded.model.modality(modality).embed([item])
            self._features.put(key, features)
        return features

    def _take_cache(self, ids: Sequence[int], version: object) -> KVCache | None:
        """Return the cache, cut to what it shares with these ids; whoever takes it owns it.

        At least the last position is left to be read, because its logits are not kept.
        """
        with self._lock:
            cache, self._cache = self._cache, None
            known, cached = self._cached
        if cache is None or known is not version:
            return None
        pairs = zip(cached[: cache.length], ids[:-1], strict=False)
        cache.truncate(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return cache

    def _keep_cache(self, cache: KVCache, version: object, ids: list[int]) -> None:
        with self._lock:
            self._cache = None  # never a cache with the ids of another
            self._cached = (version, ids)
            self._cache = cache


class Backend:
    """A loaded model that answers prompts, through the engine or by the plain loop.

    Args:
        loaded: model, tokenizer, configuration.
        options: limits of the engine.
        without_media: the answer to every prompt without a picture, where the checkpoint has one;
            "": the model answers those too.
    """

    def __init__(
        self, loaded: Loaded, options: EngineOptions | None = None, without_media: str = ""
    ) -> None:
        self._loaded = loaded
        self._options = options or EngineOptions()
        self._without_media = without_media
        self._features = FeatureCache(self._options.feature_bytes)
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._plain: PlainLoop | None = None

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
                    eos_ids=self._loaded.config.tokens.eos_ids or None,
                    context_length=self.context_length,
                    options=self._options,
                    features=self._features,
                )
            return self._engine

    @property
    def plain(self) -> PlainLoop:
        """The plain loop, made when it is first needed."""
        with self._lock:
            if self._plain is None:
                self._plain = PlainLoop(self._loaded, self._features, self.context_length)
            return self._plain

    @property
    def context_length(self) -> int:
        """Most positions of prompt and answer."""
        config = self._loaded.config
        return max(config.context_length, config.text.max_positions)

    def stream(self, prompt: ProcessedPrompt, params: SamplingParams) -> Pieces:
        """Return one answer piece by piece."""
        fixed = self._fixed(prompt)
        if fixed is not None:
            return FixedAnswer(fixed)
        request = self._request(prompt, params)
        return (self.engine if self._has_engine(params) else self.plain).stream(request)

    def generate(
        self, prompts: Sequence[ProcessedPrompt], params: SamplingParams
    ) -> list[Generation]:
        """Return the answers, each as if it were the only one."""
        fixed = [self._fixed(prompt) for prompt in prompts]
        requests = [
            self._request(prompt, params)
            for prompt, known in zip(prompts, fixed, strict=True)
            if known is None
        ]
        if self._has_engine(params):
            answers = self.engine.run(requests) if requests else []
        else:
            answers = self.plain.generate(requests) if requests else []
        following = iter(answers)
        return [next(following) if known is None else known for known in fixed]

    def as_completed(
        self, prompts: Iterable[ProcessedPrompt | LapilliError], params: SamplingParams
    ) -> Iterator[tuple[int, Generation | LapilliError]]:
        """Yield number and answer of every prompt as it is finished; errors keep their number."""
        asked: list[int] = []
        known: list[tuple[int, Generation | LapilliError]] = []

        def requests() -> Iterator[Request]:
            for number, prompt in enumerate(prompts):
                fixed = prompt if isinstance(prompt, LapilliError) else self._fixed(prompt)
                if fixed is not None:
                    known.append((number, fixed))
                elif isinstance(prompt, ProcessedPrompt):
                    asked.append(number)
                    yield self._request(prompt, params)

        if self._has_engine(params):
            answers = self.engine.as_completed(requests())
        else:
            answers = enumerate(self._generate_alone(request) for request in requests())
        for at, answer in answers:
            while known:
                yield known.pop()
            yield asked[at], answer
        yield from known

    def _fixed(self, prompt: ProcessedPrompt) -> Generation | None:
        """Return the answer to a prompt that no model is needed for."""
        if not self._without_media or prompt.encoded.spans:
            return None
        ids = self._loaded.tokenizer.encode(self._without_media, add_bos=False)
        length = len(prompt.encoded.input_ids)
        return Generation(tuple(ids), self._without_media, "stop", prompt_len=length)

    def _generate_alone(self, request: Request) -> Generation | LapilliError:
        try:
            return self.plain.generate([request])[0]
        except LapilliError as error:
            return error

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

"""How a loaded model answers prompts: through the engine, or by the plain loop where that must be.

    greedy, sampled                    Engine     features, prefixes and blocks are shared
    beams, foreign language models     generate()/stream() with a KV cache per conversation

Knows ready prompts; must not know messages, templates or the conversation before.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lapilli.checkpoint.load import Loaded
from lapilli.config.generation import SamplingParams
from lapilli.errors import LapilliError
from lapilli.generate.engine import Engine, EngineOptions, Request
from lapilli.generate.engine.request import EngineStream
from lapilli.generate.output import Generation, Piece
from lapilli.generate.reference import Stream, generate, stream
from lapilli.nn.kv_cache import KVCache
from lapilli.pipeline.memory import Memory
from lapilli.pipeline.ready import ReadyPrompt
from lapilli.prompt.message import MediaPart


class Told(Iterator[Piece]):
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


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that is on its way.

    Attributes:
        pieces: to be pulled.
        cache: of the plain loop; afterwards it holds prompt and answer.
        positions: what stands at the positions of the prompt, for that cache.
    """

    pieces: Stream | EngineStream | Told
    cache: KVCache | None = None
    positions: Sequence[int] = ()

    @property
    def keys(self) -> tuple[int, ...]:
        """What the engine keeps it under; nothing of the plain loop."""
        return self.pieces.handle.keys if isinstance(self.pieces, EngineStream) else ()


class Answering:
    """Prompts in, answers out.

    Args:
        loaded: model, tokenizer, configuration.
        options: of the engine.
        without_media: the answer to every prompt without a picture, where the checkpoint says one;
            "": the model answers those too.
    """

    def __init__(
        self, loaded: Loaded, options: EngineOptions | None = None, without_media: str = ""
    ) -> None:
        self._loaded = loaded
        self._options = options
        self._without_media = without_media
        self._making = threading.Lock()
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """Made when it is first needed.

        Raises:
            UnsupportedModelError: a language model of another library.
        """
        with self._making:
            if self._engine is None:
                self._engine = Engine(
                    self._loaded.model,
                    self._loaded.tokenizer,
                    eos_ids=self._eos_ids,
                    context_length=self.context_length,
                    options=self._options,
                )
            return self._engine

    @property
    def context_length(self) -> int:
        """Most positions of prompt and answer."""
        config = self._loaded.config
        return max(config.context_length, config.text.max_positions)

    def start(
        self,
        prompt: ReadyPrompt,
        media: Sequence[MediaPart],
        memory: Memory,
        params: SamplingParams,
    ) -> Reply:
        """One answer, piece by piece.

        Args:
            prompt: what to answer.
            media: the parts of the conversation that stand for the prompt's spans.
            memory: of the conversation; it knows them all.
            params: how to choose tokens.
        """
        told = self._told(prompt)
        if told is not None:
            return Reply(Told(told))
        if self._has_engine(params):
            return Reply(self.engine.stream(self._request(prompt, params)))
        with torch.inference_mode():
            memory.embed_new(self._loaded.model)
            items = [memory.item(part) for part in media]
            fused = self._loaded.model.embed_prompts([prompt.encoded], [items])
        positions, cache = memory.positions(prompt.encoded, media), None
        if params.num_beams == 1:
            cache = memory.take_cache(positions) or self._loaded.model.language_model.new_cache(
                1, len(positions) + params.max_new_tokens
            )
        pieces = stream(
            self._loaded.model,
            fused,
            params,
            tokenizer=self._loaded.tokenizer,
            prompt_ids=[self._seen_ids(prompt)],
            eos_ids=self._eos_ids,
            context_length=self.context_length,
            cache=cache,
        )
        return Reply(pieces, cache, positions)

    def answer_all(
        self, prompts: Sequence[ReadyPrompt], params: SamplingParams
    ) -> list[Generation]:
        """The answers, each as if it were the only one."""
        told = [self._told(prompt) for prompt in prompts]
        asked = [prompt for prompt, known in zip(prompts, told, strict=True) if known is None]
        answers = iter(self._answer_with_model(asked, params))
        return [next(answers) if known is None else known for known in told]

    def _told(self, prompt: ReadyPrompt) -> Generation | None:
        """The answer to a prompt that no model is needed for."""
        if not self._without_media or prompt.encoded.spans:
            return None
        ids = self._loaded.tokenizer.encode(self._without_media, add_bos=False)
        length = len(prompt.encoded.input_ids)
        return Generation(tuple(ids), self._without_media, "stop", prompt_len=length)

    def _answer_with_model(
        self, prompts: Sequence[ReadyPrompt], params: SamplingParams
    ) -> list[Generation]:
        if not prompts:
            return []
        if self._has_engine(params):
            return self.engine.run(self._request(prompt, params) for prompt in prompts)
        with torch.inference_mode():
            fused = self._loaded.model.embed_prompts(
                [prompt.encoded for prompt in prompts], [prompt.media for prompt in prompts]
            )
        return generate(
            self._loaded.model,
            fused,
            params,
            tokenizer=self._loaded.tokenizer,
            prompt_ids=[self._seen_ids(prompt) for prompt in prompts],
            eos_ids=self._eos_ids,
            context_length=self.context_length,
        )

    def as_completed(
        self, prompts: Iterable[ReadyPrompt | LapilliError], params: SamplingParams
    ) -> Iterator[tuple[int, Generation | LapilliError]]:
        """Number and answer of every prompt as it is finished; errors keep their number."""
        asked: list[int] = []
        known: list[tuple[int, Generation | LapilliError]] = []

        def to_ask() -> Iterator[ReadyPrompt]:
            for number, prompt in enumerate(prompts):
                if isinstance(prompt, LapilliError):
                    known.append((number, prompt))
                    continue
                told = self._told(prompt)
                if told is not None:
                    known.append((number, told))
                    continue
                asked.append(number)
                yield prompt

        if self._has_engine(params):
            requests = (self._request(prompt, params) for prompt in to_ask())
            answers = self.engine.as_completed(requests)
        else:
            answers = enumerate(self._alone(prompt, params) for prompt in to_ask())
        for at, answer in answers:
            while known:
                yield known.pop()
            yield asked[at], answer
        yield from known

    def _alone(self, prompt: ReadyPrompt, params: SamplingParams) -> Generation | LapilliError:
        try:
            return self.answer_all([prompt], params)[0]
        except LapilliError as error:
            return error

    def _has_engine(self, params: SamplingParams) -> bool:
        return params.num_beams == 1 and self._loaded.model.language_model.supports_varlen

    def _request(self, prompt: ReadyPrompt, params: SamplingParams) -> Request:
        return Request(prompt.encoded, prompt.media, params, seen_ids=self._seen_ids(prompt))

    def _seen_ids(self, prompt: ReadyPrompt) -> list[int]:
        """What the repetition penalty counts as seen: the text and the image token, if any.

        As the transformers library does, whose prompts hold that token once per visual position.
        """
        image_id = self._loaded.config.tokens.image_id
        if image_id is None or not prompt.encoded.spans:
            return prompt.text_ids
        return [*prompt.text_ids, image_id]

    @property
    def _eos_ids(self) -> tuple[int, ...] | None:
        return self._loaded.config.tokens.eos_ids or None

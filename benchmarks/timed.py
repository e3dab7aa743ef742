"""A Chat's engine as something to be timed: pictures as bytes, texts as ids, no end token.

Knows how a question becomes a request and how much work it is; must not know which figures are
taken of it.
"""

import time
from collections.abc import Sequence
from typing import cast

import torch
from PIL import Image
from torch import nn

from lapilli.config.generation import SamplingParams
from lapilli.config.model import DecoderConfig, TextConfig
from lapilli.errors import UnsupportedModelError
from lapilli.generate.engine import Engine, EngineOptions, Request, RequestHandle
from lapilli.modality.image.image import ImageModality
from lapilli.modality.image.pixels import PreparedImage
from lapilli.pipeline.chat import Chat
from lapilli.plan.flops import projector_operations, tower_operations
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span

BOS = 1


class CountingText:
    """Stands in for the tokenizer: every token is one character, so none waits for the next."""

    eos_id: int | None = None
    special_ids: frozenset[int] = frozenset()

    def token_bytes(self, token_id: int) -> bytes:
        """One character, whatever the token."""
        del token_id
        return b"."

    def decode(self, ids: Sequence[int]) -> str:
        """As many characters as tokens."""
        return "." * len(ids)


class TimedChat:
    """Answers (pictures, text ids) through an engine of its own and notes when tokens came.

    Args:
        chat: a loaded model that sees pictures.
        options: of the engine; None: nothing is guessed ahead, since greedy answers of models with
            random weights run in circles, which prompt lookup would turn into a false gain.

    Raises:
        UnsupportedModelError: the model reads text only.
    """

    def __init__(self, chat: Chat, *, options: EngineOptions | None = None) -> None:
        self._model = chat.model
        modality = chat.model.modality("image")
        if not isinstance(modality, ImageModality):
            raise UnsupportedModelError(f"{chat.name}: only pictures are timed")
        self._modality = modality
        self._config = chat.config
        self._bos = BOS if chat.config.tokens.bos_id is None else chat.config.tokens.bos_id
        self.engine = Engine(
            chat.model,
            CountingText(),
            eos_ids=(),
            context_length=chat.engine.context_length,
            options=options or EngineOptions(speculate="off"),
        )

    @property
    def side(self) -> int:
        """Pixels of a picture's side."""
        return self._modality.vision.image_size

    @property
    def facts(self) -> dict[str, float]:
        """Bytes of weights that one decoded token reads."""
        language_model = cast("nn.Module", self._model.language_model)
        return {"weight_bytes": float(linear_bytes(language_model))}

    def work(self, text: int) -> dict[str, float]:
        """Positions and operations of a prompt of one picture and so many positions of text."""
        [item] = self._request([bytes(3 * self.side**2)], [], SamplingParams()).media
        positions = self._modality.num_tokens(item) + text
        return {
            "positions": float(positions),
            "prompt_operations": prompt_operations(self._config.text, positions),
            "tower_operations": len(item.pixel_values) * self._tile_operations(),
        }

    def _tile_operations(self) -> float:
        """Of the tower and the projector on one tile."""
        vision, projector = self._modality.vision, self._config.projector
        joined = 0.0 if projector is None else projector_operations(vision, projector)
        return tower_operations(vision) + joined

    @torch.inference_mode()
    def look(self, picture: bytes) -> None:
        """The tower and the projector alone."""
        self._modality.embed([self._prepare(picture)])

    def answer(
        self, questions: Sequence[tuple[Sequence[bytes], Sequence[int]]], new_tokens: int
    ) -> list[list[float]]:
        """All questions at the same time; per token the seconds from the call.

        Args:
            questions: pictures and text ids of each.
            new_tokens: of each answer.
        """
        started = time.perf_counter()
        params = SamplingParams(max_new_tokens=new_tokens)
        handles = [self.engine.submit(self._request(*each, params)) for each in questions]
        times: list[list[float]] = [[] for _ in handles]
        while not all(handle.is_finished for handle in handles):
            self.engine.step()
            now = time.perf_counter() - started
            counts = [_count_new(handle) for handle in handles]
            self.note(sum(counts))
            for row, count in zip(times, counts, strict=True):
                row += [now] * count
        for handle in handles:
            _ = handle.generation  # raises what went wrong
        return times

    def note(self, count: int) -> None:
        """Called after every step with the tokens that were chosen in it."""

    def _request(
        self, pictures: Sequence[bytes], text: Sequence[int], params: SamplingParams
    ) -> Request:
        items = [self._prepare(picture) for picture in pictures]
        ids, spans = [self._bos], []
        for item in items:
            spans.append(Span(0, len(ids), self._modality.num_tokens(item)))
            ids += [PLACEHOLDER] * spans[-1].length
        ids += text
        return Request(EncodedPrompt(ids, [False] * len(ids), tuple(spans)), tuple(items), params)

    def _prepare(self, picture: bytes) -> PreparedImage:
        size = (self.side, self.side)
        return self._modality.prepare(Image.frombytes("RGB", size, picture))


def _count_new(handle: RequestHandle) -> int:
    piece = handle.take()
    return 0 if piece is None else len(piece.token_ids)


def linear_bytes(language_model: nn.Module) -> int:
    """Bytes of all matrices of a language model that every token is multiplied by."""
    total = 0
    embeddings = 0
    has_head = False
    for name, module in language_model.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        size = sum(tensor.nbytes for tensor in tensors)
        if isinstance(module, nn.Embedding):
            embeddings = max(embeddings, size)
        elif hasattr(module, "out_features"):
            total += size
            has_head |= name.endswith("lm_head")
    return total if has_head else total + embeddings  # tied: the head reads the embeddings


def prompt_operations(config: TextConfig, positions: int) -> float:
    """Operations (two per multiply-add) that reading a prompt takes, logits of the end included."""
    width, layers = config.hidden_size, config.num_layers
    heads = config.num_heads * config.head_dim
    if isinstance(config, DecoderConfig):
        inner = 3 * width * config.intermediate_size
    else:
        inner = 2 * config.expansion_ratio * width * width
    matrices = 2 * width * (heads + config.num_kv_heads * config.head_dim) + inner
    attention = positions * positions * heads  # the causal half of scores and sums
    linear = positions * matrices * layers + config.vocab_size * width
    return 2.0 * (linear + attention * layers)

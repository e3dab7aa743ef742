"""Sequence: a request while the engine works on it, and the validation of requests.

Request --InputProcessor: everything that can be refused is refused here--> Sequence
Sequence --Scheduler--> ScheduledSequence: the tokens that it computes in one step
"""

import hashlib
from collections.abc import Collection
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import count
from numbers import Integral
from typing import Any

import torch

from lapilli.config.generation import SamplingParams
from lapilli.errors import FusionError, GenerationError, MediaCountMismatchError, RequestError
from lapilli.generate.engine.block_pool import BlockPool, BlockTable, media_keys
from lapilli.generate.engine.feature_cache import media_digest
from lapilli.generate.engine.request import Request, RequestHandle
from lapilli.generate.grammar import CompiledGrammar, compiled
from lapilli.generate.output import GenerationState, TokenBytes, TokenLogprob
from lapilli.generate.reference import check_context
from lapilli.generate.sampler import SamplingState, check_logit_bias
from lapilli.generate.speculative import IsWorth, Proposer
from lapilli.lm import Memory
from lapilli.model import VisionLanguageModel
from lapilli.nn.paged import MOST_TOGETHER
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.shapes import Float, Tensor

MOST_DRAFT_TOKENS = MOST_TOGETHER - 1
"""In one pass, of one sequence: more positions would take a slower way through the model."""


class Sequence:
    """Prompt and answer of one request.

    Args:
        handle: gets the pieces of the answer.
        answer: the empty answer.
        digests: of every medium of the prompt.
        order: number of the request since the engine was made.
        grammar: of the request's options.
    """

    def __init__(
        self,
        handle: RequestHandle,
        answer: GenerationState,
        *,
        digests: Items[bytes],
        order: int,
        grammar: CompiledGrammar | None = None,
    ) -> None:
        self.handle = handle
        self.answer = answer
        self.prompt: EncodedPrompt = handle.request.prompt
        self.media: tuple[Any, ...] = handle.request.media
        self.digests = tuple(digests)
        self.grammar = grammar
        self.rank = (-handle.request.priority, order)
        self.prompt_length = len(self.prompt.input_ids)
        self.tokens = list(self.prompt.input_ids)
        self.keys = position_keys(self.prompt, digests)
        self.features: list[Float[Tensor, "n D"] | None] = [None] * len(self.prompt.spans)
        self.memories: dict[int, Memory] = {}
        """Of media beside the sequence by number, once their features are known."""
        self.chain: tuple[bytes, ...] = ()
        """Digests of the beginnings of the prompt (BlockPool.chain)."""
        self.table: BlockTable | None = None
        self.length = 0
        """Tokens whose keys and values are computed."""
        self.is_stale = any(span.start == self.prompt_length for span in self.prompt.spans)
        """The model changed meanwhile, or only the answer sees a medium, which no key of a token
        tells: so its keys and values are not shared."""
        self.is_open = False
        """It is being changed; after an interrupt such a sequence fails."""
        self.sampling: SamplingState | None = None
        """None until it is admitted."""
        self.proposer: Proposer | None = None

    @property
    def num_uncomputed_tokens(self) -> int:
        """Number of tokens that the model has not seen yet; 1 while the answer is decoded."""
        return len(self.tokens) - self.length

    @property
    def is_decoding(self) -> bool:
        """True once the prompt is computed and the answer has begun."""
        return len(self.tokens) > self.prompt_length

    @property
    def is_looking(self) -> bool:
        """True where media stand beside the sequence."""
        return any(span.length == 0 for span in self.prompt.spans)

    @property
    def num_needed_positions(self) -> int:
        """Length of prompt and longest answer; its last token is never computed."""
        return self.prompt_length + self.answer.limit - 1

    @property
    def blocks(self) -> list[int]:
        """The blocks of its keys and values; none before it is admitted."""
        return [] if self.table is None else self.table.blocks

    def propose(self, is_worth: IsWorth) -> list[int]:
        """Return draft tokens, as many as the answer has room for at most."""
        most = min(MOST_DRAFT_TOKENS, self.answer.limit - self.answer.num_tokens - 1)
        if self.proposer is None or most < 1:
            return []
        return self.proposer.propose(self.keys, most, is_worth)

    def push(self, token_id: int, report: TokenLogprob | None = None) -> None:
        """Add one more token of the answer."""
        self.tokens.append(token_id)
        self.keys.append(token_id)
        is_whole = self.sampling is not None and self.sampling.is_over
        self.answer.push(token_id, report, is_whole=is_whole)


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence in a step: its next `count` tokens are computed, then its draft tokens."""

    sequence: Sequence
    count: int
    draft: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Positions of this step."""
        return self.count + len(self.draft)

    @property
    def is_sampled(self) -> bool:
        """True when its last token is computed, so that the next one can be sampled."""
        return self.count == self.sequence.num_uncomputed_tokens

    @property
    def tokens(self) -> list[int]:
        """The tokens that go through the model."""
        row = self.sequence
        return [*row.tokens[row.length : row.length + self.count], *self.draft]


def position_keys(prompt: EncodedPrompt, digests: Items[bytes]) -> list[int]:
    """Return the key of every position: a token id, or a number below zero in a medium.

    The first position that sees a medium beside the sequence has such a number too, so that nothing
    behind it is shared with a prompt that has another.
    """
    keys = list(prompt.input_ids)
    media = list(zip(prompt.spans, digests, strict=True))
    for span, digest in media:
        keys[span.start : span.start + span.length] = media_keys(digest, span.length)
    for span, digest in media:
        if span.length == 0 and span.start < len(keys):
            both = hashlib.sha256(digest + f"{keys[span.start]:x}".encode()).digest()
            [keys[span.start]] = media_keys(both, 1)
    return keys


class InputProcessor:
    """Validation of requests, in any thread: everything that can be refused is refused here."""

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: TokenBytes,
        *,
        eos_ids: Collection[int] | None,
        context_length: int,
        pool: BlockPool,
    ) -> None:
        self._model = model
        self._config = model.language_model.config
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._context_length = context_length
        self._pool = pool
        self._order = count()

    def new_sequence(self, request: Request, handle: RequestHandle) -> Sequence:
        """Return a new sequence; raises what Engine.submit documents."""
        self._check(request, handle)
        grammar = compiled(request.params.grammar, self._tokenizer, self._config.vocab_size)
        prompt, params = request.prompt, request.params
        room = check_context(
            len(prompt.input_ids),
            self._context_length,
            visual=sum(span.length for span in prompt.spans),
        )
        answer = GenerationState(
            self._tokenizer,
            params,
            eos_ids=self._eos_ids,
            room=room,
            prompt_len=len(prompt.input_ids),
        )
        digests = [
            media_digest(span.modality, item)
            for span, item in zip(prompt.spans, request.media, strict=True)
        ]
        sequence = Sequence(
            handle, answer, digests=digests, order=next(self._order), grammar=grammar
        )
        if self._pool.blocks_for(sequence.num_needed_positions) > self._pool.capacity:
            raise GenerationError(
                f"the prompt has {len(prompt.input_ids)} tokens and the answer may have "
                f"{answer.limit}, the engine has memory for "
                f"{self._pool.capacity * self._pool.block_size} in all: allow a shorter answer, "
                "shorten the prompt, or give the engine more memory (kv_bytes; of a server "
                "--cache-bytes)"
            )
        return sequence

    def _check(self, request: Request, handle: RequestHandle) -> None:
        """Check everything that would fail in the middle of a step with other requests."""
        prompt, params = request.prompt, request.params
        if handle.request is not request:
            raise RequestError("the handle was made for another request: make one for this")
        if not (isinstance(params, SamplingParams) and isinstance(prompt, EncodedPrompt)):
            raise RequestError(
                "a request holds an EncodedPrompt and SamplingParams, this one "
                f"{type(prompt).__name__} and {type(params).__name__}"
            )
        if params.num_beams > 1:
            raise GenerationError(
                f"num_beams {params.num_beams}: the engine does not search by beams, leave it at 1"
            )
        check_logit_bias(params, self._config.vocab_size)
        if not is_whole(request.priority):
            raise RequestError(f"priority must be a whole number, got {request.priority!r}")
        if not len(prompt.input_ids):
            raise GenerationError("the prompt has no tokens, not even a first one")
        check_ids("the prompt", prompt.input_ids, self._config.vocab_size)
        if request.seen_ids is not None:
            check_ids("seen_ids", request.seen_ids, self._config.vocab_size)
        if len(prompt.spans) != len(request.media):
            raise MediaCountMismatchError(
                f"the prompt has {len(prompt.spans)} places for media but {len(request.media)} "
                "items were given"
            )
        check_spans(prompt.spans, len(prompt.input_ids))
        for span, item in zip(prompt.spans, request.media, strict=True):
            self._check_medium(span, item)

    def _check_medium(self, span: Span, item: Any) -> None:  # noqa: ANN401
        """Check that an item was made by its modality, and is as long as its span."""
        self._model.modality(span.modality)
        is_beside = span.modality in self._model.attended
        if (span.length == 0) is not is_beside:
            raise FusionError(
                f"the {span.modality} at position {span.start}: the span has {span.length} "
                f"positions, and features of this modality stand "
                f"{'beside' if is_beside else 'in'} the sequence"
            )
        if isinstance(item, Tensor):
            check_given_features(item, span, self._config.hidden_size)
            return
        try:
            length = self._model.span_length(span.modality, item)
        except Exception as error:  # a modality may be any code
            raise RequestError(
                f"the {span.modality} at position {span.start} is a {type(item).__name__}, which "
                f"its modality cannot count ({error}): pass what its prepare() returned, or "
                "features"
            ) from error
        if length != span.length:
            raise FusionError(
                f"the {span.modality} at position {span.start}: the span has {span.length} "
                f"positions, the item takes {length}"
            )


def is_whole(value: object) -> bool:
    """Return whether this is an integer of Python or numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_ids(name: str, ids: Items[Any], vocab_size: int) -> None:
    """Check that the embeddings have a row for every id.

    Raises:
        RequestError: one of them is no whole number from 0 to the vocabulary's last.
    """
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return  # nearly always, and quicker than one by one
    for at, token in enumerate(ids):
        if not (is_whole(token) and 0 <= token < vocab_size):
            raise RequestError(
                f"{name}: {token!r} at place {at} is no token id, which are the whole numbers from "
                f"0 to {vocab_size - 1}"
            )


def check_spans(spans: Items[Span], length: int) -> None:
    """Check that spans lie inside the prompt and side by side.

    Raises:
        RequestError: one does not, or is no span.
    """
    end = 0
    for span in spans:
        fits = isinstance(span, Span) and is_whole(span.start) and is_whole(span.length)
        if not (fits and span.length >= 0 and end <= span.start <= length - span.length):
            raise RequestError(
                f"{span}: spans are {length} positions of the prompt or fewer, in their order and "
                f"side by side at most; this one may begin at {end}"
            )
        end = span.start + span.length


def check_features(features: Tensor, span: Span, width: int) -> None:
    """Check that features have the shape that their span was counted for.

    Raises:
        FusionError: another shape.
    """
    is_beside = span.length == 0 and features.ndim == 2 and len(features) > 0
    if tuple(features.shape) != (len(features) if is_beside else span.length, width):
        raise FusionError(
            f"the {span.modality} at position {span.start}: the span has {span.length} positions "
            f"of width {width}, the features are {list(features.shape)}"
        )


def check_given_features(features: Tensor, span: Span, width: int) -> None:
    """Check features that a request brings: shape, dtype, finite numbers.

    Raises:
        FusionError: another shape.
        RequestError: no floating point numbers in memory, or not all of them finite.
    """
    check_features(features, span, width)
    is_plain = features.layout == torch.strided and not features.is_meta
    if not (is_plain and features.is_floating_point() and bool(features.isfinite().all())):
        raise RequestError(
            f"the features at position {span.start} must be finite floating point numbers, got "
            f"{features.dtype} on {features.device} with NaN, infinity, or nothing in memory"
        )

"""From a request to a sequence: everything that can be refused is refused here, at once."""

from collections.abc import Collection
from collections.abc import Sequence as Items
from itertools import count
from numbers import Integral
from typing import Any

import torch

from lapilli.config.generation import SamplingParams
from lapilli.errors import FusionError, GenerationError, MediaCountMismatchError, RequestError
from lapilli.generate.detokenizer import TokenBytes
from lapilli.generate.engine.block_pool import BlockPool
from lapilli.generate.engine.feature_cache import media_digest
from lapilli.generate.engine.media import check_features
from lapilli.generate.engine.request import Request, Ticket
from lapilli.generate.engine.sequence import Sequence
from lapilli.generate.output import Answer
from lapilli.generate.reference import check_context
from lapilli.model.vlm import VisionLanguageModel
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.shapes import Tensor


class Arrivals:
    """Checks requests and makes sequences of them, in any thread.

    Args:
        model: whose vocabulary and modalities count.
        tokenizer: turns ids into text.
        eos_ids: end tokens.
        context_length: most positions of prompt and answer.
        pool: what a sequence must fit into.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: TokenBytes,
        *,
        eos_ids: Collection[int],
        context_length: int,
        pool: BlockPool,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        self._context_length = context_length
        self._pool = pool
        self._order = count()

    def new_sequence(self, request: Request, ticket: Ticket) -> Sequence:
        """A sequence that has not begun.

        Raises:
            ContextTooLongError: the prompt leaves no room for a single token.
            MediaCountMismatchError: another number of media than of spans.
            FusionError: a medium that does not fit its span.
            UnsupportedModelError: a modality that the model does not have.
            RequestError: ids, spans or options that the model cannot work with.
            GenerationError: beams, no tokens, or too large for the memory.
        """
        self._check(request, ticket)
        prompt, params = request.prompt, request.params
        room = check_context(
            len(prompt.input_ids),
            self._context_length,
            visual=sum(span.length for span in prompt.spans),
        )
        answer = Answer(
            self._tokenizer,
            params,
            stop_ids=self._eos_ids | frozenset(params.stop_token_ids),
            limit=min(params.max_new_tokens, room),
            prompt_len=len(prompt.input_ids),
        )
        digests = [
            media_digest(span.modality, item)
            for span, item in zip(prompt.spans, request.media, strict=True)
        ]
        sequence = Sequence(ticket, answer, digests=digests, order=next(self._order))
        needed = self._pool.blocks_for(sequence.positions_needed)
        if needed > self._pool.capacity:
            size = self._pool.block_size
            raise GenerationError(
                f"prompt and answer may take {sequence.positions_needed} positions, the engine has "
                f"memory for {self._pool.capacity * size}: lower max_new_tokens "
                f"({params.max_new_tokens}) or raise EngineOptions(kv_bytes=...)"
            )
        return sequence

    def _check(self, request: Request, ticket: Ticket) -> None:
        """Refuse what would fail later, in the middle of a step with others; see new_sequence."""
        prompt, params = request.prompt, request.params
        if ticket.request is not request:
            raise RequestError("the ticket was made for another request: make one for this")
        if not (isinstance(params, SamplingParams) and isinstance(prompt, EncodedPrompt)):
            raise RequestError(
                "a request holds an EncodedPrompt and SamplingParams, this one "
                f"{type(prompt).__name__} and {type(params).__name__}"
            )
        if params.num_beams > 1:
            raise GenerationError(
                f"num_beams {params.num_beams}: the engine does not search by beams, use generate()"
            )
        if not is_whole(request.priority):
            raise RequestError(f"priority must be a whole number, got {request.priority!r}")
        if not len(prompt.input_ids):
            raise GenerationError("the prompt has no tokens, not even a first one")
        vocabulary = self._model.language_model.config.vocab_size
        check_ids("the prompt", prompt.input_ids, vocabulary)
        if request.seen_ids is not None:
            check_ids("seen_ids", request.seen_ids, vocabulary)
        if len(prompt.spans) != len(request.media):
            raise MediaCountMismatchError(
                f"the prompt has {len(prompt.spans)} places for media but {len(request.media)} "
                "items were given"
            )
        check_spans(prompt.spans, len(prompt.input_ids))
        for span, item in zip(prompt.spans, request.media, strict=True):
            self._check_medium(span, item)

    def _check_medium(self, span: Span, item: Any) -> None:  # noqa: ANN401
        """Refuse an item that its modality did not make, or of another length than its span."""
        modality = self._model.modality(span.modality)
        if isinstance(item, Tensor):
            check_given_features(item, span, self._model.language_model.config.hidden_size)
            return
        try:
            length = modality.num_tokens(item)
        except Exception as error:  # a modality may be anybody's, and meet anything
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
    """Whether this is an integer of Python or numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_ids(name: str, ids: Items[Any], vocabulary: int) -> None:
    """Refuse ids that the embeddings have no row for.

    Raises:
        RequestError: one of them is no whole number from 0 to the vocabulary's last.
    """
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocabulary:
        return  # nearly always, and quicker than one by one
    for at, token in enumerate(ids):
        if not (is_whole(token) and 0 <= token < vocabulary):
            raise RequestError(
                f"{name}: {token!r} at place {at} is no token id, which are the whole numbers from "
                f"0 to {vocabulary - 1}"
            )


def check_spans(spans: Items[Span], length: int) -> None:
    """Refuse spans that reach out of the prompt or over each other.

    Raises:
        RequestError: one does, or is no span.
    """
    end = 0
    for span in spans:
        fits = isinstance(span, Span) and is_whole(span.start) and is_whole(span.length)
        if not (fits and span.length > 0 and end <= span.start <= length - span.length):
            raise RequestError(
                f"{span}: spans are {length} positions of the prompt or fewer, at least one each, "
                f"in their order and side by side at most; this one may begin at {end}"
            )
        end = span.start + span.length


def check_given_features(features: Tensor, span: Span, width: int) -> None:
    """Refuse features that somebody computed before, where they are no numbers for their span.

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


def readable_context(model: VisionLanguageModel, wanted: int | None) -> int:
    """Most positions of a sequence in the engine.

    Note: with dynamic NTK scaling every longer pass turns the keys of a sequence differently, so
    beyond the trained length the result would depend on how a prompt is cut; there the limit is
    the trained length.
    """
    config = model.language_model.config
    length = config.max_positions if wanted is None else wanted
    scaling = getattr(config, "rope_scaling", None)
    if scaling is not None and scaling.kind == "dynamic":
        return min(length, config.max_positions)
    return length

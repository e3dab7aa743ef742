"""From a request to a sequence: everything that can be refused is refused here, at once."""

from collections.abc import Collection
from itertools import count

from lapilli.errors import GenerationError, MediaCountMismatchError
from lapilli.generate.answer import Answer
from lapilli.generate.cache.blocks import BlockPool
from lapilli.generate.cache.identity import media_digest
from lapilli.generate.engine.request import Request, Ticket
from lapilli.generate.engine.sequence import Sequence
from lapilli.generate.run import check_context
from lapilli.generate.text import TokenBytes
from lapilli.model.vlm import VisionLanguageModel


class Arrivals:
    """Checks requests and makes sequences of them, in any thread.

    Args:
        tokenizer: turns ids into text.
        eos_ids: end tokens.
        context_length: most positions of prompt and answer.
        pool: what a sequence must fit into.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        *,
        eos_ids: Collection[int],
        context_length: int,
        pool: BlockPool,
    ) -> None:
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
            GenerationError: beams, no tokens, or too large for the memory.
        """
        prompt, params = request.prompt, request.params
        if params.num_beams > 1:
            raise GenerationError(
                f"num_beams {params.num_beams}: the engine does not search by beams, use generate()"
            )
        if not prompt.input_ids:
            raise GenerationError("the prompt has no tokens, not even a first one")
        if len(prompt.spans) != len(request.media):
            raise MediaCountMismatchError(
                f"the prompt has {len(prompt.spans)} places for media but {len(request.media)} "
                "items were given"
            )
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

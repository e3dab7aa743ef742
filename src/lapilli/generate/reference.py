"""From a fused prompt to answers: greedy, sampled or by beams, at once or as a stream.

Knows tokens and when they end; must not know pictures, templates or files.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from lapilli.config.generation import SamplingParams
from lapilli.errors import ContextTooLongError, GenerationError
from lapilli.generate.beam import BeamRow, search
from lapilli.generate.decode import Decoding
from lapilli.generate.detokenizer import SettlingText, TokenBytes
from lapilli.generate.output import Answer
from lapilli.generate.outputs import Generation, Piece
from lapilli.generate.sampler import choose, report_logprobs, row_generators
from lapilli.generate.stop import StopStrings
from lapilli.lm.base import LanguageModel
from lapilli.model.outputs import FusedBatch
from lapilli.model.vlm import VisionLanguageModel
from lapilli.nn.kv_cache import KVCache
from lapilli.shapes import Bool, Float, Tensor

__all__ = ["Generation", "Piece", "Stream", "check_context", "generate", "stream"]

# What `next` returns when nothing follows; a step itself is None.
OVER = object()


def generate(
    model: VisionLanguageModel,
    batch: FusedBatch,
    params: SamplingParams,
    *,
    tokenizer: TokenBytes,
    prompt_ids: Sequence[Sequence[int]] | None = None,
    eos_ids: Collection[int] | None = None,
    context_length: int | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Generation]:
    """One answer per row; rows of unequal length are fine, each is answered as if it were alone.

    Args:
        model: the model.
        batch: prompts, padded on the left.
        params: how to choose tokens and when to stop.
        tokenizer: turns ids into text.
        prompt_ids: token ids of each row's prompt text, which the repetition penalty then counts as
            seen, as the transformers library does when it is given ids. None: only new tokens
            count, as in the original, whose generation sees embeddings only.
        eos_ids: end tokens of the model; None: the tokenizer's. An empty collection: none.
        context_length: most positions of prompt and answer; None: what the language model reads.
        cancelled: asked after every token; True ends all answers with finish_reason `cancelled`.

    Raises:
        ContextTooLongError: a prompt leaves no room for a single token.
    """
    setting = Setting.of(model.language_model, tokenizer, params, eos_ids, context_length)
    answers = setting.new_answers(batch)
    steps = setting.grow(batch, answers, prompt_ids=prompt_ids)
    for _ in steps:
        if cancelled is not None and cancelled():
            steps.close()
    return [answer.result() for answer in answers]


class Stream(Iterator[Piece]):
    """The answer of one row, piece by piece; the texts together are the text of `generate`.

    `close` cancels: no further step is taken and the KV cache is let go. With beams there is one
    piece at the end, because the best beam is not known before.
    """

    def __init__(self, steps: Generator[None, None, None], answer: Answer) -> None:
        self._steps = steps
        self._answer = answer
        self._is_over = False

    def __next__(self) -> Piece:
        """The next piece."""
        while not self._is_over:
            self._is_over = next(self._steps, OVER) is OVER
            piece = self._answer.take()
            if piece is not None:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Cancel what has not been generated yet."""
        self._is_over = True
        self._steps.close()

    @property
    def generation(self) -> Generation:
        """The answer so far; asked before its end, the answer is cancelled."""
        self.close()
        return self._answer.result()


def stream(
    model: VisionLanguageModel,
    batch: FusedBatch,
    params: SamplingParams,
    *,
    tokenizer: TokenBytes,
    prompt_ids: Sequence[Sequence[int]] | None = None,
    eos_ids: Collection[int] | None = None,
    context_length: int | None = None,
    cache: KVCache | None = None,
) -> Stream:
    """The answer of one row, piece by piece.

    Args:
        model: the model.
        batch: one row.
        params: how to choose tokens and when to stop.
        tokenizer: turns ids into text.
        prompt_ids: see `generate`.
        eos_ids: see `generate`.
        context_length: see `generate`.
        cache: may hold the first positions of this very prompt, which are then not read again;
            afterwards it holds prompt and answer, without the answer's last token. Not for beams.

    Raises:
        ContextTooLongError: the prompt leaves no room for a single token.
        GenerationError: the batch has more than one row, or a cache was given for beams.
    """
    rows = batch.inputs_embeds.shape[0]
    if rows != 1:
        raise GenerationError(f"stream() answers one row, this batch has {rows}: use generate()")
    if cache is not None and params.num_beams > 1:
        raise GenerationError(
            f"num_beams {params.num_beams} with a cache of one row: beams need a cache of their own"
        )
    setting = Setting.of(model.language_model, tokenizer, params, eos_ids, context_length)
    answers = setting.new_answers(batch)
    return Stream(setting.grow(batch, answers, prompt_ids=prompt_ids, cache=cache), answers[0])


def check_context(positions: int, context_length: int, *, row: int = 0, visual: int = 0) -> int:
    """Tokens that an answer may have after a prompt of so many positions.

    Args:
        positions: of the prompt, every visual token counted.
        context_length: most positions of prompt and answer.
        row: named in the error.
        visual: how many of the positions are visual; named in the error.

    Raises:
        ContextTooLongError: there is no room for a single token.
    """
    room = context_length - positions
    if room < 1:
        seen = f", {visual} of them visual tokens" if visual else ""
        raise ContextTooLongError(
            f"the prompt of row {row} has {positions} positions{seen}, but prompt and answer "
            f"together may have {context_length}: shorten the text or send fewer or smaller images"
        )
    return room


@dataclass(frozen=True, slots=True)
class Setting:
    """What all rows of one call share."""

    language_model: LanguageModel
    tokenizer: TokenBytes
    params: SamplingParams
    stop_ids: frozenset[int]
    context_length: int

    @classmethod
    def of(
        cls,
        language_model: LanguageModel,
        tokenizer: TokenBytes,
        params: SamplingParams,
        eos_ids: Collection[int] | None,
        context_length: int | None,
    ) -> "Setting":
        """The setting, with the model's own values where the caller gave none."""
        if eos_ids is None:
            eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        if context_length is None:
            context_length = language_model.config.max_positions
        stop_ids = frozenset(eos_ids) | frozenset(params.stop_token_ids)
        return cls(language_model, tokenizer, params, stop_ids, context_length)

    def new_answers(self, batch: FusedBatch) -> list[Answer]:
        """An empty answer per row, limited to what the context leaves."""
        lengths = batch.attention_mask.sum(dim=1).tolist()
        return [
            Answer(
                self.tokenizer,
                self.params,
                stop_ids=self.stop_ids,
                limit=min(
                    self.params.max_new_tokens,
                    check_context(length, self.context_length, row=row),
                ),
                prompt_len=length,
            )
            for row, length in enumerate(lengths)
        ]

    def grow(
        self,
        batch: FusedBatch,
        answers: Sequence[Answer],
        *,
        prompt_ids: Sequence[Sequence[int]] | None,
        cache: KVCache | None = None,
    ) -> Generator[None, None, None]:
        """Add one token to every unfinished answer per turn, until all are finished."""
        rows, length = batch.attention_mask.shape
        longest = max(answer.limit for answer in answers)
        if cache is None:
            cache = self.language_model.new_cache(rows, length + longest)
        decoding = Decoding(self.language_model, batch, cache, room=longest)
        del batch  # the embeddings of the prompt are not needed after the prefill
        logits = decoding.prefill()
        seen = None
        if self.params.repetition_penalty != 1:
            seen = seen_tokens(prompt_ids or (), logits)
        if self.params.num_beams > 1:
            yield from self._grow_beams(decoding, logits, answers, seen)
        else:
            yield from self._grow_tokens(decoding, logits, answers, seen)

    def _grow_tokens(
        self,
        decoding: Decoding,
        logits: Float[Tensor, "B V"],
        answers: Sequence[Answer],
        seen: Bool[Tensor, "B V"] | None,
    ) -> Generator[None, None, None]:
        params = self.params
        active = list(answers)
        # Greedy draws nothing, so it leaves torch's global random source alone.
        draws = params.temperature > 0
        generators = row_generators(len(active) if draws else 0, params.seed, logits.device)
        while True:
            tokens = choose(logits, params, generators, seen=seen)
            token_ids = tokens.tolist()
            if params.logprobs is None:
                for answer, token_id in zip(active, token_ids, strict=True):
                    answer.push(token_id)
            else:
                reports = report_logprobs(logits, token_ids, params.logprobs)
                for answer, report in zip(active, reports, strict=True):
                    answer.push(report.token_id, report)
            yield
            if seen is not None:
                seen = seen.scatter(1, tokens.unsqueeze(1), True)
            going = [at for at, answer in enumerate(active) if not answer.is_finished]
            if not going:
                return
            if len(going) < len(active):
                active = [active[at] for at in going]
                generators = [generators[at] for at in going] if draws else []
                tokens = tokens[going]
                seen = None if seen is None else seen[going]
                decoding.take(going)
            logits = decoding.advance(tokens)

    def _grow_beams(
        self,
        decoding: Decoding,
        logits: Float[Tensor, "B V"],
        answers: Sequence[Answer],
        seen: Bool[Tensor, "B V"] | None,
    ) -> Generator[None, None, None]:
        params = self.params
        draws = params.temperature > 0
        count = len(answers)
        generators = row_generators(count, params.seed, logits.device) if draws else [None] * count
        rows = [
            BeamRow(params.num_beams, params.length_penalty, self._ending(answer.limit), generator)
            for answer, generator in zip(answers, generators, strict=True)
        ]
        try:
            yield from search(
                decoding, logits, rows, params, num_stop_ids=len(self.stop_ids), seen=seen
            )
        finally:
            for answer, row in zip(answers, rows, strict=True):
                answer.score, best = row.best()
                reports = best.reports or [None] * len(best.token_ids)
                for token_id, report in zip(best.token_ids, reports, strict=True):
                    answer.push(token_id, report)

    def _ending(self, limit: int) -> Callable[[Sequence[int]], bool]:
        """Whether a beam of these tokens is a whole answer."""

        def ends(token_ids: Sequence[int]) -> bool:
            if len(token_ids) >= limit or token_ids[-1] in self.stop_ids:
                return True
            if not self.params.stop:
                return False
            stops, text = StopStrings(self.params.stop), SettlingText(self.tokenizer)
            for token_id in token_ids:
                stops.push(text.push(token_id))
            return stops.found is not None

        return ends


def seen_tokens(
    prompt_ids: Sequence[Sequence[int]], logits: Float[Tensor, "B V"]
) -> Bool[Tensor, "B V"]:
    """Which tokens the repetition penalty applies to before the first new token."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, token_ids in enumerate(prompt_ids):
        seen[row, list(token_ids)] = True
    return seen

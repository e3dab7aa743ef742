"""Reference decode loop: from a fused prompt to answers, greedy, sampled or by beams.

    DecodingBatch    passes over a padded batch: prefill, then one token per row at a time
    generate         all rows to their end      stream    one row, piece by piece

The plain loop that the engine is compared with; beams, and language models that cannot run rows of
several lengths at once, are decoded by it. A model is run by one thread at a time: engines and the
plain loop hold the same lock in every pass. Must not know pictures, templates or files.
"""

import os
import threading
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Sequence

import torch

from lapilli.config.generation import SamplingParams
from lapilli.errors import ContextTooLongError, GenerationError
from lapilli.generate.beam import BeamRow, search
from lapilli.generate.grammar import CompiledGrammar, compiled
from lapilli.generate.output import Generation, GenerationState, Piece, TokenBytes
from lapilli.generate.sampler import (
    Sampler,
    SamplingState,
    check_logit_bias,
    logits_processors,
    new_generator,
)
from lapilli.lm import LanguageModel
from lapilli.model import FusedBatch, VisionLanguageModel
from lapilli.nn.kv_cache import KVCache
from lapilli.shapes import Float, Int, Tensor


class ModelLock:
    """Lock of one language model; the thread that holds it may take it again.

    Taken as `with lock.turn:`, never through a function: an interrupt between call and `with` would
    leave it locked for good.
    """

    def __init__(self) -> None:
        self.turn = threading.RLock()

    def reset(self) -> None:
        """Unlock in a forked process, which has none of the threads that held it."""
        self.turn = threading.RLock()


_LOCKS: weakref.WeakKeyDictionary[object, ModelLock] = weakref.WeakKeyDictionary()
_FINDING = ModelLock()


def lock_of(language_model: object) -> ModelLock:
    """Return the lock of this language model, the same one for all callers."""
    with _FINDING.turn:
        return _LOCKS.setdefault(language_model, ModelLock())


def _reset_locks() -> None:
    for lock in (_FINDING, *_LOCKS.values()):
        lock.reset()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_reset_locks)


class DecodingBatch:
    """The rows of a batch while they are decoded: cache, mask and positions of the next step.

    Args:
        language_model: any.
        batch: the prompts.
        cache: empty, or holding the first `cache.length` positions of these very rows, which are
            then not computed again.
        room: most tokens that may follow the prompt.
    """

    def __init__(
        self, language_model: LanguageModel, batch: FusedBatch, cache: KVCache, *, room: int
    ) -> None:
        self._language_model = language_model
        self._lock = lock_of(language_model)
        self._room = room
        self._batch: FusedBatch | None = batch
        self._memory = batch.memory
        self.cache = cache
        # Counted, not read from the last column: prepared rows of compat may end in padding.
        self._positions = batch.attention_mask.sum(dim=1, keepdim=True) - 1
        # None where nothing is padded: attention is faster without a mask.
        self._mask = None if bool(batch.attention_mask.all()) else batch.attention_mask

    @torch.inference_mode()
    def prefill(self) -> Float[Tensor, "B V"]:
        """Return the logits after the prompt, whose embeddings are released."""
        batch, self._batch = self._batch, None
        if batch is None:
            raise RuntimeError("this prompt was prefilled before")
        start = self.cache.length
        with self._lock.turn:
            hidden = self._language_model.forward(
                batch.inputs_embeds[:, start:],
                position_ids=batch.position_ids[:, start:],
                attention_mask=self._mask,
                cache=self.cache,
                memory=self._memory,
            )
            # Only the last position: the head is the widest matrix of a small model.
            logits = self._language_model.logits(hidden[:, -1])
        self._positions = self._positions + 1
        if self._mask is not None:
            # Allocated once for all steps; a step takes a longer view of it.
            rows, length = self._mask.shape
            grown = self._mask.new_ones(rows, length + self._room)
            grown[:, :length] = self._mask
            self._mask = grown
        return logits

    @torch.inference_mode()
    def advance(self, token_ids: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Return the logits after one more token of every row."""
        mask = None if self._mask is None else self._mask[:, : self.cache.length + 1]
        with self._lock.turn:
            hidden = self._language_model.forward(
                self._language_model.embed(token_ids.unsqueeze(1)),
                position_ids=self._positions,
                attention_mask=mask,
                cache=self.cache,
                memory=self._memory,
            )
            logits = self._language_model.logits(hidden[:, -1])
        self._positions += 1
        return logits

    @torch.inference_mode()
    def take(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row may be named more than once."""
        index = torch.tensor(rows, device=self._positions.device)
        self.cache.reorder(index)
        self._positions = self._positions[index]
        if self._memory is not None:
            self._memory = self._memory.take(index)
        if self._mask is not None:
            self._mask = self._mask[index]


OVER = object()  # returned by `next` when the steps have ended; a step itself is None


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
    """Return one answer per row, each as if its row were alone.

    Args:
        model: the model.
        batch: prompts, padded on the left.
        params: how to sample tokens and when to stop.
        tokenizer: turns ids into text.
        prompt_ids: token ids of each row's prompt text, which the repetition penalty counts as
            seen, as the transformers library does when it is given ids. None: only new tokens
            count, as in the original, which generates from embeddings.
        eos_ids: end tokens of the model; None: the tokenizer's. An empty collection: none.
        context_length: most tokens of prompt and answer; None: what the language model reads.
        cancelled: asked after every token; True ends all answers with finish_reason `cancelled`.

    Raises:
        ContextTooLongError: a prompt leaves no room for a single token.
        GenerationError: a bias for a token that the model does not have, or a grammar that cannot
            be followed.
    """
    answers = new_answers(model, batch, params, tokenizer, eos_ids, context_length)
    grammar = compiled(params.grammar, tokenizer, model.language_model.config.vocab_size)
    steps = decode(
        model.language_model, batch, params, answers, prompt_ids=prompt_ids, grammar=grammar
    )
    for _ in steps:
        if cancelled is not None and cancelled():
            steps.close()
    return [answer.result() for answer in answers]


class Stream(Iterator[Piece]):
    """The answer of one row, piece by piece; the texts together are the text of `generate`.

    `close` cancels: no further step is taken and the KV cache is released. With beams there is one
    piece at the end, because the best beam is not known before.
    """

    def __init__(self, steps: Generator[None, None, None], answer: GenerationState) -> None:
        self._steps = steps
        self._answer = answer
        self._is_over = False

    def __next__(self) -> Piece:
        """Return the next piece."""
        while not self._is_over:
            self._is_over = next(self._steps, OVER) is OVER
            piece = self._answer.take()
            if piece is not None:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Cancel the rest of the answer."""
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
    """Return the answer of one row as an iterator of its pieces; the options are `generate`'s.

    `cache` may hold the first positions of this very prompt, which are not computed again; in the
    end it holds prompt and answer, without the answer's last token. Not for beams.

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
    answers = new_answers(model, batch, params, tokenizer, eos_ids, context_length)
    language_model = model.language_model
    grammar = compiled(params.grammar, tokenizer, language_model.config.vocab_size)
    steps = decode(
        language_model,
        batch,
        params,
        answers,
        prompt_ids=prompt_ids,
        cache=cache,
        grammar=grammar,
    )
    return Stream(steps, answers[0])


def check_context(
    num_tokens: int, context_length: int, *, row: int | None = None, visual: int = 0
) -> int:
    """Return how many tokens an answer may have after a prompt.

    Args:
        num_tokens: of the prompt, every visual token counted.
        context_length: most tokens of prompt and answer.
        row: of a batch, named in the error.
        visual: how many of the tokens are visual; named in the error.

    Raises:
        ContextTooLongError: there is no room for a single token.
    """
    room = context_length - num_tokens
    if room < 1:
        seen = f", {visual} of them visual tokens" if visual else ""
        place = "" if row is None else f" of row {row}"
        raise ContextTooLongError(
            f"the prompt{place} has {num_tokens} tokens{seen}, but prompt and answer "
            f"together may have {context_length}: shorten the text or send fewer or smaller images"
        )
    return room


def new_answers(
    model: VisionLanguageModel,
    batch: FusedBatch,
    params: SamplingParams,
    tokenizer: TokenBytes,
    eos_ids: Collection[int] | None,
    context_length: int | None,
) -> list[GenerationState]:
    """Return an empty answer per row, limited to what the context leaves; see `generate`."""
    config = model.language_model.config
    check_logit_bias(params, config.vocab_size)
    most = config.max_positions if context_length is None else context_length
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return [
        GenerationState(
            tokenizer,
            params,
            eos_ids=eos_ids,
            room=check_context(length, most, row=row if len(lengths) > 1 else None),
            prompt_len=length,
        )
        for row, length in enumerate(lengths)
    ]


def decode(
    language_model: LanguageModel,
    batch: FusedBatch,
    params: SamplingParams,
    answers: Sequence[GenerationState],
    *,
    prompt_ids: Sequence[Sequence[int]] | None,
    cache: KVCache | None = None,
    grammar: CompiledGrammar | None = None,
) -> Generator[None, None, None]:
    """Add one token to every unfinished answer per turn, until all are finished.

    `grammar` is that of the params.
    """
    rows, length = batch.attention_mask.shape
    longest = max(answer.limit for answer in answers)
    if cache is None:
        cache = language_model.new_cache(rows, length + longest)
    decoding = DecodingBatch(language_model, batch, cache, room=longest)
    del batch  # the embeddings of the prompt are not needed after the prefill
    logits = decoding.prefill()
    seen = prompt_ids or [()] * rows
    if params.num_beams > 1:
        yield from _decode_beams(decoding, logits, params, answers, seen)
    else:
        yield from _decode_tokens(decoding, logits, params, answers, seen, grammar)


def _decode_tokens(
    decoding: DecodingBatch,
    logits: Float[Tensor, "B V"],
    params: SamplingParams,
    answers: Sequence[GenerationState],
    prompt_ids: Sequence[Sequence[int]],
    grammar: CompiledGrammar | None,
) -> Generator[None, None, None]:
    vocab_size, device = logits.shape[-1], logits.device
    active = []
    for answer, seen in zip(answers, prompt_ids, strict=True):
        matcher = None if grammar is None else grammar.matcher(answer.stop_ids)
        state = SamplingState(params, vocab_size, device, prompt_ids=seen, matcher=matcher)
        active.append((answer, state))
    while True:
        sampler = Sampler(logits)
        sampler.constrain([(row, state, ()) for row, (_, state) in enumerate(active)])
        token_ids: list[int] = []
        for row, (answer, state) in enumerate(active):
            token_id, report = sampler.sample(row, state)
            answer.push(token_id, report, is_whole=state.is_over)
            token_ids.append(token_id)
        yield
        going = [row for row, (answer, _) in enumerate(active) if not answer.is_finished]
        if not going:
            return
        if len(going) < len(active):
            active = [active[row] for row in going]
            decoding.take(going)
        tokens = torch.tensor([token_ids[row] for row in going], device=device)
        logits = decoding.advance(tokens)


def _decode_beams(
    decoding: DecodingBatch,
    logits: Float[Tensor, "B V"],
    params: SamplingParams,
    answers: Sequence[GenerationState],
    prompt_ids: Sequence[Sequence[int]],
) -> Generator[None, None, None]:
    (_, vocab_size), device = logits.shape, logits.device
    rows = [
        BeamRow(
            params.num_beams,
            params.length_penalty,
            answer.ends,
            new_generator(params.seed, device) if params.temperature > 0 else None,
        )
        for answer in answers
    ]
    processors = logits_processors(params, prompt_ids, vocab_size, device)
    num_stop_ids = len(answers[0].stop_ids)
    try:
        yield from search(
            decoding, logits, rows, params, num_stop_ids=num_stop_ids, processors=processors
        )
    finally:
        for answer, row in zip(answers, rows, strict=True):
            answer.score, best = row.best()
            reports = best.reports or [None] * len(best.token_ids)
            for token_id, report in zip(best.token_ids, reports, strict=True):
                answer.push(token_id, report)

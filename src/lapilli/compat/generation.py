"""generate() of transformers over our own generation: its options, its return values, its padding.

embeds, mask -> FusedBatch --generate/run.py--> answers -> rows [BOS, new tokens ..., pad ...]
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from lapilli.compat.beams import search_until
from lapilli.compat.foreign import Foreign
from lapilli.compat.image_processor import BatchFeature
from lapilli.compat.tokenizer import PreTrainedTokenizer
from lapilli.config.generation import SamplingParams
from lapilli.errors import GenerationError
from lapilli.generate.reference import GenerationContext
from lapilli.model.outputs import FusedBatch
from lapilli.model.vlm import VisionLanguageModel
from lapilli.shapes import Float, Int, Tensor

NO_LIMIT = 1 << 40

Criterion = Callable[[Tensor, None], Any]
"""Ids of all rows, scores (not kept) -> stop, for all rows together or one by one."""

# Taken from callers and not needed: we always have a cache (quirk 1: so has the original).
IGNORED = frozenset({"use_cache", "output_scores", "output_attentions", "output_hidden_states"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Options of transformers' generate, with its defaults or those of generation_config.json."""

    do_sample: bool = False
    num_beams: int = 1
    temperature: int | float | None = 1.0
    top_p: int | float | None = 1.0
    top_k: int | None = 50
    min_p: int | float | None = None
    repetition_penalty: int | float = 1.0
    length_penalty: int | float = 1.0
    max_length: int = 20
    max_new_tokens: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    early_stopping: bool = False
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False

    def __post_init__(self) -> None:
        if self.early_stopping is not False:
            raise GenerationError("early_stopping is not False: lapilli's beam search has no other")
        if self.num_return_sequences != 1:
            raise GenerationError(
                f"num_return_sequences is {self.num_return_sequences}: lapilli returns the best one"
            )

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "GenerationDefaults":
        """What a generation_config.json says of the options here; other keys are not read."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in raw.items() if key in known})

    def updated(self, options: Mapping[str, Any]) -> "GenerationDefaults":
        """The defaults with a call's options laid over them.

        Raises:
            GenerationError: an option that lapilli does not have.
        """
        known = {field.name for field in fields(self)}
        unknown = sorted(set(options) - known - IGNORED)
        if unknown:
            raise GenerationError(
                f"generate() has no option {', '.join(unknown)} here: choose from "
                f"{', '.join(sorted(known | IGNORED))}"
            )
        return replace(self, **{key: value for key, value in options.items() if key in known})

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        if self.eos_token_id is None:
            return ()
        if isinstance(self.eos_token_id, int):
            return (self.eos_token_id,)
        return tuple(self.eos_token_id)

    def sampling(self) -> SamplingParams:
        """The same for our sampler; without do_sample the filters say nothing."""
        # max_length counts the BOS in front of the new tokens.
        limit = self.max_new_tokens or max(self.max_length - 1, 1)
        greedy = SamplingParams(
            max_new_tokens=limit,
            num_beams=self.num_beams,
            repetition_penalty=self.repetition_penalty,
            length_penalty=self.length_penalty,
        )
        if not self.do_sample:
            return greedy
        return greedy.updated(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=None if self.top_p in (None, 1.0) else self.top_p,
            top_k=self.top_k or None,
            min_p=self.min_p,
        )


class GenerateOutput(BatchFeature):
    """`sequences`, and with beams `sequences_scores`."""


def generate(
    model: VisionLanguageModel,
    embeds: Float[Tensor, "B T D"],
    mask: Tensor | None,
    tokenizer: PreTrainedTokenizer,
    *,
    defaults: GenerationDefaults,
    options: Mapping[str, Any],
) -> Int[Tensor, "B N"] | GenerateOutput:
    """BOS and new tokens of every row, shorter rows filled with the pad token.

    Args:
        model: ours.
        embeds: prepared rows.
        mask: False or 0 for padding, None when nothing is padding.
        tokenizer: for the ids that the configuration does not name.
        defaults: what generation_config.json says.
        options: what the caller says, `streamer` and `stopping_criteria` included.

    Raises:
        GenerationError: an option that lapilli does not have, or a streamer with beams.
    """
    called = dict(options)
    streamer = called.pop("streamer", None)
    criteria = list(called.pop("stopping_criteria", None) or ())
    setting = defaults.updated(called)
    if streamer is not None and setting.num_beams > 1:
        raise GenerationError("a streamer with beams: the best beam is not known before the end")
    job = _Job(
        batch=as_batch(embeds, mask),
        ours=GenerationContext.of(
            model.language_model, tokenizer.inner, setting.sampling(), setting.eos_ids, NO_LIMIT
        ),
        bos=_first(setting.bos_token_id, tokenizer.bos_token_id, 0),
        pad=_first(setting.pad_token_id, *setting.eos_ids, 0),
    )
    found: Sequence[tuple[float | None, tuple[int, ...]]]
    if setting.num_beams > 1 and criteria:
        found = search_until(
            job.ours, job.batch, bos=job.bos, pad=job.pad, stops=partial(_stops, criteria)
        )
    else:
        found = job.answer(streamer, criteria)
    sequences = as_rows([ids for _, ids in found], job.bos, job.pad).to(embeds.device)
    if not setting.return_dict_in_generate:
        return sequences
    if setting.num_beams == 1:
        return GenerateOutput(sequences=sequences)
    return GenerateOutput(
        sequences=sequences, sequences_scores=torch.tensor([score for score, _ in found])
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One call, in our terms."""

    batch: FusedBatch
    ours: GenerationContext
    bos: int
    pad: int

    def answer(
        self, streamer: Foreign, criteria: Sequence[Criterion]
    ) -> list[tuple[float | None, tuple[int, ...]]]:
        """Score and tokens of every row.

        Note: repetition counts the BOS, as in the original, where it is the only id before the
            answer.
        """
        answers = self.ours.new_answers(self.batch)
        start = [[self.bos]] * len(answers)
        if streamer is not None:
            streamer.put(torch.tensor(start))
        for _ in self.ours.decode(self.batch, answers, prompt_ids=start):
            if streamer is None and not criteria:
                continue
            rows = as_rows([answer.token_ids for answer in answers], self.bos, self.pad)
            if streamer is not None:
                streamer.put(rows[:, -1])
            if _stops(criteria, rows):
                break
        if streamer is not None:
            streamer.end()
        return [(answer.score, answer.token_ids) for answer in answers]


def as_batch(embeds: Float[Tensor, "B T D"], mask: Tensor | None) -> FusedBatch:
    """Prepared rows as generation takes them.

    Note: quirk 5. Rows may be padded on the right; positions are counted without padding, and
        padding stands at position 1, as transformers counts them. Without a mask padding is text.
    """
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    mask = mask.bool()
    positions = (mask.long().cumsum(dim=1) - 1).masked_fill(~mask, 1)
    return FusedBatch(embeds, mask, positions)


def as_rows(answers: Sequence[Sequence[int]], bos: int, pad: int) -> Int[Tensor, "B N"]:
    """BOS, the tokens of every answer, and padding up to the longest one."""
    longest = max(map(len, answers))
    rows = [[bos, *ids, *[pad] * (longest - len(ids))] for ids in answers]
    return torch.tensor(rows, dtype=torch.long)


def _stops(criteria: Iterable[Criterion], rows: Int[Tensor, "B N"]) -> bool:
    """Whether one of the criteria says so of every row."""
    return any(bool(torch.as_tensor(criterion(rows, None)).all()) for criterion in criteria)


def _first(*candidates: int | None) -> int:
    """The first id that is there."""
    return next(candidate for candidate in candidates if candidate is not None)

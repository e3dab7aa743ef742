"""Sample encoder: samples become token ids with a loss mask, and prepared media.

    Sample --media/fetch, prepare--> media --lengths--.
       '------template.render--> segments ------------+--encode--> EncodedPrompt, cut to max_length

Knows templates, tokenizers and modalities. `plan_encoder` makes an encoder for a checkpoint whose
weights are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lapilli.checkpoint.load import attach_tokenizer
from lapilli.checkpoint.read.assemble import build_model
from lapilli.checkpoint.read.plan import make_plan
from lapilli.checkpoint.template import choose_for
from lapilli.config.reader import shown
from lapilli.errors import PromptError
from lapilli.modality.image.decode import Alpha, to_rgb
from lapilli.model import VisionLanguageModel
from lapilli.pipeline.stores import Stores
from lapilli.prompt.choose import Template
from lapilli.prompt.encode import EncodedPrompt, encode
from lapilli.prompt.message import MediaPart
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.train.data.sample import Sample
from lapilli.train.data.source import fetch_picture


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample as the model learns from it.

    Attributes:
        media: what `prepare` made of every medium, in the order of the spans.
        cut: positions that max_length took off the end.
        skipped: why the samples that this one stands in for could not be read.
    """

    prompt: EncodedPrompt
    media: tuple[Any, ...] = ()
    id: str = ""
    cut: int = 0
    skipped: tuple[str, ...] = ()


@runtime_checkable
class EncodesSamples(Protocol):
    """A SampleEncoder, or what adds more to a sample, such as a teacher's view of it."""

    def encode(self, sample: Sample) -> EncodedSample:
        """Return the encoded sample; DataError where it has none."""
        ...


class SampleEncoder:
    """An encoder of samples for one model.

    Args:
        tokenizer: of the language model.
        template: makes text of the turns, with the answers marked.
        model: its modalities prepare and count the media; weights are not used.
        max_length: positions that a sample may have; None: any number.
        image_id: the vocabulary's own image token, in checkpoints of Hugging Face's layout.
        alpha: what becomes of the transparency of pictures, see `to_rgb`.
        stores: of modalities, whose ids stand for media.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        model: VisionLanguageModel,
        max_length: int | None = None,
        *,
        image_id: int | None = None,
        alpha: Alpha = "drop",
        stores: Stores | None = None,
    ) -> None:
        self.tokenizer, self._template, self._model = tokenizer, template, model
        self._max_length, self._image_id = max_length, image_id
        self.alpha, self._stores = alpha, stores

    def encode(self, sample: Sample) -> EncodedSample:
        """Return the sample as the model learns from it.

        Raises:
            DataError: a medium that cannot be read or lies across the end, turns that the template
                cannot have, no supervised token, or one that the embeddings have no row for.
        """
        with sample.named_in_errors():
            media = tuple(self.prepare(part) for part in sample.media)
            prompt = self.encode_prompt(sample, self.count(sample, media))
            kept = cut(prompt, self._max_length)
            _check_supervised(prompt, kept)
            self._check_ids(kept)
        return EncodedSample(kept, media[: len(kept.spans)], sample.id, len(prompt) - len(kept))

    def _check_ids(self, prompt: EncodedPrompt) -> None:
        """Refuse ids of added tokens that the files give and the weights know nothing of."""
        rows = self._model.language_model.config.vocab_size
        largest = max(prompt.input_ids, default=0)
        if largest >= rows:
            raise PromptError(
                f"the token {shown(self.tokenizer.id_to_token(largest))} has the id {largest}, and "
                f"the embeddings have {rows} rows: the tokenizer belongs to other weights"
            )

    def count(self, sample: Sample, media: Sequence[Any]) -> list[int]:
        """Return the positions of every prepared medium of a sample; 0 of one beside it."""
        return [
            self._model.span_length(part.modality, item)
            for part, item in zip(sample.media, media, strict=True)
        ]

    def encode_prompt(self, sample: Sample, lengths: Sequence[int]) -> EncodedPrompt:
        """Return ids, loss mask and spans, from the number of positions of every medium alone.

        Raises:
            PromptError: turns that the template cannot have.
        """
        segments = self._template.render(sample.messages, open_turn=False)
        return encode(segments, self.tokenizer, lengths, image_id=self._image_id)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Return the names of the modalities that the checkpoint declares."""
        return declared_names(self._model)

    def prepare(self, part: MediaPart) -> Any:  # noqa: ANN401 - every modality has its own
        """Return a medium prepared for its modality.

        Raises:
            MediaError: it cannot be read, or is none of its modality.
            StoreError: an id that the modality's store does not have.
        """
        modality = self._model.modality(part.modality)
        if self._stores is not None and self._stores.has_id(part.modality, part.source):
            return self._stores.look_up(part.modality, part.source)
        if part.modality != "image":
            return modality.prepare(part.source)
        fetched = fetch_picture(part.source)
        return modality.prepare(to_rgb(fetched.data, alpha=self.alpha, name=fetched.name))


def declared_names(model: VisionLanguageModel) -> tuple[str, ...]:
    """Return the names of a model's modalities besides "image"."""
    return tuple(name for name in model.modalities if name != "image")


def cut(prompt: EncodedPrompt, max_length: int | None) -> EncodedPrompt:
    """Return the first `max_length` positions.

    Raises:
        PromptError: the end would lie inside a medium.

    Source: LLaVA train.py, DataCollatorForSupervisedDataset, and llava_arch.py, which cuts the
        fused row.
    Note: the original cuts through pictures too; here that is an error.
    """
    if max_length is None or len(prompt) <= max_length:
        return prompt
    for span in prompt.spans:
        if span.start < max_length < span.start + span.length:
            raise PromptError(
                f"max_length {max_length} would cut through the {span.modality} at positions "
                f"{span.start} to {span.start + span.length} (the sample has {len(prompt)}): raise "
                "max_length, or leave the sample out"
            )
    return EncodedPrompt(
        prompt.input_ids[:max_length],
        prompt.loss_mask[:max_length],
        tuple(span for span in prompt.spans if span.start < max_length),
    )


def _check_supervised(whole: EncodedPrompt, kept: EncodedPrompt) -> None:
    """Refuse a sample without a supervised token; nothing predicts the first one."""
    if any(kept.loss_mask[1:]):
        return
    if any(whole.loss_mask[1:]):
        raise PromptError(
            f"no supervised token is left of {len(whole)} positions after max_length "
            f"{len(kept)}: raise max_length, or leave the sample out"
        )
    raise PromptError("no supervised token: every answer in it is empty")


@dataclass(frozen=True, slots=True)
class PlannedEncoder:
    """A SampleEncoder without a length limit, its template and the checkpoint's context length."""

    encoder: SampleEncoder
    template: Template
    context_length: int


def plan_encoder(
    checkpoint: str | Path, *, base: str | None = None, template: str | None = None
) -> PlannedEncoder:
    """Return an encoder for a checkpoint, of which only the small files are fetched.

    Args:
        checkpoint: a directory, a hub id or "pebble".
        base: see `load_checkpoint`.
        template: another one than the checkpoint's own.

    Raises:
        CheckpointError: files are missing or damaged.
        ConfigError: config.json cannot be followed.
        PromptError: no template has this name.
    """
    plan = make_plan(checkpoint, base=base, fetch=False)
    chosen = choose_for(plan, template).template
    model, image_id = build_model(plan.config), plan.config.tokens.image_id
    attach_tokenizer(model, plan.tokenizer)
    encoder = SampleEncoder(plan.tokenizer, chosen, model, image_id=image_id)
    return PlannedEncoder(encoder, chosen, plan.config.max_length or plan.config.context_length)

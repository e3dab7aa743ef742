"""The vision language model: modalities and a language model, joined by `fuse`.

    prompts --pad left, embed--> text [B, T, D] --.
    media   --tower, projector-> [n_i, D] --.-----+-- fuse --> FusedBatch --> hidden --> logits
                                            '-- remember --> memory, which positions look at

The features of every item go over its own span, counted before any copy; those of a modality that
is attended to have a span of length 0, and stand beside the sequence. Knows ids, spans and vectors;
no strings, no files, no pixels.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lapilli.errors import (
    ConfigError,
    FusionError,
    MediaCountMismatchError,
    PromptError,
    UnsupportedModelError,
)
from lapilli.lm import LanguageModel, Memory
from lapilli.lm.cross_attention import ENDLESS
from lapilli.modality import Modality
from lapilli.nn.kv_cache import KVCache
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True, slots=True)
class FusedBatch:
    """Rows of text and media vectors, ready for the language model.

    Rows end together: padding stands on the left, so that the next token of every row has the
    same index. Positions are counted without padding.

    Attributes:
        inputs_embeds: vectors of all positions.
        attention_mask: False for padding.
        position_ids: 0, 1, ... from the first real position of each row; 0 under padding.
        memory: features that stand beside the rows; None where there are none.
    """

    inputs_embeds: Float[Tensor, "B T D"]
    attention_mask: Bool[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    memory: Memory | None = None


def fuse(
    text: Float[Tensor, "B T D"], features: Sequence[Float[Tensor, "_ _"]], spans: Sequence[Span]
) -> Float[Tensor, "B T D"]:
    """Write every item's features over its span in the text embeddings.

    Args:
        text: embeddings of all positions; values under a span are ignored.
        features: one [n_i, D] tensor per span, in the order of `spans`; those of a span of length
            0 are left for `remember`.
        spans: where each item goes.

    Raises:
        FusionError: the number of items, an item's length or its width differs from its span, or
            a span leaves its row or covers another one.

    Source: LLaVA (arXiv 2304.08485) section 4.1; stands for the split-and-concatenate loop of
    prepare_inputs_labels_for_multimodal.
    """
    _check_features(text, features, spans)
    features = [item for item, span in zip(features, spans, strict=True) if span.length]
    if not features:
        return text
    rows = [span.row for span in spans for _ in range(span.length)]
    columns = [span.start + i for span in spans for i in range(span.length)]
    index = torch.tensor([rows, columns], device=text.device)  # [2, M]
    values = torch.cat([item.to(text.device, text.dtype) for item in features])
    return text.index_put((index[0], index[1]), values)


def _check_features(text: Tensor, features: Sequence[Tensor], spans: Sequence[Span]) -> None:
    if len(features) != len(spans):
        raise FusionError(f"{len(spans)} spans in the prompt but {len(features)} media items")
    batch, length, width = text.shape
    for i, (item, span) in enumerate(zip(features, spans, strict=True)):
        where = f"item {i} (row {span.row}, position {span.start})"
        is_beside = span.length == 0 and item.ndim == 2 and len(item) > 0
        if tuple(item.shape) != (len(item) if is_beside else span.length, width):
            raise FusionError(
                f"{where}: the span has {span.length} positions of width {width}, "
                f"the features are {list(item.shape)}"
            )
        if not (0 <= span.row < batch and 0 <= span.start <= length - span.length):
            raise FusionError(
                f"{where}: a span of {span.length} positions does not lie inside "
                f"{batch} rows of {length} positions"
            )
    ordered = sorted(spans, key=lambda span: (span.row, span.start, span.length))
    for before, after in pairwise(ordered):
        if before.row == after.row and before.start + before.length > after.start:
            raise FusionError(
                f"row {after.row}: the span at position {after.start} begins inside the span of "
                f"{before.length} positions at {before.start}"
            )


def remember(
    text: Float[Tensor, "B T D"],
    features: Sequence[Float[Tensor, "_ D"]],
    spans: Sequence[Span],
    ends: Sequence[int] = (),
) -> Memory | None:
    """Return the features of spans of length 0, which stand beside the rows; None without any.

    A position sees what has its place at or before it: what stands before a medium does not depend
    on it, as if it stood in the sequence.

    Args:
        text: embeddings of all positions.
        features: one [n_i, D] tensor per span, checked by `fuse`.
        spans: places of the items.
        ends: of every span the end of the sample that it belongs to, where rows hold several.
    """
    ends = ends or [ENDLESS] * len(spans)
    beside = [i for i, span in enumerate(spans) if span.length == 0]
    if not beside:
        return None
    places = [(spans[i].row, spans[i].start, ends[i]) for i in beside]
    return Memory.of_rows([features[i] for i in beside], places, rows=len(text), like=text)


class VisionLanguageModel(nn.Module):
    """A language model and the modalities that it reads, by name.

    Parameters are named `language_model.*`, `modalities.image.vision_tower.*`,
    `modalities.image.projector.*`, `modalities.image.image_newline`, `modalities.NAME.*`.

    Args:
        language_model: any; one with gated blocks where a modality is attended to.
        modalities: by name.
        attended: names of those that take no position and are looked at from between the layers.

    Raises:
        ConfigError: a modality whose name torch has for itself.

    Source: LLaVA (arXiv 2304.08485) section 4.1.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        modalities: Mapping[str, Modality] | None = None,
        *,
        attended: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.language_model: LanguageModel = language_model
        self.modalities = nn.ModuleDict()
        self.attended = frozenset[str]()
        for name, modality in (modalities or {}).items():
            self.add_modality(name, modality, attended=name in attended)

    def add_modality(
        self, name: str, modality: Modality | nn.Module, *, attended: bool = False
    ) -> None:
        """Give the model a modality, or another one in its place.

        Raises:
            ConfigError: a name that torch has for itself.
        """
        if hasattr(nn.ModuleDict, name):
            raise ConfigError(
                f"a modality is called {name!r}, which torch's ModuleDict has for itself: choose "
                "another word"
            )
        self.modalities[name] = modality  # type: ignore[assignment]  # modules that follow the protocol
        self.attended = self.attended | {name} if attended else self.attended - {name}

    def modality(self, name: str) -> Modality:
        """Return the modality of this name.

        Raises:
            UnsupportedModelError: the model has none of this name.
        """
        if name not in self.modalities:
            known = ", ".join(self.modalities) or "none, it reads text only"
            raise UnsupportedModelError(f"the model has no modality {name!r}; it has: {known}")
        return self.modalities[name]  # type: ignore[return-value]  # see __init__

    def span_length(self, name: str, item: Any) -> int:  # noqa: ANN401  see Modality.prepare
        """Return the positions that a prepared item, or its features, take in a prompt.

        0 of a modality that is attended to.

        Raises:
            UnsupportedModelError: the model has no modality of this name.
            PromptError: the item has no features.
        """
        is_ready = isinstance(item, Tensor)
        number = len(item) if is_ready else self.modality(name).num_tokens(item)
        if number < 1:
            raise PromptError(f"every medium needs at least one feature, {name} has {number}")
        return 0 if name in self.attended else number

    @property
    def device(self) -> torch.device:
        """Return where the prompts go."""
        return next(self.parameters()).device

    def embed_prompts(
        self, prompts: Sequence[EncodedPrompt], media: Sequence[Sequence[Any]] | None = None
    ) -> FusedBatch:
        """Return rows of vectors, padded on the left, every media item over its span.

        Args:
            prompts: one per row.
            media: per row, one item per span of that row in their order: what the modality's
                `prepare` returned, or features [n, D] that stand for it. None: no media.

        Raises:
            PromptError: no rows, or a row without tokens.
            MediaCountMismatchError: a row has another number of items than of spans.
            FusionError: an item's features do not fit its span.
            UnsupportedModelError: a span of a modality that the model does not have.

        Note:
            The items of all rows go through their encoder together; the original loses its place
            when rows have different numbers of images, here every row keeps its own.
        """
        media = [[] for _ in prompts] if media is None else media
        _check_media(prompts, media)
        ids, attention_mask, position_ids = _pad_left(prompts, self.device)
        longest = ids.shape[1]
        spans = [
            Span(row, longest - len(prompt.input_ids) + span.start, span.length, span.modality)
            for row, prompt in enumerate(prompts)
            for span in prompt.spans
        ]
        items = [item for row in media for item in row]
        text = self.language_model.embed(ids)
        features = self._features(items, spans)
        fused = fuse(text, features, spans)
        return FusedBatch(fused, attention_mask, position_ids, remember(text, features, spans))

    def _features(self, items: Sequence[Any], spans: Sequence[Span]) -> list[Tensor]:
        """Return features of every item; each modality embeds all of its items at once."""
        features: dict[int, Tensor] = {}
        waiting: dict[str, list[int]] = {}
        for i, (item, span) in enumerate(zip(items, spans, strict=True)):
            if isinstance(item, Tensor):
                features[i] = item
            else:
                waiting.setdefault(span.modality, []).append(i)
        for name, places in waiting.items():
            embedded = self.modality(name).embed([items[i] for i in places])
            features.update(zip(places, embedded, strict=True))
        return [features[i] for i in range(len(items))]

    def forward(self, batch: FusedBatch, cache: KVCache | None = None) -> Float[Tensor, "B T D"]:
        """Return hidden states of every position after the final norm; with a cache, a prefill.

        Args:
            batch: rows padded on the left.
            cache: an empty cache that the positions are appended to.
        """
        return self.language_model.forward(
            batch.inputs_embeds,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            cache=cache,
            memory=batch.memory,
        )

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Return the scores of every vocabulary entry."""
        return self.language_model.logits(hidden)


def _check_media(prompts: Sequence[EncodedPrompt], media: Sequence[Sequence[Any]]) -> None:
    if not prompts:
        raise PromptError("no prompts: a batch has at least one row")
    if len(prompts) != len(media):
        raise MediaCountMismatchError(
            f"{len(prompts)} prompts but media for {len(media)} rows: "
            "pass one list per row, empty for a row of text"
        )
    for row, (prompt, items) in enumerate(zip(prompts, media, strict=True)):
        if not prompt.input_ids:
            raise PromptError(f"row {row}: the prompt has no tokens, not even a first one")
        if len(prompt.spans) != len(items):
            raise MediaCountMismatchError(
                f"row {row}: the prompt has {len(prompt.spans)} places for media "
                f"but {len(items)} items were given"
            )


def _pad_left(
    prompts: Sequence[EncodedPrompt], device: torch.device
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return ids, attention mask and positions of rows that end together.

    The id under padding is that of a placeholder: both are valid ids whose vectors are not read.
    """
    lengths = [len(prompt.input_ids) for prompt in prompts]
    longest = max(lengths, default=0)
    ids = torch.tensor(
        [
            [PLACEHOLDER] * (longest - n) + list(p.input_ids)
            for p, n in zip(prompts, lengths, strict=True)
        ],
        device=device,
    )
    padding = torch.tensor([[longest - n] for n in lengths], device=device)
    steps = torch.arange(longest, device=device)
    return ids, steps >= padding, (steps - padding).clamp(min=0)

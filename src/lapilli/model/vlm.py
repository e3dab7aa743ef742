"""The vision language model: modalities and a language model, joined by `fuse`.

    prompts --pad left, embed--> text [B, T, D] --.
    media   --tower, projector-> [n_i, D] --------+-- fuse --> FusedBatch --> hidden --> logits

Knows ids, spans and vectors; no strings, no files, no pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lapilli.errors import MediaCountMismatchError, PromptError, UnsupportedModelError
from lapilli.lm.base import LanguageModel
from lapilli.modality.base import Modality
from lapilli.model.fuse import FusedBatch, fuse
from lapilli.nn.kv_cache import KVCache
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.shapes import Bool, Float, Int, Tensor


class VisionLanguageModel(nn.Module):
    """A language model and the modalities that it reads, by name.

    Parameters are named `language_model.*`, `modalities.image.vision_tower.*`,
    `modalities.image.projector.*`, `modalities.image.image_newline`.

    Source: LLaVA (arXiv 2304.08485) section 4.1.
    """

    def __init__(
        self, language_model: LanguageModel, modalities: Mapping[str, Modality] | None = None
    ) -> None:
        super().__init__()
        self.language_model: LanguageModel = language_model
        self.modalities = nn.ModuleDict(dict(modalities or {}))  # type: ignore[arg-type]  # modules that follow the protocol

    def modality(self, name: str) -> Modality:
        """Return the modality of this name.

        Raises:
            UnsupportedModelError: the model has none of this name.
        """
        if name not in self.modalities:
            known = ", ".join(self.modalities) or "none, it reads text only"
            raise UnsupportedModelError(f"the model has no modality {name!r}; it has: {known}")
        return self.modalities[name]  # type: ignore[return-value]  # see __init__

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
        _check(prompts, media)
        ids, attention_mask, position_ids = _pad_left(prompts, self.device)
        longest = ids.shape[1]
        spans = [
            Span(row, longest - len(prompt.input_ids) + span.start, span.length, span.modality)
            for row, prompt in enumerate(prompts)
            for span in prompt.spans
        ]
        items = [item for row in media for item in row]
        text = self.language_model.embed(ids)
        fused = fuse(text, self._features(items, spans), spans)
        return FusedBatch(fused, attention_mask, position_ids)

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
        )

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Return the scores of every vocabulary entry."""
        return self.language_model.logits(hidden)


def _check(prompts: Sequence[EncodedPrompt], media: Sequence[Sequence[Any]]) -> None:
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

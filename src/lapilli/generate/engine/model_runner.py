"""Model runner: one pass of the model over the scheduled sequences of a step, and of its towers.

ScheduledSequence ... -> token ids, positions [1, T] -> embeddings, features scattered over them
-> language model over a PagedBatch (no padding), or a decode step in fixed shapes -> logits
"""

import warnings
from collections.abc import Sequence as Items
from typing import Any

import torch

from lapilli.config.generation import EngineOptions
from lapilli.generate.engine.block_pool import release_memory
from lapilli.generate.engine.cuda_graph import StaticSteps, compile_modes, static_steps
from lapilli.generate.engine.feature_cache import FeatureCache
from lapilli.generate.engine.sequence import ScheduledSequence, Sequence, check_features
from lapilli.model.vlm import VisionLanguageModel
from lapilli.nn.block_store import BlockStore
from lapilli.nn.paged import PagedBatch, PagedRow
from lapilli.shapes import Float, Tensor

LONG = 128
"""New positions of one row after which memory is returned to the system."""


class ModelRunner:
    """Passes of the model: rows of any lengths, or decode steps in fixed shapes.

    `EngineOptions.compile` says how a pass runs in which every row is decoding.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        store: BlockStore,
        options: EngineOptions,
        *,
        context_length: int,
    ) -> None:
        self._model = model
        self._store = store
        self._options = options
        self._context_length = context_length
        self._modes = list(compile_modes(options.compile, store.device))
        self._steps = self._next_steps()
        self.is_steady = True
        """True when the last pass took as long as later ones of its shape will."""

    def execute_model(
        self, scheduled: Items[ScheduledSequence], *, unchanged: object | None = None
    ) -> Float[Tensor, "R V"] | None:
        """Return logits as `run_varlen` does, valid until the next pass."""
        steps = self._steps
        if steps is None or not steps.supports(scheduled):
            self.is_steady = True
            logits = run_varlen(self._model, self._store, scheduled, unchanged=unchanged)
            if scheduled[-1].length >= LONG:
                release_memory()
            return logits
        try:
            logits = steps.run(scheduled)
        except RuntimeError as error:
            if not (steps.is_fresh and self._modes):
                raise
            # A compiler may be missing or fail. The next pass writes the same positions again.
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"EngineOptions(compile={self._options.compile!r}) does not work here, the engine "
                f"goes on with {self._modes[0]!r}: {reason}",
                stacklevel=2,
            )
            self._steps = self._next_steps()
            return self.execute_model(scheduled, unchanged=unchanged)
        self.is_steady = not steps.is_fresh
        return logits

    def clear(self) -> None:
        """Discard compiled steps and CUDA graphs; call after weights or modules changed."""
        if self._steps is not None:
            self._steps.clear()

    def _next_steps(self) -> StaticSteps | None:
        return static_steps(
            self._modes.pop(0),
            self._model.language_model,
            self._store,
            most_rows=self._options.max_rows,
            context_length=self._context_length,
        )


@torch.inference_mode()
def run_varlen(
    model: VisionLanguageModel,
    store: BlockStore,
    scheduled: Items[ScheduledSequence],
    *,
    unchanged: object | None = None,
) -> Float[Tensor, "R V"] | None:
    """Return logits after the last token, and every draft token, of the rows to be sampled.

    None when no row is computed to its end. `scheduled` has the rows with fewest positions first;
    the same `unchanged` as before says that the model is the same, see PagedBatch.
    """
    language_model = model.language_model
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    rows = []
    for one in scheduled:
        start, row = len(ids), one.sequence
        ids += one.tokens
        positions += range(row.length, row.length + one.length)
        rows.append(PagedRow(row.blocks, row.length, one.length))
        if one.is_sampled:
            ends += range(start + one.count - 1, len(ids))
    x = language_model.embed(torch.tensor(ids, device=store.device))
    at = 0
    for one in scheduled:
        if not one.sequence.is_decoding:
            scatter_features(x, one.sequence, at=at, count=one.count)
        at += one.length
    hidden = language_model.forward(
        x[None],
        position_ids=torch.tensor([positions], device=store.device),
        cache=PagedBatch(store, rows, unchanged=unchanged),
    )
    if not ends:
        return None
    return language_model.logits(hidden[0, torch.tensor(ends, device=store.device)])


def scatter_features(
    embeddings: Float[Tensor, "T D"], sequence: Sequence, *, at: int, count: int
) -> None:
    """Write features over the embeddings of `count` new positions, which begin at `at`."""
    start = sequence.length
    for span, features in zip(sequence.prompt.spans, sequence.features, strict=True):
        first = max(span.start, start)
        last = min(span.start + span.length, start + count)
        if first < last and features is not None:
            new = features[first - span.start : last - span.start]
            embeddings[at + first - start : at + last - start] = new.to(
                embeddings.device, embeddings.dtype
            )


class MediaEncoder:
    """Encoder of media whose positions are scheduled, each content once per weights version."""

    def __init__(self, model: VisionLanguageModel, cache: FeatureCache) -> None:
        self._model = model
        self._cache = cache
        self.num_encoded = 0
        """Number of media that went through their modality."""

    def encode(self, sequence: Sequence, count: int, *, weights_version: int, most: int) -> int:
        """Return how many of the next `count` positions have features, after `most` encodings.

        Raises:
            FusionError: features that do not fit their span.
            UnsupportedModelError: a modality that the model does not have.
        """
        start = sequence.length
        for i, span in enumerate(sequence.prompt.spans):
            is_ahead = span.start < start + count and span.start + span.length > start
            if not is_ahead or sequence.features[i] is not None:
                continue
            item, key = sequence.media[i], (sequence.digests[i], weights_version)
            known = item if isinstance(item, Tensor) else self._cache.get(key)
            if known is None:
                if most <= 0:
                    return max(0, span.start - start)
                most -= 1
                known = self._encode(item, span.modality)
                self._cache.put(key, known)
            check_features(known, span, self._model.language_model.config.hidden_size)
            sequence.features[i] = known
        return count

    @torch.inference_mode()
    def _encode(self, item: Any, modality: str) -> Float[Tensor, "n D"]:  # noqa: ANN401
        self.num_encoded += 1
        [features] = self._model.modality(modality).embed([item])
        release_memory()
        return features

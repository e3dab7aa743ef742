"""Model runner: one pass of the model over the scheduled sequences of a step, and of its towers.

    run_varlen     ScheduledSequence ... -> token ids, positions [1, T] -> embeddings, features
                   fused over them -> language model over a PagedBatch (no padding) -> logits
    StaticSteps    a decode step in fixed shapes, compiled once, recorded once per shape, replayed:
                   inputs  Int32[B, 2 + n]   of every row its token, its length with it, its blocks
                   step    inputs -> embeddings -> layers over a StaticBatch -> logits [B, V]
                   shapes  B = 1, 2, 4, ... up to the rows of the engine; n = 8, 16, ... blocks

Launching the kernels of one token costs a CPU more time than a GPU needs to run them. A CUDA graph
launches all of them at once, but knows only the addresses that it was recorded with: so a step
reads its inputs from one buffer per shape and writes keys and values into the engine's blocks. The
step is compiled twice, for one row and for several.

Knows scheduled sequences and blocks; must not know how a token is sampled.
"""

import importlib.util
import warnings
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from typing import Any

import torch

from lapilli.config.generation import EngineOptions
from lapilli.generate.engine.block_pool import release_memory
from lapilli.generate.engine.feature_cache import FeatureCache
from lapilli.generate.engine.sequence import ScheduledSequence, Sequence, check_features
from lapilli.lm import LanguageModel, Memory
from lapilli.model import VisionLanguageModel, fuse
from lapilli.nn.kv_cache import StaticBatch
from lapilli.nn.paged import BlockStore, PagedBatch, PagedRow
from lapilli.prompt.encode import Span
from lapilli.shapes import Float, Int, Tensor

FEWEST_BLOCKS = 8
_HEAD = 2  # columns of the inputs before the blocks
_WARM_UPS = 2
_COMPILATIONS = 64  # of one step, by all engines of a process; torch gives up after 8

Replay = Callable[[], Tensor]
Recorder = Callable[[Replay], Replay]


class StaticSteps:
    """Passes over decoding rows in a few fixed shapes.

    Args:
        language_model: one that supports rows of several lengths.
        store: of keys and values.
        most_rows: most new positions of one pass, draft tokens included.
        most_blocks: of one sequence.
        is_compiled: compile the step with torch.compile.
        new_recorder: makes a recorder of CUDA graphs after every change of the model; None: steps
            are run without recording.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        store: BlockStore,
        *,
        most_rows: int,
        most_blocks: int,
        is_compiled: bool = False,
        new_recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        self._store = store
        self._row_counts = doublings(1, most_rows)
        # Never one: a compiler takes a size of one for another shape than all other sizes.
        self._block_counts = doublings(min(FEWEST_BLOCKS, max(2, most_blocks)), most_blocks)
        step = DecodeStep(language_model, store)
        self._step = compiled(step) if is_compiled else step
        self._is_compiled = is_compiled
        self._new_recorder = new_recorder
        self._recorder: Recorder | None = None
        self._recorded: dict[tuple[int, int], tuple[Tensor, Replay]] = {}
        self.is_fresh = False
        """True when the last pass was the first of its shape, which takes longer."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and blocks of every recorded shape."""
        return tuple(self._recorded)

    def supports(self, scheduled: Items[ScheduledSequence]) -> bool:
        """Return whether all rows are decoding, look at nothing, and their new positions fit."""
        positions = sum(one.length for one in scheduled)
        return positions <= self._row_counts[-1] and all(
            one.sequence.is_decoding and not one.sequence.is_looking for one in scheduled
        )

    def clear(self) -> None:
        """Discard recorded steps; call after the model's weights or modules changed."""
        self._recorded.clear()
        self._recorder = None

    @torch.inference_mode()
    def run(self, scheduled: Items[ScheduledSequence]) -> Float[Tensor, "R V"]:
        """Return logits after every new position; valid until the next pass."""
        size = self._store.block_size
        rows = [
            (token, one.sequence.length + i + 1, one.sequence.blocks)
            for one in scheduled
            for i, token in enumerate(one.tokens)
        ]
        shape = (
            _first_from(len(rows), self._row_counts),
            _first_from(max(-(-length // size) for _, length, _ in rows), self._block_counts),
        )
        self.is_fresh = shape not in self._recorded
        if self.is_fresh:
            self._recorded[shape] = self._record(self._inputs(rows, shape))
        inputs, replay = self._recorded[shape]
        if not self.is_fresh:
            inputs.copy_(self._inputs(rows, shape))
        return replay()[: len(rows)]

    def _inputs(
        self, rows: Items[tuple[int, int, list[int]]], shape: tuple[int, int]
    ) -> Int[Tensor, "B columns"]:
        count, width = shape
        size = self._store.block_size
        lines = []
        for token, length, blocks in rows:
            used = blocks[: -(-length // size)]
            lines.append([token, length, *used, *[0] * (width - len(used))])
        lines += [[0] * (_HEAD + width)] * (count - len(rows))
        return torch.tensor(lines, dtype=torch.int32)

    def _record(self, values: Int[Tensor, "B columns"]) -> tuple[Tensor, Replay]:
        """Return the input buffer of a shape, filled for its first pass, and its step."""
        with torch.inference_mode(mode=False):
            inputs = values.to(self._store.device, copy=True)
        if self._is_compiled:
            # torch.compile specializes on a size of one; all others share one compilation.
            for axis, count in enumerate(inputs.shape):
                if count > 1:
                    torch._dynamo.mark_dynamic(inputs, axis)
        step = self._step
        if self._new_recorder is None:
            return inputs, lambda: step(inputs)
        if self._recorder is None:
            self._recorder = self._new_recorder()
        return inputs, self._recorder(lambda: step(inputs))


class DecodeStep:
    """One pass over rows of one new position each, as a function of one tensor."""

    def __init__(self, language_model: LanguageModel, store: BlockStore) -> None:
        self._model = language_model
        self._store = store
        self._has_kernel = store.has_kernel

    def __call__(self, inputs: Int[Tensor, "B columns"]) -> Float[Tensor, "B V"]:
        """Return logits of every row, of padding rows too."""
        cache = StaticBatch(
            self._store, inputs[:, _HEAD:], inputs[:, 1], has_kernel=self._has_kernel
        )
        x = self._model.embed(inputs[:, 0])
        hidden = self._model.forward(x[None], position_ids=cache.positions[None], cache=cache)
        return self._model.logits(hidden[0])


def compiled(step: DecodeStep) -> Callable[[Tensor], Tensor]:
    """Return the step, compiled when it is called for the first time.

    Source: coordinate descent tuning as in gpt-fast: matrix times vector becomes a generated kernel
    that reads the weights at the speed of the memory.
    """
    # Not mode="reduce-overhead": its own graphs refuse steps that write into tensors which are no
    # parameters, as keys and values do; ours are recorded by CudaRecorder.
    options: dict[str, str | int | bool | Callable[..., object]] = {
        "coordinate_descent_tuning": True
    }
    inner = torch.compile(step, fullgraph=True, dynamic=False, options=options)

    def call(inputs: Tensor) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):
            return inner(inputs)

    return call


class CudaRecorder:
    """Recorder of CUDA graphs, which are replayed one at a time and share their memory.

    Note: torch cannot reuse the memory pool once all its graphs are deleted, so every recorder has
        a pool of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Replay) -> Replay:
        """Return a replay of all kernels that `step` launches, on the same tensors."""
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
            side.wait_stream(before)
            with torch.cuda.stream(side):  # libraries initialize, kernels are tuned
                for _ in range(_WARM_UPS):
                    step()
            before.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads of the program may allocate meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
            ):
                out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def compile_modes(wanted: str, device: torch.device) -> tuple[str, ...]:
    """Return the modes that `EngineOptions.compile` means on a device, in the order of trial."""
    if wanted != "auto":
        return (wanted,)
    if device.type != "cuda":
        return ("off",)
    has_compiler = importlib.util.find_spec("triton") is not None
    return ("on", "static", "off") if has_compiler else ("static", "off")


def static_steps(
    mode: str,
    language_model: LanguageModel,
    store: BlockStore,
    *,
    most_rows: int,
    context_length: int,
) -> StaticSteps | None:
    """Return the StaticSteps of a mode: "on" compiled, "static" not; None for "off"."""
    if mode == "off":
        return None
    on_gpu = store.device.type == "cuda"
    return StaticSteps(
        language_model,
        store,
        most_rows=most_rows,
        most_blocks=-(-context_length // store.block_size),
        is_compiled=mode == "on",
        new_recorder=partial(CudaRecorder, store.device) if on_gpu else None,
    )


def doublings(first: int, last: int) -> tuple[int, ...]:
    """Return first, 2 * first, 4 * first, ... until one is not below `last`."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def _first_from(least: int, sizes: Items[int]) -> int:
    """Return the smallest of the sizes that is enough."""
    return next(size for size in sizes if size >= least)


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
    both = torch.tensor((ids, positions), device=store.device)
    x = language_model.embed(both[0])
    hidden = language_model.forward(
        fuse(x[None], *scheduled_features(scheduled)),
        position_ids=both[1:],
        cache=PagedBatch(store, rows, unchanged=unchanged),
        memory=scheduled_memory(scheduled, like=x),
    )
    if not ends:
        return None
    is_decode = len(ends) == len(ids)  # where every position is the end of a row
    last = hidden[0] if is_decode else hidden[0, torch.tensor(ends, device=store.device)]
    return language_model.logits(last)


def scheduled_features(
    scheduled: Items[ScheduledSequence],
) -> tuple[list[Float[Tensor, "_ D"]], list[Span]]:
    """Return the features of the new positions, as far as they go, and where in the flat row."""
    parts: list[Tensor] = []
    spans: list[Span] = []
    at = 0
    for one in scheduled:
        row, start = one.sequence, one.sequence.length
        media = [] if row.is_decoding else zip(row.prompt.spans, row.features, strict=True)
        for span, features in media:
            first = max(span.start, start)
            last = min(span.start + span.length, start + one.count)
            if first < last and features is not None:
                parts.append(features[first - span.start : last - span.start])
                spans.append(Span(0, at + first - start, last - first, span.modality))
        at += one.length
    return parts, spans


def scheduled_memory(scheduled: Items[ScheduledSequence], *, like: Tensor) -> Memory | None:
    """Return what stands beside the sequences as the memory of the flat row; None: nothing.

    The new positions of a sequence see its own media alone, as far as these are not after them.
    `like` is a tensor of the dtype and on the device of the features.
    """
    parts: list[Memory] = []
    places: list[tuple[int, int]] = []
    at = 0
    for one in scheduled:
        row = one.sequence
        for i, span in enumerate(row.prompt.spans if row.is_looking else ()):
            features = row.features[i]
            first = max(0, span.start - row.length)
            if span.length or features is None or first >= one.length:
                continue
            if i not in row.memories:
                row.memories[i] = Memory.of_rows([features], [(0, 0, 0)], rows=1, like=like)
            parts.append(row.memories[i])
            places.append((at + first, at + one.length))
        at += one.length
    return Memory.joined(parts, places) if parts else None


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
            if span.length == 0:  # whoever stands behind it looks at it, an answer too
                is_ahead = span.start <= start + count
            if not is_ahead or sequence.features[i] is not None:
                continue
            item, key = sequence.media[i], (sequence.digests[i], weights_version)
            known = item if isinstance(item, Tensor) else self._cache.get(key)
            if known is None:
                if most <= 0:
                    # What only the answer sees has to be there before the answer begins.
                    return max(0, min(span.start, sequence.prompt_length - 1) - start)
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

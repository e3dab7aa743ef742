"""CUDA graphs: decode steps in fixed shapes, compiled once, recorded once per shape, replayed.

    inputs   Int32[B, 2 + n]    of every row its token, its length with that token, its blocks
    step     inputs -> embeddings -> layers over a StaticBatch -> logits [B, V]
    shapes   B = 1, 2, 4, ...  up to the rows of the engine     n = 8, 16, ...  up to the context

Launching the kernels of one token costs a CPU more time than a GPU needs to run them. A CUDA graph
launches all of them at once, but knows only the addresses that it was recorded with: so a step
reads its inputs from one buffer per shape and writes keys and values into the engine's blocks. The
step is compiled twice, for one row and for several, and recorded once per shape.

Knows scheduled sequences and blocks; must not know how a token is sampled.
"""

import importlib.util
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial

import torch

from lapilli.generate.engine.sequence import ScheduledSequence
from lapilli.lm.base import LanguageModel
from lapilli.nn.block_store import BlockStore
from lapilli.nn.static_batch import StaticBatch
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
        """Return whether all rows are decoding and their new positions fit."""
        positions = sum(one.length for one in scheduled)
        return positions <= self._row_counts[-1] and all(
            one.sequence.is_decoding for one in scheduled
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

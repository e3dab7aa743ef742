"""Assembly of a model: built on the meta device, matched with the files, filled and checked.

Vocabulary tables (embedding and output layer) get the rows of the tokenizer, and may be one table
or two. Source: LLaVA builder.py resizes both to the length of the tokenizer, also downwards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lapilli.checkpoint.formats.quantized import LayerQuantizer
from lapilli.checkpoint.formats.weights import WeightStore, check_values
from lapilli.checkpoint.keymaps import ATTENTION, EMBEDDINGS, LANGUAGE_MODEL, OUTPUT
from lapilli.checkpoint.read.directory import ADAPTER, BASE, WeightPart
from lapilli.config.modalities import attended, attention_every
from lapilli.config.model import ModelConfig
from lapilli.config.reader import KeyReport, in_file, shown
from lapilli.errors import CheckpointError, MissingWeightsError, ShapeMismatchError
from lapilli.lm import add_cross_attention, build_language_model
from lapilli.modality import build_modality
from lapilli.modality.image.image import ImageModality
from lapilli.model import VisionLanguageModel

VOCABULARY = (*EMBEDDINGS, OUTPUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Names of all tensors and keys; loading fails if any tensor is missing or unexpected.

    Args:
        used: parameters, by the names they have in lapilli.
        dropped: tensors of the files that are dropped on purpose.
        notes: for the user, one sentence each.
    """

    used: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    keys: KeyReport = field(default_factory=KeyReport)


def some(names: Sequence[str]) -> str:
    """Return the first three names and how many more there are."""
    first = ", ".join(shown(name)[1:-1] for name in names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


Progress = Callable[[int, int], None]
"""Called with the number of bytes that are read, and of all bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Tensors of the files by the parameter that they fill; later parts override earlier ones."""

    sources: Mapping[str, tuple[tuple[WeightPart, str], ...]]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """The number of bytes to read."""
        sources = chain.from_iterable(self.sources.values())
        return sum(part.store.infos[foreign].num_bytes for part, foreign in sources)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every floating point parameter in the files."""
        infos = {n: part.store.infos[foreign] for n, (*_, (part, foreign)) in self.sources.items()}
        return {n: info.dtype for n, info in infos.items() if info.dtype.is_floating_point}


class WithoutInitialisation(TorchFunctionMode):
    """Mode in which modules are built without random initialization.

    On the meta device torch draws random numbers through its compiler stack, whose import alone
    takes seconds.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  whatever the function gives
        """Call the function, or return the tensor that it would initialize."""
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == nn.init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        if func is torch.randn:  # the few vectors that are drawn directly stay real
            given["device"] = "cpu"
        return func(*args, **given)


def build_model(config: ModelConfig) -> VisionLanguageModel:
    """Build the model of a configuration on the meta device."""
    with in_file(), torch.device("meta"), WithoutInitialisation():
        language_model = build_language_model(config.text)
        modalities: dict[str, Any] = {}
        if config.image is not None and config.vision is not None and config.projector is not None:
            modalities["image"] = ImageModality(
                config.image, config.vision, config.projector, has_newline=config.has_newline
            )
        for name, declared in config.modalities:
            width = config.text.hidden_size
            modalities[name] = build_modality(name, declared, hidden_size=width)
        every = attention_every(config.modalities)
        if every is not None:
            add_cross_attention(language_model, every)
        return VisionLanguageModel(language_model, modalities, attended=attended(config.modalities))


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Rows of the vocabulary tables in the files and in the model.

    Args:
        rows: of the model.
        accepted: numbers of rows that a table of the files may have.
        new_rows: rows that only the added tokens have, which an adapter may store alone.

    Note: the original fills rows that no file has with random numbers; here they are the mean of
        the others, so that loading twice gives the same model.
    """

    rows: int
    accepted: frozenset[int]
    new_rows: int = 0

    def fit(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """Return one table out of the files' tables, the last one winning.

        Raises:
            ShapeMismatchError: a table with an unexpected number of rows.
        """
        table = tensors[-1]
        if len(tensors) > 1 and 0 < len(table) == self.new_rows:
            # An adapter that stores the rows of the added tokens alone: they are the last ones.
            return torch.cat((resized(tensors[-2], self.rows)[: -self.new_rows], table))
        # A table that was trained beside an adapter has the rows of the added tokens already.
        more = {self.rows} if len(tensors) > 1 else set()
        if table.shape[0] not in self.accepted | more:
            wanted = " or ".join(str(n) for n in sorted(self.accepted))
            raise ShapeMismatchError(
                f"{name} has {table.shape[0]} rows in the files, but the vocabulary has {wanted} "
                "entries: config.json and weights do not belong together"
            )
        return resized(table, self.rows)


def resized(table: Tensor, rows: int) -> Tensor:
    """Return the table with fewer rows, or with more that are the mean of all it has."""
    missing = rows - table.shape[0]
    if missing <= 0:
        return table[:rows]
    mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
    return torch.cat((table, mean.expand(missing, -1)))


def saved_tables(parts: Sequence[WeightPart]) -> dict[str, int]:
    """Return the vocabulary tables that an adapter holds whole, and their rows."""
    return {
        name: (*part.store.infos[foreign].shape, 0)[0]
        for part in parts
        if part.label == ADAPTER
        for name, foreign in part.parameters.items()
        if name in VOCABULARY
    }


def has_other_head(parts: Sequence[WeightPart]) -> bool:
    """Return whether the last part with an output layer holds another one than its embedding.

    Only of a model whose configuration says that both are one: some programs that fold an adapter
    in leave that as it was.
    """
    for part in reversed(parts):
        named, infos = part.parameters, part.store.infos
        head = named.get(OUTPUT)
        if head is None or part.is_dropped(head):
            continue
        table = next((named[name] for name in EMBEDDINGS if name in named), None)
        if table is None or infos[table].shape != infos[head].shape:
            return True
        dtype = None if infos[table].dtype == infos[head].dtype else torch.float32
        return not torch.equal(part.store.tensor(head, dtype), part.store.tensor(table, dtype))
    return False


def tied_heads(parts: Sequence[WeightPart], label: str = ADAPTER) -> list[WeightPart]:
    """Return output layers under a label, one for every part with an embedding that is both.

    An adapter's tables are left apart.
    """
    heads = []
    for part in parts:
        head = WeightStore()
        for name, foreign in part.parameters.items() if part.label != ADAPTER else ():
            if name in EMBEDDINGS:
                head.rename(part.store, foreign, "lm_head.weight")
        heads += [WeightPart(label, head, LANGUAGE_MODEL)] if head.infos else []
    return heads


def match(parts: Sequence[WeightPart], model: nn.Module, *, tied: bool) -> Matching:
    """Match parameters with tensors of the files; `tied`: the output layer is the embedding."""
    expected = model.state_dict().keys()
    sources: dict[str, tuple[tuple[WeightPart, str], ...]] = {}
    dropped: list[str] = []
    unexpected: list[str] = []
    for part in parts:
        for foreign in part.store.infos:
            ours = part.parameter(foreign)
            # A base may be a LLaVA with an image part that its adapter's config does not have.
            surplus = part.label == BASE and (ours or "").startswith(("modalities.", ATTENTION[1]))
            if part.is_dropped(foreign) or (tied and ours == OUTPUT):
                dropped.append(foreign)
            elif ours is None or ours not in expected:
                (dropped if surplus else unexpected).append(foreign)
            else:
                # Only vocabulary tables are combined from two files (rows of an adapter).
                before = sources.get(ours, ()) if ours in VOCABULARY else ()
                sources[ours] = (*before, (part, foreign))
    return Matching(
        sources=sources,
        dropped=tuple(sorted(dropped)),
        missing=tuple(sorted(expected - sources.keys())),
        unexpected=tuple(sorted(unexpected)),
    )


def check_complete(matching: Matching) -> None:
    """Check that every parameter has a tensor and every tensor a parameter.

    Raises:
        MissingWeightsError: they do not; the message names some and counts all.
    """
    problems = []
    if matching.missing:
        problems.append(
            f"{len(matching.missing)} parameters have no tensor in the files: "
            f"{some(matching.missing)}"
        )
    if matching.unexpected:
        problems.append(
            f"{len(matching.unexpected)} tensors of the files have no parameter: "
            f"{some(matching.unexpected)}"
        )
    if problems:
        raise MissingWeightsError(
            f"{'; '.join(problems)}. Is config.json the one of these weights, and is the download "
            "complete?"
        )


def fill(
    model: nn.Module,
    matching: Matching,
    vocabulary: Vocabulary,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    check_finite: bool = True,
    progress: Progress | None = None,
    quantizer: LayerQuantizer | None = None,
    float32_parameters: Callable[[str], bool] | None = None,
) -> None:
    """Assign every tensor to its parameter; with dtype=None each keeps the dtype of its file.

    A tensor that has the dtype already stays a view of its file; others are converted one at a
    time. Vocabulary tables get the number of rows that the model has. Layers of `quantizer` are
    rounded as they are read. Names that `float32_parameters` takes are float32.

    Raises:
        ShapeMismatchError: a tensor has another shape than the configuration says.
        CheckpointError: a tensor holds NaN or an infinity, or is of the wrong dtype.
    """
    expected = model.state_dict()
    filled: dict[str, Tensor] = {}
    done, total = 0, matching.num_bytes
    for name in matching.sources if quantizer is None else quantizer.in_order(matching.sources):
        sources = matching.sources[name]
        tensors = []
        read_as = dtype if quantizer is None else quantizer.dtype_of(name, dtype)
        if float32_parameters is not None and float32_parameters(name):
            read_as = torch.float32
        kept = quantizer is None or not quantizer.takes(name)
        for part, foreign in sources:
            _check_kind(part, foreign, expected[name].dtype)
            tensor = part.store.tensor(foreign, read_as, mapped=kept)
            if check_finite:
                # An embedding is checked in a copy: of its mapped pages few will be used, and the
                # others stay out of memory.
                is_view = kept and read_as in (None, part.store.infos[foreign].dtype)
                in_copy = is_view and name in EMBEDDINGS
                seen = part.store.tensor(foreign, mapped=False) if in_copy else tensor
                check_values(f"{foreign} ({part.label})", seen)
                del seen
            tensors.append(tensor)
            done += part.store.infos[foreign].num_bytes
        tensor = vocabulary.fit(name, tensors) if name in VOCABULARY else tensors[-1]
        _check_shape(name, sources[-1], tensor, tuple(expected[name].shape))
        if quantizer is None or kept:
            filled[name] = tensor.to(device)
        else:
            quantizer.take(name, tensor)
        if progress is not None:
            progress(done, total)
    if quantizer is not None:
        filled |= quantizer.finish(device, dtype)
    model.load_state_dict(filled, strict=True, assign=True)


def _check_kind(part: WeightPart, foreign: str, expected: torch.dtype) -> None:
    """Check that floats fill floats, and packed integers have the dtype of the kernels.

    Raises:
        CheckpointError: they do not.
    """
    stored = part.store.infos[foreign].dtype
    if stored == expected or (stored.is_floating_point and expected.is_floating_point):
        return
    raise CheckpointError(
        f"{foreign} is {stored}, expected {expected} ({part.label}): the weights are packed "
        "otherwise than config.json says"
    )


def _check_shape(
    name: str, source: tuple[WeightPart, str], tensor: Tensor, expected: tuple[int, ...]
) -> None:
    if tuple(tensor.shape) != expected:
        part, foreign = source
        raise ShapeMismatchError(
            f"{foreign} ({part.label}) has shape {tuple(tensor.shape)}, but the configuration asks "
            f"for {expected} ({name}): config.json and weights do not belong together"
        )

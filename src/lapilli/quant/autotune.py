"""Kernel autotuner: the path of a layer on this machine, measured once and kept on disk.

    paths   float32, bfloat16: torch    onednn: float32 by oneDNN    int8, int4: the packed kernels
    layers  of a vision tower in floats: by their modules, or in one call (kernels/tower.py)
    key     CPU, threads, instruction set, torch and lapilli versions; output x input x rows

CPUs differ by more than an order of magnitude in bfloat16, so nothing here is guessed from names.
"""

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from lapilli.config.model import VisionConfig
from lapilli.config.reader import parse_json
from lapilli.errors import CheckpointError
from lapilli.kernels.library import native
from lapilli.kernels.linear import PackedLinear
from lapilli.modality.image.image import VisionLayer
from lapilli.nn.linear import FloatLinear, has_onednn, onednn_linear
from lapilli.quant.quantize import QuantConfig, round4, round8
from lapilli.shapes import Tensor

FLOATS = ("float32", "onednn", "bfloat16")
PATHS = (*FLOATS, "int8", "int4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_REPEATS = 3
_MARGIN = 1.2  # another number format or library has to be faster by this factor
LARGE = 1 << 20  # elements of a weight from which its product is worth a choice
_ROWS = 256  # of a prefill
_WIDEST = 2048  # wider layers are as fast, element by element, and take longer to measure

Shape = tuple[int, int, int]  # output, input, rows; of a tower's layer: inner, hidden, positions
MODULES, ONE_CALL = "modules", "one call"
"""Paths of a tower's layer, followed by the float format and the number of heads."""


def machine() -> str:
    """Return what a measurement belongs to."""
    library = native()
    return "; ".join(
        (
            _cpu_name(),
            f"{torch.get_num_threads()} threads",
            "torch alone" if library is None else library.isa,
            f"torch {torch.__version__}",
            f"lapilli {version('lapilli')}",
        )
    )


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        lines = [line.partition(":") for line in path.read_text().splitlines()]
        facts = {key.strip(): value.strip() for key, _, value in lines}
        parts = [facts[key] for key in ("model name", "cpu family", "model") if key in facts]
        if parts:
            return " ".join(parts)
    return f"{platform.machine()} {platform.processor()}".strip()


def cache_file() -> Path:
    """Return where measurements are kept."""
    return Path.home() / ".cache" / "lapilli" / "paths.json"


def time_path(path: str, shape: Shape) -> float:
    """Return seconds of one call, the best of a few, on random weights that are never zero."""
    out_features, in_features, rows = shape
    if path.startswith((MODULES, ONE_CALL)):
        return _best(_layer_call(path, shape))
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=random)
    x = torch.randn(rows, in_features, generator=random)
    return _best(_call_of(path, weight, x))


def _best(call: Callable[[], Tensor]) -> float:
    best = float("inf")
    with torch.inference_mode():
        for _ in range(_REPEATS):
            started = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - started)
    return best


def _call_of(path: str, weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    if path == "onednn":
        return lambda: onednn_linear(x, weight, None)
    if path in DTYPES:
        dtype = DTYPES[path]
        kept, seen = weight.to(dtype), x.to(dtype)
        return lambda: functional.linear(seen, kept)
    config = QuantConfig(search=False)
    packed = round8(weight, None) if path == "int8" else round4(weight, None, config)
    layer = PackedLinear(packed)
    return lambda: layer(x)


def _layer_call(path: str, shape: Shape) -> Callable[[], Tensor]:
    """Return a call of a tower's layer with random weights, as its path says."""
    *way, name, heads = path.split()
    inner, hidden, positions = shape
    config = VisionConfig(
        image_size=1,
        patch_size=1,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=1,
        num_heads=int(heads),
    )
    layer = VisionLayer(config).to(DTYPES[name]).eval().requires_grad_(False)
    for inside, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            by_onednn = module.weight.dtype == torch.float32 and has_onednn()
            layer.set_submodule(inside, FloatLinear.of(module, by_onednn=by_onednn))
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, positions, hidden, generator=random).to(DTYPES[name])
    layer.fused.takes_floats = " ".join(way) == ONE_CALL
    with torch.inference_mode():
        layer(x)  # compared with the modules
    return lambda: layer(x)


def layer_shapes(model: nn.Module, rows: Sequence[int]) -> list[Shape]:
    """Return every size of a linear layer of the model, with each number of rows."""
    sizes = dict.fromkeys(
        (module.out_features, module.in_features)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    return [(*size, count) for size in sizes for count in rows]


def _here(paths: Sequence[str]) -> tuple[str, ...]:
    """Return those of these paths that this build of torch has."""
    return tuple(path for path in paths if path != "onednn" or has_onednn())


def take_faster_products(model: nn.Module, choices: "Choices") -> int:
    """Make the large float layers of a model on a CPU FloatLinear; how many were changed."""
    changed = 0
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module.weight.numel() < LARGE:
            continue
        weight = module.weight
        if weight.device.type != "cpu" or weight.dtype not in DTYPES.values():
            continue
        shape = (min(module.out_features, _WIDEST), min(module.in_features, _WIDEST), _ROWS)
        by_onednn = weight.dtype == torch.float32 and choices.is_onednn_faster(shape)
        model.set_submodule(path, FloatLinear.of(module, by_onednn=by_onednn))
        changed += 1
    return changed


def take_faster_layers(model: nn.Module, choices: "Choices") -> int:
    """Let the large float layers of vision towers on a CPU run in one call; how many do now."""
    if native() is None:
        return 0
    changed = 0
    for module in model.modules():
        if not isinstance(module, VisionLayer) or not isinstance(module.mlp.fc1, nn.Linear):
            continue
        weight = module.mlp.fc1.weight
        names = [name for name, dtype in DTYPES.items() if dtype == weight.dtype]
        if weight.numel() < LARGE or weight.device.type != "cpu" or not names:
            continue
        shape = (*weight.shape, _ROWS)
        if choices.is_one_call_faster(shape, names[0], module.self_attn.num_heads):
            module.fused.takes_floats = True
            changed += 1
    return changed


@dataclass(slots=True)
class Choices:
    """Seconds per path and shape, measured where they are not known yet.

    Args:
        file: kept here; None: measured anew in every process.
        timer: what measures; tests have their own.
    """

    file: Path | None = None
    timer: Callable[[str, Shape], float] = time_path
    _known: dict[str, dict[str, float]] = field(default_factory=dict)

    def seconds(self, shape: Shape, paths: Sequence[str]) -> dict[str, float]:
        """Return seconds of one call for each of these paths."""
        key = " ".join(map(str, shape))
        known = self._read().get(key, {})
        missing = [path for path in paths if path not in known]
        for path in missing:
            known[path] = self.timer(path, shape)
        if missing:
            self._write(key, known)
        return {path: known[path] for path in paths}

    def float_dtype(self, shape: Shape) -> torch.dtype:
        """Return the faster float format for a layer; float32 where they are nearly as fast."""
        seconds = self.seconds(shape, _here(FLOATS))
        others = min(seconds[path] for path in seconds if path != "bfloat16")
        faster = seconds["bfloat16"] * _MARGIN < others
        return torch.bfloat16 if faster else torch.float32

    def is_onednn_faster(self, shape: Shape) -> bool:
        """Return whether oneDNN's product in float32 is clearly faster than torch's own."""
        if not has_onednn():
            return False
        seconds = self.seconds(shape, ("float32", "onednn"))
        return seconds["onednn"] * _MARGIN < seconds["float32"]

    def is_one_call_faster(self, shape: Shape, dtype: str, heads: int) -> bool:
        """Return whether a tower's layer of this shape is faster in one call than by modules."""
        modules, one_call = (f"{way} {dtype} {heads}" for way in (MODULES, ONE_CALL))
        seconds = self.seconds(shape, (modules, one_call))
        return seconds[one_call] < seconds[modules]

    def describe(self, shape: Shape) -> str:
        """Return one line for people: milliseconds per path, and the fastest."""
        seconds = self.seconds(shape, _here(PATHS))
        times = ", ".join(f"{path} {1e3 * value:.2f}" for path, value in seconds.items())
        out_features, in_features, rows = shape
        fastest = min(seconds, key=lambda path: seconds[path])
        return f"{out_features} x {in_features}, {rows} rows: {times} ms -> {fastest}"

    def _read(self) -> dict[str, dict[str, float]]:
        if not self._known:
            self._known.update(self._stored().get(machine(), {}))
        return self._known

    def _stored(self) -> dict[str, dict[str, dict[str, float]]]:
        """Read the measurements of all machines that share the file."""
        if self.file is None or not self.file.is_file():
            return {}
        try:
            found = parse_json(self.file.read_bytes(), str(self.file))
        except (OSError, CheckpointError):  # cut short by a crash: measured again
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, key: str, known: dict[str, float]) -> None:
        self._known[key] = known
        if self.file is None:
            return
        stored = self._stored() | {machine(): self._known}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            aside = self.file.with_suffix(".new")
            aside.write_text(json.dumps(stored, indent=1), encoding="utf-8")
            aside.replace(self.file)
        except OSError:  # a home that cannot be written to: measured again next time
            return

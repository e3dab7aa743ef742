"""Layers that are done, on disk, so that a run goes on where it was killed.

    .NAME.layers/settings.json              what the run was asked for; digests of model and samples
    .NAME.layers/weights.json               MBQ's weights
    .NAME.layers/samples-00004.safetensors  samples before layer 4, the first that is not done
    .NAME.layers/layer-00003.safetensors    packed linear layers and norms
    .NAME.layers/report-00003.json          what became of layer 3, and digests of its two files

Every file is renamed into place when it is whole, and the report comes last: a layer is done when
its report is there. Knows files; must not know how layers are quantized.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from lapilli.checkpoint.formats.weights import SafetensorsShard
from lapilli.checkpoint.write.files import explaining_full_disk, locked_folder, write_safetensors
from lapilli.config.reader import parse_json
from lapilli.errors import CheckpointError, ConfigError
from lapilli.kernels.packing import Packed
from lapilli.lm.decoder import DecoderLayer
from lapilli.quant.activations import Rounding, Sample, linear_of
from lapilli.quant.layerwise import LayerReport
from lapilli.quant.linear import QuantLinear
from lapilli.shapes import Tensor
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.trainer.state_file import content_digest

SETTINGS = "settings.json"
_WEIGHTS = "weights.json"
_OURS = (
    SETTINGS,
    _WEIGHTS,
    "report-*.json",
    "layer-*.safetensors",
    "samples-*.safetensors",
    "*.part",
)
_DIGESTS = "files"  # key of a report


class PartialRun:
    """The folder of a run that is not finished, made by `open_partial_run`.

    Attributes:
        folder: beside the checkpoint that is going to be written.
        finished: layers that are done.
    """

    def __init__(self, target: Path) -> None:
        self.folder = target.parent / f".{target.name}.layers"
        self.finished = 0
        self._target = target

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin, or go on with a run of the same settings: everything that decides its layers.

        Raises:
            ConfigError: an earlier run had other settings.
            CheckpointError: its files are damaged, or the disk is full.
        """
        settings = json.loads(json.dumps(settings))
        before = self._found()
        if self.finished:
            self._check(before, settings)
        elif before != settings:  # nothing is lost
            self._clear()
            self._write_json(SETTINGS, settings)

    def begin_anew(self, method: str) -> None:
        """Begin a run that is over at once and keeps no layers, in a folder without any.

        Raises:
            ConfigError: there are layers of an earlier run.
            CheckpointError: its files are damaged.
        """
        before = self._found()
        if self.finished:
            self._refuse(f"method was {before.get('method')!r} and is {method!r}")
        self._clear()

    def _found(self) -> Mapping[str, Any]:
        """Count the layers that are done, and return the settings of their run, if it had any."""
        while (self.folder / _report(self.finished)).is_file():
            self.finished += 1
        is_begun = (self.folder / SETTINGS).is_file()
        if self.finished and not is_begun:
            raise self._damaged(SETTINGS)
        found: Mapping[str, Any] = self._read_json(SETTINGS) if is_begun else {}
        return found

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        other = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        if not other:
            return
        differences = ", ".join(
            f"{key} changed"
            if _is_digest(before.get(key))
            else f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in other
        )
        self._refuse(differences)

    def _refuse(self, differences: str) -> NoReturn:
        raise ConfigError(
            f"{self.folder} holds layers of another run: {differences}. Repeat the command of that "
            "run to go on with it, or remove the folder to begin again"
        )

    def save(self, layer: DecoderLayer, samples: Sequence[Sample], report: LayerReport) -> None:
        """Save a layer that is done, and the samples behind it.

        Raises:
            CheckpointError: the disk is full.
        """
        index = report.index
        written = {_layer(index): layer.state_dict()}
        if samples:
            hidden = {f"{at:05d}": sample.hidden for at, sample in enumerate(samples)}
            written = {_samples(index + 1): hidden, **written}
        digests = {name: self._write(name, tensors) for name, tensors in written.items()}
        content = {**asdict(report), "seconds": round(report.seconds, 2), _DIGESTS: digests}
        self._write_json(_report(index), content)
        self.finished = index + 1
        (self.folder / _samples(index)).unlink(missing_ok=True)

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        part = self.folder / f"{name}.part"
        with explaining_full_disk(self._target):
            write_safetensors(part, tensors)
            part.replace(self.folder / name)
        return self._digest(name)

    def _write_json(self, name: str, content: object) -> None:
        part = self.folder / f"{name}.part"
        with explaining_full_disk(self._target):
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.folder / name)

    def _read_json(self, name: str) -> Any:  # noqa: ANN401  what was written
        path = self.folder / name
        try:
            return parse_json(path.read_bytes(), str(path))
        except CheckpointError as error:
            raise self._damaged(name) from error

    def _digest(self, name: str) -> str:
        with (self.folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _damaged(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder / name} is damaged or missing: remove {self.folder} to begin again"
        )

    def _shard(self, name: str, report: Mapping[str, Any]) -> SafetensorsShard:
        wanted = report.get(_DIGESTS, {}).get(name)
        if not (self.folder / name).is_file() or wanted != self._digest(name):
            raise self._damaged(name)
        return SafetensorsShard(self.folder / name)

    def load(self, layer: DecoderLayer, index: int, rounding: Rounding) -> LayerReport:
        """Give a layer what was saved of it; return its report.

        Raises:
            CheckpointError: a file is damaged or missing.
        """
        content = self._read_json(_report(index))
        shard = self._shard(_layer(index), content)
        state = {name: shard.tensor(name, mapped=False) for name in shard.infos}
        for name in rounding.names:
            parts = {key: state.pop(f"{name}.{key}", None) for key in _PARTS}
            layer.set_submodule(name, _restored(parts, linear_of(layer, name), rounding, name))
        layer.load_state_dict(state, strict=False, assign=True)
        return LayerReport(**{key: value for key, value in content.items() if key != _DIGESTS})

    def load_samples(self, samples: Sequence[Sample]) -> None:
        """Take the samples past the layers that are done, in place.

        Raises:
            CheckpointError: the file is damaged or missing.
        """
        if not self.finished or not samples:
            return
        report = self._read_json(_report(self.finished - 1))
        shard = self._shard(_samples(self.finished), report)
        for at, sample in enumerate(samples):
            sample.hidden = shard.tensor(f"{at:05d}", mapped=False).to(sample.hidden.device)

    def weights(self) -> list[dict[str, tuple[float, float]]] | None:
        """Return MBQ's weights, if they were saved.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not (self.folder / _WEIGHTS).is_file():
            return None
        found = self._read_json(_WEIGHTS)
        return [{name: (pair[0], pair[1]) for name, pair in one.items()} for one in found]

    def save_weights(self, weights: Sequence[Mapping[str, tuple[float, float]]]) -> None:
        """Save MBQ's weights.

        Raises:
            CheckpointError: the disk is full.
        """
        self._write_json(_WEIGHTS, list(weights))

    def remove(self) -> None:
        """Remove the folder once the checkpoint is written; what is not ours stays, and it too."""
        self._clear()
        with suppress(OSError):
            self.folder.rmdir()

    def _clear(self) -> None:
        for pattern in _OURS:
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)


@contextmanager
def open_partial_run(target: Path) -> Iterator[PartialRun]:
    """Make the folder of a run, which is this process's alone until the block ends.

    A folder in which nothing was done does not stay. The system lets go of the lock when the
    process ends, however it ends.

    Raises:
        CheckpointError: the disk is full.
        ConfigError: another process is at work there.
    """
    run = PartialRun(target)
    with explaining_full_disk(target):
        run.folder.mkdir(parents=True, exist_ok=True)
    refusal = f"another process quantizes into {run.folder}: wait for it, or choose another target"
    with locked_folder(run.folder, refusal):
        try:
            yield run
        finally:
            if {file.name for file in run.folder.glob("*")} <= {SETTINGS}:
                run.remove()


def _layer(index: int) -> str:
    return f"layer-{index:05d}.safetensors"


def _samples(index: int) -> str:
    return f"samples-{index:05d}.safetensors"


def _report(index: int) -> str:
    return f"report-{index:05d}.json"


_PARTS = ("qweight", "scales", "zeros", "span_scales", "packed_bias")


def _restored(
    parts: Mapping[str, Tensor | None], linear: nn.Linear, rounding: Rounding, name: str
) -> QuantLinear:
    """Return a packed layer of its saved tensors, with the sizes of the float layer it replaces."""
    data, scales = parts["qweight"], parts["scales"]
    if data is None or scales is None:
        raise CheckpointError(f"{name} is missing in a saved layer")
    sizes = (linear.out_features, linear.in_features, rounding.config.group_size)
    bits = 8 if rounding.bits_of(name) == 8 else 4
    spans = parts["span_scales"]
    return rounding.linear(
        Packed(data, scales, parts["zeros"], parts["packed_bias"], *sizes, bits, spans)
    )


def digest_of(samples: Sequence[EncodedSample]) -> str:
    """Return a digest of samples as the model sees them: tokens, what counts, and pixels."""
    return content_digest(
        [
            [
                torch.tensor(sample.prompt.input_ids),
                torch.tensor(sample.prompt.loss_mask),
                repr(sample.prompt.spans),
                [_content(medium) for medium in sample.media],
            ]
            for sample in samples
        ]
    )


def _content(medium: object) -> object:
    if not is_dataclass(medium):
        return medium
    return [getattr(medium, one.name) for one in fields(medium)]


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and (value.startswith("sha256:") or len(value) == 64)

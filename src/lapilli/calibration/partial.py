"""Layers that are done, on disk, so that a run goes on where it was killed.

    .NAME.layers/settings.json        what the run was asked for, and digests of model and samples
    .NAME.layers/layer-00003.safetensors   packed linear layers and norms
    .NAME.layers/samples-00004.safetensors samples before the layer that comes next
    .NAME.layers/weights.json         MBQ's weights

Every file is renamed into place when it is whole. A layer's file comes after its samples, so the
samples of the next layer are there whenever a layer is.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lapilli.checkpoint.formats.weights import SafetensorsShard
from lapilli.checkpoint.write.files import explaining_full_disk, write_safetensors
from lapilli.errors import CheckpointError, ConfigError
from lapilli.kernels.packing import Packed
from lapilli.lm.decoder import DecoderLayer
from lapilli.quant.activations import Rounding, Sample, linear_of
from lapilli.quant.layerwise import LayerReport
from lapilli.quant.linear import QuantLinear
from lapilli.shapes import Tensor

SETTINGS = "settings.json"


class PartialRun:
    """The folder of a run that is not finished.

    Args:
        target: the checkpoint that is going to be written.
        settings: everything that decides what the layers are.

    Raises:
        ConfigError: an earlier run had other settings.
        CheckpointError: its files are damaged.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any]) -> None:
        self.folder = target.parent / f".{target.name}.layers"
        self._target = target
        found = self.folder / SETTINGS
        self.is_resumed = found.is_file()
        if self.is_resumed:
            self._check(json.loads(found.read_text(encoding="utf-8")), settings)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self._write_json(SETTINGS, settings)

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        other = [key for key in now if before.get(key) != now[key]]
        if other or before.keys() != now.keys():
            key = (other or ["its settings"])[0]
            raise ConfigError(
                f"{self.folder} holds layers of a run with another {key}, "
                f"{before.get(key)!r} instead of {now.get(key)!r}: repeat the same command to go "
                "on, or remove that folder to begin again"
            )

    @property
    def finished(self) -> int:
        """Return how many layers are done."""
        count = 0
        while self._layer(count).is_file() and self._samples(count + 1).is_file():
            count += 1
        return count

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def _samples(self, index: int) -> Path:
        return self.folder / f"samples-{index:05d}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        part = path.with_suffix(".part")
        with explaining_full_disk(self._target):
            write_safetensors(part, tensors)
            part.replace(path)

    def _write_json(self, name: str, content: object) -> None:
        part = self.folder / f"{name}.part"
        with explaining_full_disk(self._target):
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.folder / name)

    def save(self, layer: DecoderLayer, samples: Sequence[Sample], report: LayerReport) -> None:
        """Save a layer that is done, and the samples behind it."""
        index = report.index
        hidden = {f"{at:05d}": sample.hidden.cpu() for at, sample in enumerate(samples)}
        if hidden:
            self._write(self._samples(index + 1), hidden)
        else:
            self._write(self._samples(index + 1), {"none": torch.zeros(1)})
        self._write_json(f"report-{index:05d}.json", vars_of(report))
        state = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
        self._write(self._layer(index), state)
        self._samples(index).unlink(missing_ok=True)

    def load(self, layer: DecoderLayer, index: int, rounding: Rounding) -> LayerReport:
        """Give a layer what was saved of it; return its report."""
        shard = SafetensorsShard(self._layer(index))
        state = {name: shard.tensor(name, mapped=False) for name in shard.infos}
        for name in rounding.names:
            linear = linear_of(layer, name)
            parts = {key: state.pop(f"{name}.{key}", None) for key in _PARTS}
            layer.set_submodule(name, _restored(parts, linear, rounding, name))
        missing = layer.load_state_dict(state, strict=False, assign=True).unexpected_keys
        if missing:
            raise CheckpointError(
                f"{self._layer(index)} has {missing[0]}, which the layer has not: remove "
                f"{self.folder} to begin again"
            )
        report = json.loads((self.folder / f"report-{index:05d}.json").read_text(encoding="utf-8"))
        return LayerReport(**report)

    def load_samples(self, samples: Sequence[Sample]) -> None:
        """Take the samples past the layers that are done, in place."""
        count = self.finished
        if not count:
            return
        shard = SafetensorsShard(self._samples(count))
        for at, sample in enumerate(samples):
            sample.hidden = shard.tensor(f"{at:05d}", mapped=False).to(sample.hidden.device)

    def weights(self) -> list[dict[str, tuple[float, float]]] | None:
        """Return MBQ's weights, if they were saved."""
        path = self.folder / "weights.json"
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return [{name: tuple(pair) for name, pair in one.items()} for one in found]

    def save_weights(self, weights: Sequence[Mapping[str, tuple[float, float]]]) -> None:
        """Save MBQ's weights."""
        self._write_json("weights.json", list(weights))

    def remove(self) -> None:
        """Remove the folder once the checkpoint is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


_PARTS = ("qweight", "scales", "zeros", "span_scales", "packed_bias")


def _restored(
    parts: Mapping[str, Tensor | None], linear: nn.Linear, rounding: Rounding, name: str
) -> QuantLinear:
    data, scales = parts["qweight"], parts["scales"]
    if data is None or scales is None:
        raise CheckpointError(f"{name} is missing in a saved layer")
    bits = 8 if rounding.bits_of(name) == 8 else 4
    packed = Packed(
        data,
        scales,
        parts["zeros"],
        parts["packed_bias"],
        linear.out_features,
        linear.in_features,
        rounding.config.group_size,
        bits,
        parts["span_scales"],
    )
    return rounding.linear(packed)


def vars_of(report: LayerReport) -> dict[str, Any]:
    """Return a report as JSON can hold it."""
    return {
        "index": report.index,
        "error_before": report.error_before,
        "error": report.error,
        "seconds": round(report.seconds, 2),
        "is_plain": report.is_plain,
        "choices": dict(report.choices),
    }


def digest_of(samples: Sequence[Sample]) -> str:
    """Return a digest of the tokens of samples, and of the places of their pictures."""
    found = hashlib.sha256()
    for sample in samples:
        for part in (sample.ids, sample.is_picture, sample.counts):
            found.update(part.cpu().numpy().tobytes())
    return found.hexdigest()


def digest_of_files(files: Sequence[Path]) -> str:
    """Return a digest of the names, sizes and times of files."""
    found = hashlib.sha256()
    for file in files:
        about = file.stat()
        found.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return found.hexdigest()

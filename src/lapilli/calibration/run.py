"""`lapilli quantize --method`: a checkpoint, samples, and a quantized checkpoint.

    SOURCE --load, as stored--> model --embed--> samples --layer by layer--> packed --> TARGET
                                        '--> .TARGET.layers/, to go on after a kill

Memory holds one layer in float32, the packed ones, the samples and what they make; the weights that
are not reached yet are views of their files.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lapilli.calibration.builtin import BUILTIN
from lapilli.calibration.partial import PartialRun, digest_of, digest_of_files, vars_of
from lapilli.calibration.samples import embed_samples, read_samples
from lapilli.checkpoint.export import save_loaded
from lapilli.checkpoint.formats.weights import release_pages
from lapilli.checkpoint.load import STORED, Loaded, choose_device, load_checkpoint
from lapilli.checkpoint.write.awq import FORMS, save_awq, unfit_layers, verify_written
from lapilli.checkpoint.write.files import check_target
from lapilli.errors import ConfigError
from lapilli.lm.decoder import Decoder
from lapilli.quant import QuantConfig
from lapilli.quant.activations import Rounding, Sample, linear_names
from lapilli.quant.layerwise import METHODS, LayerReport, decoder_of, quantize_layer, round_layer
from lapilli.quant.quantize import pack_layers
from lapilli.quant.rotation import Rotation, check_rotation
from lapilli.quant.sensitivity import Weights, sensitivities

NEAREST = "rtn"
OWN = "lapilli"
REPORT = "quantization.json"
SAMPLES = 32
Say = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """What a run is asked for beside the format of the weights.

    Attributes:
        method: "rtn", plain rounding, or one of METHODS: "gptq", "awq", "mbq".
        bits: 4, or 3, which lie in the layout of 4 and save nothing.
        rotate: rotate the hidden states and the values of heads first.
        samples: a file of calibration samples, or "builtin".
        number: of samples.
        form: of the files: "lapilli", "gemm" (AutoAWQ's, for transformers and vLLM) or "llm-awq".
        device: to search on.

    Raises:
        ConfigError: a value that there is nothing for.
    """

    method: str = "awq"
    bits: int = 4
    rotate: bool = False
    samples: str = BUILTIN
    number: int = SAMPLES
    form: str = OWN
    device: str = "cpu"

    def __post_init__(self) -> None:
        known = (NEAREST, *METHODS)
        if self.method not in known:
            raise ConfigError(f"method {self.method!r} is unknown: choose {', '.join(known)}")
        if self.bits not in (3, 4):
            raise ConfigError(f"bits must be 3 or 4 with a method, found {self.bits}")
        if self.form not in (OWN, *FORMS):
            raise ConfigError(f"format {self.form!r} is unknown: choose {', '.join((OWN, *FORMS))}")
        if self.form != OWN and self.bits != 4:
            raise ConfigError(f"files of format {self.form} have 4 bits, found {self.bits}")


def quantize_from_samples(
    source: str,
    target: Path,
    config: QuantConfig,
    options: CalibrationOptions,
    *,
    overwrite: bool = False,
    say: Say = lambda _text: None,
    loading: Progress | None = None,
    layers: Progress = lambda _done, _all: None,
    base: str | None = None,
    adapter: str | None = None,
    template: str | None = None,
) -> list[LayerReport]:
    """Quantize a checkpoint layer by layer and save it.

    Args:
        source: see `load_checkpoint`.
        target: the new directory.
        config: of the packed layers; files of AWQ have zero points, and their head in float.
        options: see CalibrationOptions.
        overwrite: replace a checkpoint that is there.
        say: told in a sentence what happens.
        loading: see `load_checkpoint`.
        layers: told how many layers are done, of how many.
        base: see `load_checkpoint`.
        adapter: likewise.
        template: likewise.

    Raises:
        CheckpointError: files are missing or damaged, `target` is there, or the disk is full.
        ConfigError: an option that the model cannot have, calibration samples that do not fit, or a
            run with other options that was not finished.
        UnsupportedModelError: no Llama-shaped language model, or it cannot be rotated.
    """
    check_target(target, overwrite=overwrite)
    loaded = load_checkpoint(
        source,
        base=base,
        adapter=adapter,
        template=template,
        device="cpu",
        dtype=STORED,
        progress=loading,
    )
    decoder = decoder_of(loaded.model)
    if options.rotate:
        check_rotation(loaded.model)
    run = _Run(loaded, decoder, target, config, options, say)
    reports = run.layers(layers)
    loaded = run.finish()
    extra = {REPORT: report_text(config, options, reports)}
    if options.form == OWN:
        save_loaded(
            target,
            loaded,
            config=loaded.config,
            quantization=config,
            overwrite=overwrite,
            extra=extra,
        )
    else:
        save_awq(
            target,
            loaded,
            form=options.form,
            group_size=config.group_size,
            config=loaded.config,
            overwrite=overwrite,
            extra=extra,
        )
    verify_written(target, loaded)
    run.partial.remove()
    return reports


class _Run:
    """A run over the layers of one model."""

    def __init__(
        self,
        loaded: Loaded,
        decoder: Decoder,
        target: Path,
        config: QuantConfig,
        options: CalibrationOptions,
        say: Say,
    ) -> None:
        self._loaded, self._decoder, self._config = loaded, decoder, config
        self._options, self._say = options, say
        self._rounding = Rounding(config, options.bits, self._unfit())
        self._stored = decoder.layer(0).input_layernorm.weight.dtype
        self._device = choose_device(options.device)
        self._weights: Sequence[Weights] | None = None
        is_plain = options.method == NEAREST
        encoded = [] if is_plain else read_samples(options.samples, options.number, loaded)
        samples = embed_samples(loaded.model, encoded, self._device)
        self.partial = PartialRun(target, self._settings(samples))
        if self.partial.is_resumed:
            say(f"going on behind {self.partial.finished} layers that are done")
        if not is_plain and METHODS[options.method].needs_gradients:
            self._weights = self._sensitivities(samples)
        self._rotation: Rotation | None = None
        if decoder.config.tie_embeddings and (options.rotate or config.head_bits is not None):
            decoder.untie()
        if options.rotate:
            self._rotation = Rotation(loaded.model)
            self._rotation.ends(loaded.model)
            samples = embed_samples(loaded.model, encoded, self._device)
        self._samples = samples

    def _unfit(self) -> frozenset[str]:
        """Return the linear layers, by name in a layer, that the files cannot hold packed."""
        if self._options.form == OWN:
            return frozenset()
        unfit = unfit_layers(self._loaded.model, self._options.form, self._config.group_size)
        names = {name for path in unfit for name in linear_names() if path.endswith(f".{name}")}
        for name in sorted(names):
            why = next(why for path, why in unfit.items() if path.endswith(f".{name}"))
            self._say(f"{name} stays float in every layer: {why}")
        if len(names) == len(linear_names()):
            raise ConfigError(f"no layer fits into {self._options.form}: choose another group size")
        return frozenset(names)

    def _settings(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return everything that decides what the layers are."""
        return {
            **asdict(self._options),
            **{f"config.{name}": value for name, value in asdict(self._config).items()},
            "weights of the model": digest_of_files(self._loaded.weight_files),
            "tokens of the samples": digest_of(samples),
        }

    def _sensitivities(self, samples: Sequence[Sample]) -> Sequence[Weights]:
        found = self.partial.weights()
        if found is None:
            self._say("gradients of the calibration samples")
            found = sensitivities(self._decoder, samples)
            self.partial.save_weights(found)
        return found

    def layers(self, progress: Progress) -> list[LayerReport]:
        """Quantize all layers, those that are done already being read."""
        count = len(self._decoder.model.layers)
        done = self.partial.finished
        reports = []
        for index in range(done):
            reports.append(self.partial.load(self._decoder.layer(index), index, self._rounding))
            progress(index + 1, count)
        self.partial.load_samples(self._samples)
        start = time.perf_counter()
        for index in range(done, count):
            report = self._layer(index)
            reports.append(report)
            self.partial.save(self._decoder.layer(index), self._samples, report)
            progress(index + 1, count)
            each = (time.perf_counter() - start) / (index + 1 - done)
            self._say(_line(report, count, each * (count - index - 1)))
        return reports

    def _layer(self, index: int) -> LayerReport:
        layer = self._decoder.layer(index)
        mapped = [parameter.data for parameter in layer.parameters()]
        if self._rotation is not None:
            layer.float()
            self._rotation.layer(layer)
        if self._options.method == NEAREST:
            return round_layer(self._decoder, index, self._rounding, stored=self._stored)
        weights = None if self._weights is None else self._weights[index]
        report = quantize_layer(
            self._decoder,
            index,
            self._samples,
            self._options.method,
            self._rounding,
            weights=weights,
            stored=self._stored,
        )
        for tensor in mapped:
            release_pages(tensor, self._loaded.weight_files)
        return report

    def finish(self) -> Loaded:
        """Pack what is left, and return the checkpoint as it is now."""
        loaded = self._loaded
        if self._options.form == OWN:
            pack_layers(loaded.model, self._config)
        config = replace(loaded.config, text=self._decoder.config)
        return replace(loaded, config=config, quantization=self._config)


def _line(report: LayerReport, count: int, left: float) -> str:
    """Return what is said of a layer that is done."""
    kept = ", plain rounding is kept" if report.is_plain else ""
    minutes = "" if not left else f", about {left / 60:.0f} min left"
    if not report.error_before:
        return f"layer {report.index + 1} of {count} ({report.seconds:.0f} s{minutes})"
    return (
        f"layer {report.index + 1} of {count}: error {report.error:.2e}, of plain rounding "
        f"{report.error_before:.2e}{kept} ({report.seconds:.0f} s{minutes})"
    )


def report_text(
    config: QuantConfig, options: CalibrationOptions, reports: Sequence[LayerReport]
) -> str:
    """Return quantization.json: what was asked for, and what became of every layer."""
    content: Mapping[str, Any] = {
        "options": asdict(options),
        "config": asdict(config),
        "layers": [vars_of(report) for report in reports],
    }
    return json.dumps(content, indent=1) + "\n"

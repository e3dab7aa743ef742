"""`lapilli quantize --method`: a checkpoint, samples, and a quantized checkpoint.

    SOURCE --load, as stored--> model --embed--> samples --layer by layer--> packed --> TARGET
                                        '--> .TARGET.layers/, to go on after a kill

Memory holds one layer in float32, the packed ones, the samples and what they make; the weights that
are not reached yet are views of their files. Knows the order of the steps; must not know how a
method rounds, nor what the files of a run that was killed look like.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lapilli import __version__
from lapilli.calibration.builtin import BUILTIN
from lapilli.calibration.partial import PartialRun, digest_of, open_partial_run
from lapilli.calibration.samples import embed_samples, read_samples
from lapilli.checkpoint.device import choose_device
from lapilli.checkpoint.export import save_loaded
from lapilli.checkpoint.formats.weights import release_pages
from lapilli.checkpoint.load import STORED, Loaded, load_checkpoint
from lapilli.checkpoint.write.awq import FORMS, save_awq, unfit_layers, verify_written
from lapilli.checkpoint.write.files import check_target
from lapilli.config.reader import check_fields, check_type, given_path
from lapilli.errors import ConfigError
from lapilli.lm.decoder import Decoder
from lapilli.quant import QuantConfig
from lapilli.quant.activations import Rounding, Sample, linear_names
from lapilli.quant.layerwise import METHODS, LayerReport, decoder_of, quantize_layer, round_layer
from lapilli.quant.quantize import notes_on, pack_layers
from lapilli.quant.rotation import Rotation, check_rotation
from lapilli.quant.sensitivity import Weights, sensitivities
from lapilli.train.data.dataset import data_file, together
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.trainer.state_file import content_digest

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
        method: "rtn", plain rounding, or one of METHODS: "gptq", "awq", "awq-clip", "mbq".
        bits: 4, or 3, which lie in the layout of 4 and save nothing.
        rotate: rotate the hidden states and the values of heads first.
        samples: a file of calibration samples, or "builtin"; kept as a text.
        number: of samples.
        images: the folder that image paths of the samples are relative to; None: the file's own.
        form: of the files: "lapilli", "gemm" (AutoAWQ's, for transformers and vLLM) or "llm-awq".
        device: to search on.

    Raises:
        ConfigError: a value that there is nothing for, or one of another type.
    """

    method: str = "awq"
    bits: int = 4
    rotate: bool = False
    samples: str | Path = BUILTIN
    number: int = SAMPLES
    images: str | Path | None = None
    form: str = OWN
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("samples", "images"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        known = (NEAREST, *METHODS)
        if self.method not in known:
            raise ConfigError(f"method {self.method!r} is unknown: choose {', '.join(known)}")
        if self.form not in (OWN, *FORMS):
            raise ConfigError(f"format {self.form!r} is unknown: choose {', '.join((OWN, *FORMS))}")
        if self.form != OWN and self.bits != 4:
            raise ConfigError(f"files of format {self.form} have 4 bits, found {self.bits}")
        if self.bits not in (3, 4):
            raise ConfigError(
                f"bits must be 3 or 4 here, found {self.bits}: 8 bits are rounded to the nearest, "
                "without --rotate"
            )
        if self.number < 1:
            raise ConfigError(
                f"the number of calibration samples must be 1 or more, found {self.number}"
            )

    def check_config(self, config: QuantConfig) -> None:
        """Check that packed layers as `config` describes them can be made and saved.

        Raises:
            ConfigError: they cannot.
        """
        if config.bits != 4:
            raise ConfigError(f"bits must be 4 in the configuration, found {config.bits}")
        if self.bits == 3 and config.levels == "nonlinear":
            raise ConfigError("3 bits have linear levels: choose zeros or symmetric")
        if self.form == OWN:
            return
        if config.levels != "zeros" or config.value_bits != 4:
            raise ConfigError(
                f"files of format {self.form} have zero points and 4 bits, values of attention "
                f"included; found levels {config.levels!r}, values in {config.value_bits} bits"
            )
        if config.quantize_tower or config.head_bits is not None:
            raise ConfigError(f"files of format {self.form} have tower and logits in floats")


def quantize_from_samples(
    source: str | Path,
    target: str | Path,
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
            run with other options that was not finished; or an argument of another type.
        UnsupportedModelError: no Llama-shaped language model, or it cannot be rotated.
    """
    for name, value, kind in (
        ("target", target, str | Path),
        ("config", config, QuantConfig),
        ("options", options, CalibrationOptions),
        ("overwrite", overwrite, bool),
    ):
        check_type(name, value, kind)
    target = given_path(target)
    options.check_config(config)
    device = choose_device(options.device)
    if device.type == "meta":
        raise ConfigError("device 'meta' keeps no numbers: try cpu, cuda or cuda:1")
    place = check_target(target, overwrite=overwrite)
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
    with open_partial_run(place) as unfinished:
        run = _Run(loaded, decoder, config, options, device, unfinished, say)
        reports = run.layers(layers)
        loaded = run.finish()
        _save(target, loaded, config, options, reports, overwrite=overwrite)
        unfinished.remove()
    return reports


def _save(
    target: Path,
    loaded: Loaded,
    config: QuantConfig,
    options: CalibrationOptions,
    reports: Sequence[LayerReport],
    *,
    overwrite: bool,
) -> None:
    """Write the checkpoint in the format that was asked for; it appears once it is verified."""
    save = (
        partial(save_loaded, quantization=config)
        if options.form == OWN
        else partial(save_awq, form=options.form, group_size=config.group_size)
    )
    extra = {REPORT: report_text(config, options, reports)}
    check = partial(verify_written, loaded=loaded)
    save(target, loaded, config=loaded.config, overwrite=overwrite, extra=extra, check=check)


class _Run:
    """A run over the layers of one model.

    Args:
        loaded: the model, which is changed in place.
        decoder: its language model.
        config: of the packed layers.
        options: of the run.
        device: that the search runs on.
        unfinished: holds the layers that are done.
        say: told in a sentence what happens.
    """

    def __init__(
        self,
        loaded: Loaded,
        decoder: Decoder,
        config: QuantConfig,
        options: CalibrationOptions,
        device: torch.device,
        unfinished: PartialRun,
        say: Say,
    ) -> None:
        self._loaded, self._decoder, self._config = loaded, decoder, config
        self._options, self._unfinished, self._say = options, unfinished, say
        self._device = device
        self._stored = decoder.layer(0).input_layernorm.weight.dtype
        if decoder.config.tie_embeddings and (options.rotate or config.head_bits is not None):
            decoder.untie()
        if options.rotate:
            check_rotation(loaded.model)
        for line in notes_on(dict(loaded.model.named_modules()), config):
            say(line)
        self._rounding = Rounding(config, options.bits, self._unfit())
        encoded = self._read()
        unfinished.begin(self._settings(encoded))
        if unfinished.finished:
            say(f"{unfinished.finished} layers are done already, and are not quantized again")
        samples = []
        if not options.rotate or self._needs_gradients:  # else they would be embedded for nothing
            samples = embed_samples(loaded.model, encoded, device)
        self._weights = self._sensitivities(samples)
        self._rotation: Rotation | None = None
        if options.rotate:
            self._rotation = Rotation(loaded.model)
            self._rotation.ends(loaded.model)
            samples = embed_samples(loaded.model, encoded, device)
        self._samples = samples

    def _unfit(self) -> frozenset[str]:
        """Return the linear layers, by name in a layer, that the files cannot hold packed."""
        if self._options.form == OWN:
            return frozenset()
        unfit = unfit_layers(self._loaded.model, self._options.form, self._config.group_size)
        reasons = {
            name: why
            for path, why in unfit.items()
            for name in linear_names()
            if path.endswith(name)
        }
        if len(reasons) == len(linear_names()):
            raise ConfigError(
                f"no linear layer fits into format {self._options.form}: "
                f"{next(iter(reasons.values()))}; choose another group size or format"
            )
        for name, why in sorted(reasons.items()):
            self._say(f"{name} stays float in every layer: {why}")
        return frozenset(reasons)

    def _read(self) -> list[EncodedSample]:
        """Return the samples, none for plain rounding."""
        wanted = self._options.number
        if self._options.method == NEAREST:
            return []
        source, images = self._options.samples, self._options.images
        encoded = read_samples(source, wanted, self._loaded, images=images)
        if len(encoded) < wanted:
            self._say(f"{source} has {len(encoded)} samples, fewer than {wanted}")
        if self._needs_gradients:
            self._check_pictures(encoded)
        return encoded

    def _check_pictures(self, encoded: Sequence[EncodedSample]) -> None:
        """Check that a method which weighs text against pictures has some of both.

        Raises:
            ConfigError: it has no picture.
        """
        if any(sample.prompt.spans for sample in encoded):
            return
        weighs = f"{self._options.method} weighs text against pictures, and"
        if not self._loaded.model.modalities:
            raise ConfigError(f"{weighs} the model reads text only: choose awq")
        if self._options.samples == BUILTIN:
            raise ConfigError(
                f"{weighs} one built-in sample is a text: ask for 2 samples or more (--samples), "
                "half of which are pictures, or choose awq"
            )
        raise ConfigError(
            f"{weighs} no calibration sample of {len(encoded)} from {self._options.samples} has a "
            "picture: give samples with pictures, or choose awq"
        )

    def _settings(self, encoded: Sequence[EncodedSample]) -> dict[str, Any]:
        """Return everything that decides what the layers are, under names for people."""
        asked = asdict(self._options)
        for name in ("samples", "images"):  # what they say and show is digested, not their place
            asked.pop(name)
        asked["device"] = str(self._device)  # "auto" is one of them
        names = {"number": "samples", "form": "format"}
        files = [data_file(file) for file in self._loaded.weight_files]
        return {
            **{names.get(key, key): value for key, value in asked.items()},
            **{key: value for key, value in asdict(self._config).items() if key != "bits"},
            "the version of lapilli": __version__,
            "the configuration of the model": content_digest([repr(self._loaded.config)]),
            "the weights of the model": together(files),
            "what the calibration samples say or show": digest_of(encoded),
        }

    @property
    def _needs_gradients(self) -> bool:
        method = METHODS.get(self._options.method)
        return method is not None and method.needs_gradients

    def _sensitivities(self, samples: Sequence[Sample]) -> Sequence[Weights] | None:
        """Return MBQ's weights of every layer; None for the other methods."""
        if not self._needs_gradients:
            return None
        found = self._unfinished.weights()
        if found is None:
            self._say("computing gradients of the calibration samples")
            found = sensitivities(self._decoder, samples)
            self._unfinished.save_weights(found)
        return found

    def layers(self, progress: Progress) -> list[LayerReport]:
        """Quantize all layers, those that are done already being read."""
        count, done = len(self._decoder.model.layers), self._unfinished.finished
        reports = []
        for index in range(done):
            reports.append(self._unfinished.load(self._decoder.layer(index), index, self._rounding))
            progress(index + 1, count)
        self._unfinished.load_samples(self._samples)
        start = time.perf_counter()
        for index in range(done, count):
            report = self._layer(index)
            reports.append(report)
            self._unfinished.save(self._decoder.layer(index), self._samples, report)
            progress(index + 1, count)
            each = (time.perf_counter() - start) / (index + 1 - done)
            self._say(_line(report, count, each * (count - index - 1)))
        return reports

    def _layer(self, index: int) -> LayerReport:
        """Quantize one layer, and give back the memory of its floats."""
        layer = self._decoder.layer(index)
        mapped = [parameter.data for parameter in layer.parameters()]
        if self._rotation is not None:
            layer.float()
            self._rotation.layer(layer)
        if self._options.method == NEAREST:
            report = round_layer(self._decoder, index, self._rounding, stored=self._stored)
        else:
            report = quantize_layer(
                self._decoder,
                index,
                self._samples,
                self._options.method,
                self._rounding,
                weights=None if self._weights is None else self._weights[index],
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
    """Return quantization.json: what was asked for, and what samples made of every layer."""
    layers = [asdict(report) for report in reports]
    asked = asdict(options)
    if options.method == NEAREST:  # which looks at no samples and measures nothing
        unused, layers = ("samples", "number", "images"), []
        asked = {name: value for name, value in asked.items() if name not in unused}
    content: Mapping[str, Any] = {"options": asked, "config": asdict(config), "layers": layers}
    return json.dumps(content, indent=1) + "\n"

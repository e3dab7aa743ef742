"""Writer of AWQ checkpoints, in the two layouts that other programs read.

    gemm       AutoAWQ's; transformers and vLLM read it. In Hugging Face's layout where it can hold
               the model, else in the original's.
    llm-awq    version 2 of llm-awq, in the original's layout.

A plain language model keeps the config.json that it was loaded with. Layers of the decoder are
packed, with zero points; head, embedding, tower and projector stay float. checkpoint/formats/awq.py
draws the tensors; what packs them here is the inverse of what it reads them by.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from lapilli.checkpoint.formats.awq import PER_NUMBER, TILE, PublishedFormat, interleave, tile
from lapilli.checkpoint.formats.quantized import KEY
from lapilli.checkpoint.keymaps import EMBEDDINGS, LANGUAGE_MODEL, OUTPUT, TEXT
from lapilli.checkpoint.load import STORED, Loaded, load_checkpoint
from lapilli.checkpoint.out_of_distribution import detector_files
from lapilli.checkpoint.template import written_template
from lapilli.checkpoint.tokenizer import write_beside
from lapilli.checkpoint.write.files import (
    Check,
    Deferred,
    Stored,
    new_directory,
    write_json,
    write_weights,
)
from lapilli.checkpoint.write.huggingface import check_hf_layout, save_hf
from lapilli.checkpoint.write.llava import HALF, save_llava
from lapilli.config.families import family_of
from lapilli.config.model import ModelConfig
from lapilli.errors import CheckpointError, ConfigError, UnsupportedModelError
from lapilli.kernels.packing import GROUPS, Packed, by_row, unpack4
from lapilli.quant.linear import QuantLinear
from lapilli.quant.quantize import HEAD
from lapilli.shapes import Float, Int, Tensor, UInt8

FORMS = ("gemm", "llm-awq")
_LARGEST = float(torch.finfo(torch.float16).max)
_ROWS = 1024  # outputs compared at once
# vLLM and older transformers look for these inside of a module's path, transformers 5 at its start.
_FLOAT = {
    "huggingface": (
        *("vision_tower", "multi_modal_projector", "lm_head"),
        *("model.vision_tower", "model.multi_modal_projector"),
    ),
    "llava": ("vision_tower", "mm_projector", "lm_head"),
    "text": ("lm_head",),
}


def save_awq(
    path: Path,
    loaded: Loaded,
    *,
    form: str,
    group_size: int,
    config: ModelConfig | None = None,
    overwrite: bool = False,
    extra: Mapping[str, str | bytes] | None = None,
    check: Check | None = None,
) -> None:
    """Save a model whose decoder layers are packed in 4 bits with zero points.

    Tensors are repacked one at a time while they are written. Scales and biases of packed layers
    are float16, all other floats as in the files that the model was loaded from.

    Args:
        path: the new directory; for llm-awq see `save_llava` on its name.
        loaded: with a model that has been quantized since.
        form: see the head of this file.
        group_size: inputs that share a scale, the same in every layer.
        config: of the model as it is now; None: as it was loaded.
        overwrite: replace a checkpoint that is there.
        extra: more files by name, beside the detector that the source has.
        check: see `new_directory`.

    Raises:
        CheckpointError: the directory is there already, or the disk is full.
        ConfigError: see `unfit_layers`; a layer is packed in another way, or does not fit; the
            head, a tower or a projector is packed.
        UnsupportedModelError: no layout can hold the model.
    """
    model, config = loaded.model, config or loaded.config
    _check_packed(model, form, group_size)
    layout = _layout(config, form)
    section = _section(form, group_size, [*_FLOAT[layout], *_left_float(model)])
    packed = {path for path, _ in _packed_layers(model)}
    stored = {n: dtype for n, dtype in loaded.stored.items() if n.rpartition(".")[0] not in packed}
    table = next((stored[name] for name in EMBEDDINGS if name in stored), None)
    if table is not None:  # of a head that was the embedding in the files
        stored.setdefault(OUTPUT, table)
    state = _state(model, form)
    files = {**detector_files(loaded.path), **(extra or {})}
    if layout == "text":
        with new_directory(path, overwrite=overwrite, check=check) as folder:
            _write_plain(folder, loaded, config, section, stored, state, files)
        return
    save: Callable[..., None] = save_llava
    if layout == "huggingface":
        save = partial(save_hf, tokenizer=loaded.tokenizer)
    save(
        path,
        model,
        config,
        tokenizer_path=loaded.tokenizer_path,
        dtype=stored,
        template=loaded.template.template,
        overwrite=overwrite,
        state=state,
        section=section,
        extra=files,
        check=check,
    )


def unfit_layers(model: nn.Module, form: str, group_size: int) -> dict[str, str]:
    """Return the layers of the decoder that a form cannot hold, and why, by path.

    Left float, they are named in config.json, which transformers, vLLM and AutoAWQ follow; the
    loader of llm-awq itself expects every layer packed.

    Raises:
        ConfigError: an unknown form or group size.
    """
    if form not in FORMS:
        raise ConfigError(f"AWQ form {form!r} is unknown: choose from {', '.join(FORMS)}")
    if group_size not in GROUPS:
        raise ConfigError(f"AWQ groups of {group_size}: choose 32, 64 or 128")
    whole = max(group_size, TILE) if form == "llm-awq" else group_size
    found = {}
    for path, layer in _layers(model):
        sizes = (("outputs", layer.out_features, PER_NUMBER), ("inputs", layer.in_features, whole))
        for name, size, unit in sizes:
            if size % unit:
                found[path] = (
                    f"{path} has {size} {name}, but {form} with groups of {group_size} packs "
                    f"multiples of {unit}"
                )
    return found


def verify_written(path: Path, loaded: Loaded) -> None:
    """Check that a written checkpoint, read back, has exactly the packed layers of a model.

    Weights are compared as the floats that they stand for, biases after rounding to float16. As a
    `check` of a writer it keeps files that differ from taking their place.

    Raises:
        CheckpointError: a layer has another value; or see `load_checkpoint`.
    """
    found = load_checkpoint(path, device="cpu", dtype=STORED).model
    for name, layer in _packed_layers(loaded.model):
        other = found.get_submodule(name)
        if not isinstance(other, QuantLinear):
            raise CheckpointError(f"{name} was packed and is float when read back from {path}")
        shapes = [(one.out_features, one.in_features) for one in (layer, other)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{name} is {shapes[1]} when read back from {path}, expected {shapes[0]}"
            )
        worst = _largest_difference(layer, other)
        if worst > 0:
            raise CheckpointError(
                f"{name} differs by up to {worst:.3g} from what was written when it is read back "
                f"from {path}: the disk or the writer is at fault, do not use these files"
            )


def _largest_difference(one: QuantLinear, other: QuantLinear) -> float:
    worst = 0.0
    for start in range(0, one.out_features, _ROWS):
        stop = min(start + _ROWS, one.out_features)
        rows = [layer.weight_rows(start, stop).cpu() for layer in (one, other)]
        worst = max(worst, float((rows[0] - rows[1]).abs().max()))
    biases = [torch.zeros(1) if b is None else b.half().cpu() for b in _biases(one, other)]
    return max(worst, float((biases[0].float() - biases[1].float()).abs().max()))


def _biases(*layers: QuantLinear) -> list[Tensor | None]:
    return [layer.plain_bias for layer in layers]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | QuantLinear]]:
    """Return the linear layers of the decoder by path, without the output layer."""
    for path, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear | QuantLinear)
        if is_linear and path.startswith(TEXT) and not path.endswith(HEAD):
            yield path, module


def _packed_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield path, module


def _check_packed(model: nn.Module, form: str, group_size: int) -> None:
    """Check that layers of the decoder are packed, and nothing else, each as the form has them.

    Raises:
        ConfigError: they are not.
    """
    unfit, inside = unfit_layers(model, form, group_size), dict(_layers(model))
    packed = dict(_packed_layers(model))
    if not packed:
        raise ConfigError("the model is not quantized: AWQ files hold packed layers")
    for path, layer in packed.items():
        if path not in inside:
            raise ConfigError(
                f"{path} is packed: AWQ files have the output layer, towers and projectors in "
                "floats; quantize with head_bits=None and without the tower"
            )
        if path in unfit:
            raise ConfigError(f"{unfit[path]}: leave it float, or save in lapilli's own format")
        _check_layer(path, layer.packed, form, group_size)


def _left_float(model: nn.Module) -> list[str]:
    """Return what names the float layers of the decoder, by kind where all of a kind are float."""
    layers = list(_layers(model))
    names = {path: ".".join(path.split(".")[-2:]) for path, _ in layers}
    packed = {names[path] for path, layer in layers if isinstance(layer, QuantLinear)}
    return list(
        dict.fromkeys(
            ".".join(path.split(".")[-4:]) if names[path] in packed else names[path]
            for path, layer in layers
            if not isinstance(layer, QuantLinear)
        )
    )


def _check_layer(path: str, packed: Packed, form: str, group_size: int) -> None:
    if packed.bits != 4:
        raise ConfigError(
            f"{path} is in {packed.bits} bits, AWQ has 4: quantize with value_bits=4 too"
        )
    if packed.span_scales is not None or packed.zeros is None:
        kind = "symmetric" if packed.span_scales is None else "nonlinear"
        raise ConfigError(f"{path} has {kind} levels, AWQ has zero points: quantize with 'zeros'")
    if packed.group_size != group_size:
        raise ConfigError(f"{path} has groups of {packed.group_size}, expected {group_size}")
    bias = packed.plain_bias
    largest = float(packed.scales.abs().max()) * (15 if form == "llm-awq" else 1)
    largest = max(largest, 0.0 if bias is None else float(bias.abs().max()))
    if not largest <= _LARGEST:  # NaN too
        raise ConfigError(f"{path} has scales or a bias of {largest:.4g}, beyond float16")


def _layout(config: ModelConfig, form: str) -> str:
    """Return the layout to write: huggingface, llava or text.

    Raises:
        UnsupportedModelError: a language model that is none of lapilli's own families.
    """
    family_of(config.text)
    if config.layout == "text":
        return "text"
    if form == "gemm":
        try:
            check_hf_layout(config)
        except UnsupportedModelError:
            return "llava"
        return "huggingface"
    return "llava"


def _section(form: str, group_size: int, floats: list[str]) -> dict[str, object]:
    """Return the quantization_config of config.json.

    Source: AutoAWQ's AwqConfig.to_transformers_dict; llm-awq's examples/convert_to_hf.py.
    """
    versions = {"gemm": {"version": "gemm"}, "llm-awq": {"version": "gemv", "backend": "llm-awq"}}
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        **versions[form],
        "modules_to_not_convert": floats,
    }


def _write_plain(
    folder: Path,
    loaded: Loaded,
    config: ModelConfig,
    section: Mapping[str, object],
    dtype: Mapping[str, torch.dtype],
    state: Mapping[str, Stored],
    extra: Mapping[str, str | bytes],
) -> None:
    """Write a language model without pictures under the config.json that it came with."""
    written = written_template(loaded.template.template, config, loaded.tokenizer_path)
    content = {key: value for key, value in loaded.raw.items() if key != "dtype"}
    content |= {
        "vocab_size": config.text.vocab_size,
        "tie_word_embeddings": config.text.tie_embeddings,
        "torch_dtype": HALF,
        KEY: section,
    }
    write_weights(folder, state, LANGUAGE_MODEL, dtype=dtype)
    write_json(folder / "config.json", content)
    write_beside(folder, loaded.tokenizer_path, extra, jinja=written.jinja, tokens=config.tokens)


def _state(model: nn.Module, form: str) -> dict[str, Stored]:
    """Return the tensors of the files under the names of the model, the packed ones deferred."""
    layers = dict(_packed_layers(model))
    state: dict[str, Stored] = {}
    for name, tensor in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        if path not in layers:
            state[name] = tensor
        elif kind == "qweight":
            parts = stored_parts(layers[path].packed, form)
            state |= {f"{path}.{piece}": part for piece, part in parts.items()}
    return state


def stored_parts(packed: Packed, form: str) -> dict[str, Stored]:
    """Return the tensors of one layer in the files, each computed when it is written."""
    outputs, inputs = packed.out_features, packed.in_features
    groups = inputs // packed.group_size
    parts: dict[str, Stored]
    if form == "gemm":
        columns = outputs // PER_NUMBER
        parts = {
            "qweight": _deferred((inputs, columns), torch.int32, _interleaved_weight, packed),
            "qzeros": _deferred((groups, columns), torch.int32, _interleaved_zeros, packed),
            "scales": _deferred((groups, outputs), torch.float16, _scales, packed),
        }
    else:
        rows = (_tiled_rows(packed), outputs)
        parts = {
            "qweight": _deferred((outputs // 4, inputs), torch.int16, _tiled_weight, packed),
            "scales": _deferred(rows, torch.float16, _padded_scales, packed),
            "scaled_zeros": _deferred(rows, torch.float16, _scaled_zeros, packed),
        }
    bias = packed.plain_bias
    if bias is not None:
        parts["bias"] = bias.half()
    return parts


def _deferred(
    shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[Packed], Tensor], packed: Packed
) -> Deferred:
    return Deferred(torch.Size(shape), dtype, partial(make, packed))


def _nibbles(packed: Packed) -> UInt8[Tensor, "out in"]:
    return unpack4(packed.data)[: packed.out_features, : packed.in_features]


def _zeros(packed: Packed) -> UInt8[Tensor, "out groups"]:
    if packed.zeros is None:
        raise ConfigError("AWQ has zero points, found a packed layer without")
    return by_row(packed.zeros)[: packed.out_features]


def _scales(packed: Packed) -> Float[Tensor, "groups out"]:
    return by_row(packed.scales)[: packed.out_features].t()


def _interleaved_weight(packed: Packed) -> Int[Tensor, "in columns"]:
    return interleave(_nibbles(packed))


def _interleaved_zeros(packed: Packed) -> Int[Tensor, "groups columns"]:
    return interleave(_zeros(packed))


def _tiled_weight(packed: Packed) -> Int[Tensor, "quarters in"]:
    nibbles, zeros = _nibbles(packed), _zeros(packed)
    is_empty = _scales(packed).t() == 0
    if bool(is_empty.any()):  # see _tiled_scales
        mask, zero = (x.repeat_interleave(packed.group_size, dim=1) for x in (is_empty, zeros))
        nibbles = torch.where(mask, zero, nibbles)
    return tile(nibbles)


def _tiled_scales(packed: Packed) -> Float[Tensor, "groups out"]:
    """Return scales, 1 for groups of zeros: a row of zeros would be one of padding."""
    scales = _scales(packed)
    return torch.where(scales == 0, 1.0, scales)


def _padded_scales(packed: Packed) -> Float[Tensor, "rows out"]:
    return _padded(_tiled_scales(packed), packed)


def _scaled_zeros(packed: Packed) -> Float[Tensor, "rows out"]:
    products = -_zeros(packed).t().float() * _tiled_scales(packed).float()
    return _padded(products.half(), packed)


def _padded(rows: Float[Tensor, "groups out"], packed: Packed) -> Float[Tensor, "rows out"]:
    more = _tiled_rows(packed) - len(rows)
    return functional.pad(rows, (0, 0, 0, more))


def _tiled_rows(packed: Packed) -> int:
    form = PublishedFormat(method="awq", group_size=packed.group_size, is_tiled=True)
    return form.rows_of_scales(packed.in_features)

"""Export: a checkpoint saved again in another layout or dtype, with its adapters merged."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from lapilli.checkpoint.device import DTYPES
from lapilli.checkpoint.formats.quantized import stored_quantization
from lapilli.checkpoint.load import STORED, Loaded, load_checkpoint
from lapilli.checkpoint.out_of_distribution import detector_files
from lapilli.checkpoint.read.assemble import Progress
from lapilli.checkpoint.read.plan import make_plan
from lapilli.checkpoint.write.files import Check, check_target, common_dtypes, dtype_name
from lapilli.checkpoint.write.huggingface import check_hf_layout, save_hf
from lapilli.checkpoint.write.llava import check_llava_layout, save_llava
from lapilli.config.model import ModelConfig
from lapilli.errors import ConfigError
from lapilli.quant import QuantConfig

LAYOUTS = ("llava", "huggingface")


def export_checkpoint(
    source: str,
    target: Path,
    *,
    layout: str = "llava",
    dtype: str | None = None,
    template: str | None = None,
    base: str | None = None,
    adapter: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> str:
    """Save a checkpoint in another layout or dtype; return the names of the dtypes written.

    The layout is "llava", the original's, or "huggingface" (LlavaForConditionalGeneration). Without
    `dtype` each of the stored weights is as in its file, without `template` the checkpoint's own is
    recorded. The other arguments are those of `load_checkpoint`; adapters are merged.

    Raises:
        CheckpointError: files are missing or damaged, `target` is there, or the disk is full.
        ConfigError: an unknown layout or dtype, or a quantized checkpoint.
        UnsupportedModelError: the layout cannot hold the model.
        PromptError: no template has the name.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is unknown: choose from {', '.join(LAYOUTS)}")
    check_target(target, overwrite=overwrite)
    plan = make_plan(source, base=base, adapter=adapter)
    if stored_quantization(plan.weights_raw) is not None:
        raise ConfigError(f"{plan.path} is quantized: export the checkpoint that it was made from")
    if layout == "huggingface":
        check_hf_layout(plan.config)
    else:
        check_llava_layout(plan.config)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown: choose from {', '.join(DTYPES)}")
    loaded = load_checkpoint(
        source,
        base=base,
        adapter=adapter,
        template=template,
        device="cpu",
        dtype=dtype or STORED,
        progress=progress,
    )
    save_loaded(target, loaded, layout=layout, overwrite=overwrite)
    return " and ".join(dtype_name(one) for one in common_dtypes(loaded.model.state_dict()))


def save_loaded(
    target: Path,
    loaded: Loaded,
    *,
    layout: str = "llava",
    config: ModelConfig | None = None,
    quantization: QuantConfig | None = None,
    overwrite: bool = False,
    extra: Mapping[str, str | bytes] | None = None,
    check: Check | None = None,
) -> None:
    """Save a loaded checkpoint with its tokenizer, template and detector.

    The arguments are those of `export_checkpoint`; `loaded` may have been changed since, `config`
    and `quantization` are then those that it has now. `extra` are more files by name, `check` is
    that of `new_directory`.

    Raises:
        CheckpointError: `target` is there, or the disk is full.
        ConfigError: see `save_llava` and `save_hf`.
        UnsupportedModelError: the layout cannot hold the model.
    """
    save: Callable[..., None] = (
        partial(save_hf, tokenizer=loaded.tokenizer)
        if layout == "huggingface"
        else partial(save_llava, quantization=quantization)
    )
    save(
        target,
        loaded.model,
        config or loaded.config,
        tokenizer_path=loaded.tokenizer_path,
        template=loaded.template.template,
        overwrite=overwrite,
        extra={**detector_files(loaded.path), **(extra or {})},
        check=check,
    )

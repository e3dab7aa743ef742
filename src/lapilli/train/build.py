"""Builder of checkpoints: a LLaVA out of a language model and a tower, or with another projector.

    language model   its tensors as they are, the vocabulary fitted to the tokenizer
    vision tower     named where a hub id says where it is, else copied beside
    projector        torch's own start, a function of the seed

Tensors are views of the files they come from until they are written, one after the other.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import torch

from lapilli.checkpoint.device import DTYPES
from lapilli.checkpoint.export import save_loaded
from lapilli.checkpoint.formats.quantized import stored_quantization
from lapilli.checkpoint.keymaps import NEWLINE, PROJECTOR
from lapilli.checkpoint.load import STORED, Loaded, load_checkpoint, with_modalities
from lapilli.checkpoint.read.assemble import build_model
from lapilli.checkpoint.read.directory import preprocessor_of
from lapilli.checkpoint.source import is_local, read_json, read_optional_json, resolve
from lapilli.checkpoint.template import find_chat_template
from lapilli.checkpoint.tokenizer import add_image_tokens, load_tokenizer
from lapilli.checkpoint.write.files import (
    TOWER_FOLDER,
    check_target,
    common_dtypes,
    write_json,
    write_pickled,
)
from lapilli.checkpoint.write.llava import TowerPlace, save_llava, write_llava_config
from lapilli.config.families import family_of
from lapilli.config.huggingface import parse_config
from lapilli.config.llava import is_hf_llava, is_original
from lapilli.config.model import ModelConfig
from lapilli.config.projector import parse_projector
from lapilli.config.reader import JsonObject, given_path
from lapilli.config.vision import TOWER_TYPES
from lapilli.errors import ConfigError, ShapeMismatchError, UnsupportedModelError
from lapilli.modality.image.image import ImageModality
from lapilli.modality.image.modes import mode_named
from lapilli.modality.projector import build_projector
from lapilli.prompt.choose import (
    TemplateFacts,
    check_base_template,
    choose_template,
    template_by_name,
    template_of_base,
)
from lapilli.prompt.template import DEFAULT_TEMPLATE
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.train.stages import check_marks

# Vocabulary tables are padded to round sizes; a larger difference means another tokenizer.
_MOST_ROWS_APART = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The checkpoint that `build_llava` made, with the reason why its template was taken."""

    path: Path
    config: ModelConfig
    template: str
    reason: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """The joint of the parts; names and defaults are those of the original's training.

    Attributes:
        projector: `linear`, `mlp2x_gelu`, or another name that config/projector.py knows.
        select_layer: hidden state of the tower, the embeddings' output being number 0.
        select_feature: "patch", or "cls_patch" with the class token.
        aspect: image mode, how a picture becomes tiles: "square", "pad" or "anyres".
        use_start_end: put pictures between <im_start> and <im_end>.
        use_patch_token: add <im_patch>, which nothing uses.
        seed: of the projector.

    Note: the original's default is square; its second stage, and what is published, is pad.
    """

    projector: str = "mlp2x_gelu"
    select_layer: int = -2
    select_feature: str = "patch"
    aspect: str = "pad"
    use_start_end: bool = False
    use_patch_token: bool = False
    seed: int = 0


def build_llava(
    language: str,
    vision: str,
    out: Path,
    *,
    joint: Joint | None = None,
    template: str | None = None,
    dtype: str | None = None,
    tower: str | None = None,
    force: bool = False,
    overwrite: bool = False,
    modalities: Mapping[str, object] | None = None,
) -> Built:
    """Build a LLaVA in the original layout that can be loaded, asked and trained.

    Args:
        language: directory or hub id of a plain language model.
        vision: directory or hub id of a CLIP or SigLIP tower; "pebble", or a LLaVA with its tower
            in a folder of its own, gives that.
        out: the new directory.
        joint: how they are joined; None: as LLaVA 1.5.
        template: name of the conversation template to record; None: what the language model's own
            chat template speaks like, else what its family is spoken to with.
        dtype: of the stored weights; None: each as its file holds it, and the projector as most of
            the language model.
        tower: see `save_llava`; None: named by a hub id, else copied beside.
        force: take a template that contradicts the language model's own.
        overwrite: replace a directory that is there.
        modalities: more of them, see `add_modalities`.

    Raises:
        CheckpointError: files are missing or damaged, or the disk is full.
        ConfigError: parts that cannot be joined, or a template that contradicts the base.
        UnsupportedModelError: a language model, tower or projector of an unknown kind.

    Source: LLaVA train.py and initialize_vision_modules: the projector's start, new vocabulary rows
        being the mean of the old ones.
    Note: rows beyond the tokenizer's length are cut, as the original does at loading.
    """
    joint = joint or Joint()
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown: choose from {', '.join(DTYPES)}")
    if tower not in (None, *get_args(TowerPlace)):
        raise ConfigError(f"tower {tower!r}: choose from {', '.join(get_args(TowerPlace))}")
    check_target(out, overwrite=overwrite)
    base, eyes = resolve(language), _tower_of(resolve(vision))
    raw = read_json(base / "config.json")
    _check_base(raw, base)
    tower_raw = read_json(eyes / "config.json")
    _check_tower(tower_raw, eyes)
    name, reason = _template(raw, base, template, force=force)
    tokenizer = _tokenizer(raw, base, joint)
    doubts = _doubts(name, tokenizer, insists=template is not None and not force)
    written = _config(raw, base, joint, tokenizer) | _vision_keys(joint, tower_raw, eyes)
    config, _ = parse_config(
        written,
        tower=tower_raw,
        preprocessor=preprocessor_of(eyes),
        generation=_generation(base),
    )
    with tempfile.TemporaryDirectory(prefix="lapilli-build-") as folder:
        staged = Path(folder)
        write_json(staged / "config.json", written)
        write_json(staged / "generation_config.json", dict(_generation(base)))
        write_pickled(staged / "mm_projector.bin", _fresh(config, joint.seed))
        loaded = load_checkpoint(staged, base=str(base), device="cpu", dtype=STORED, template=name)
    _round_fresh(loaded)
    loaded = _with_declared(loaded, modalities or {}, joint.seed)
    is_hub = not is_local(vision)
    source = vision.partition("@")[0] if is_hub else str(eyes)
    config = replace(loaded.config, vision_source=source)
    save_llava(
        out,
        loaded.model,
        config,
        tokenizer_path=base,
        tower=cast("TowerPlace", tower or ("named" if is_hub else "beside")),
        dtype=None if dtype is None else DTYPES[dtype],
        template=name,
        overwrite=overwrite,
        extra=_with_pad(base, tokenizer),
    )
    return Built(
        path=out, config=config, template=name, reason=reason, notes=(*loaded.report.notes, *doubts)
    )


def add_modalities(
    source: str | Path,
    out: str | Path,
    modalities: Mapping[str, object],
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> ModelConfig:
    """Write a checkpoint with more modalities, whose weights are fresh; return what it is.

    Args:
        source: a LLaVA or a plain language model, a directory or a hub id.
        out: the new directory.
        modalities: by name, what `lapilli_modalities` of a config.json would say, or a
            ModalityConfig; `from` names a language model that an encoder of texts begins as.
        seed: of the fresh weights.
        overwrite: replace a directory that is there.

    Raises:
        CheckpointError: files are missing or damaged, or the disk is full.
        ConfigError: a modality that cannot be followed, does not fit, or is declared already.
        UnsupportedModelError: a kind that nobody registered.
    """
    if not modalities:
        raise ConfigError("no modality is given: name one, such as user={'kind': 'vector', ...}")
    out = given_path(out)
    check_target(out, overwrite=overwrite)
    loaded = load_checkpoint(source, device="cpu", dtype=STORED)
    if loaded.quantization is not None and loaded.quantization.quantize_tower:
        raise ConfigError(
            f"{source} has packed modalities, and fresh ones are not packed: add them to the "
            "checkpoint that it was made from"
        )
    added = _with_declared(loaded, modalities, seed)
    layout = "llava" if added.quantization else layout_of(added.config)
    save_loaded(out, added, layout=layout, quantization=added.quantization, overwrite=overwrite)
    return added.config


def _with_declared(loaded: Loaded, modalities: Mapping[str, object], seed: int) -> Loaded:
    """Return the checkpoint with fresh modalities, in the number format of most numbers beside."""
    common = common_dtypes(loaded.model.state_dict())[0]
    return with_modalities(loaded, modalities, seed=seed, dtype=common)


def layout_of(config: ModelConfig) -> str:
    """Return the layout that a checkpoint is saved in where nobody asks for another."""
    return "llava" if config.layout == "llava" else "huggingface"


def _check_base(raw: JsonObject, base: Path) -> None:
    if is_original(raw) or is_hf_llava(raw):
        raise ConfigError(
            f"{base} is a LLaVA already: train it as it is (model.checkpoint of a recipe), or give "
            "the plain language model that it was made from"
        )
    if raw.get("model_type") in TOWER_TYPES:
        raise ConfigError(f"{base} is a vision tower: give it as --vision, not as --language")
    if stored_quantization(raw) is not None:
        raise ConfigError(f"{base} is quantized: build from the language model in float")


def _tower_of(folder: Path) -> Path:
    """Return the folder of the tower: of a LLaVA the one inside it."""
    inside = folder / TOWER_FOLDER
    is_llava = (raw := read_optional_json(folder / "config.json")) and is_original(raw)
    return inside if is_llava and (inside / "config.json").is_file() else folder


def _check_tower(raw: JsonObject, eyes: Path) -> None:
    kind = raw.get("model_type")
    if kind not in TOWER_TYPES:
        raise UnsupportedModelError(
            f"{eyes} is no vision tower: its config.json says model_type {kind!r}, expected one of "
            f"{', '.join(TOWER_TYPES)}"
        )


def _template(raw: JsonObject, base: Path, asked: str | None, *, force: bool) -> tuple[str, str]:
    """Return the name of the template, and why it is taken."""
    own = find_chat_template(base)
    if asked is not None:
        template_by_name(asked)
        if not force:
            check_base_template(asked, own, str(base))
        return asked, "asked for"
    family = str(raw.get("model_type"))
    spoken = template_of_base(own, family=family)
    if spoken is not None:
        return spoken, "the language model's own chat template takes turns like it"
    choice = choose_template(TemplateFacts(model_type=f"llava_{family}"))
    return choice.template.name, choice.reason


def _doubts(name: str, tokenizer: Tokenizer, *, insists: bool) -> tuple[str, ...]:
    """Return what the vocabulary says against a template; raise it where a person named it."""
    try:
        check_marks(template_by_name(name), tokenizer, DEFAULT_TEMPLATE)
    except ConfigError as error:
        if insists:
            raise
        return (str(error),)
    return ()


def _tokenizer(raw: JsonObject, base: Path, joint: Joint) -> Tokenizer:
    """Load the base's tokenizer, with the tokens that are added at loading.

    Raises:
        ShapeMismatchError: the vocabulary has far more or far fewer rows than it has tokens.
    """
    config, _ = parse_config(raw, generation=_generation(base))
    tokenizer = load_tokenizer(base, fast=not family_of(config.text).slow_tokenizer)
    rows = config.text.vocab_size
    if abs(rows - tokenizer.vocab_size) > _MOST_ROWS_APART:
        raise ShapeMismatchError(
            f"the vocabulary of {base} has {rows} rows, but its tokenizer {tokenizer.vocab_size} "
            "tokens: the tokenizer belongs to another model"
        )
    add_image_tokens(tokenizer, use_patch=joint.use_patch_token, use_start_end=joint.use_start_end)
    return tokenizer


def _config(raw: JsonObject, base: Path, joint: Joint, tokenizer: Tokenizer) -> dict[str, object]:
    """Return config.json of the language model half, in the original layout."""
    plain, _ = parse_config(raw, generation=_generation(base))
    # What pads, in the order of preference; the original takes unk.
    pads = (plain.tokens.pad_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.eos_id)
    pad = next((index for index in pads if index is not None), None)
    tokens = replace(
        plain.tokens,
        pad_id=pad,
        use_start_end=joint.use_start_end,
        use_patch_token=joint.use_patch_token,
    )
    config = replace(plain, layout="llava", tokens=tokens, max_length=plain.text.max_positions)
    stored = plain.torch_dtype or "float32"
    return write_llava_config(config, vision_source=None, torch_dtype=stored)


def _vision_keys(joint: Joint, tower: JsonObject, eyes: Path) -> dict[str, object]:
    """Return the `mm_` keys of config.json."""
    section = tower.get("vision_config")
    sizes: Mapping[str, object] = section if isinstance(section, dict) else tower
    side = sizes.get("image_size")
    return {
        "mm_vision_tower": str(eyes),
        "mm_vision_select_layer": joint.select_layer,
        "mm_vision_select_feature": joint.select_feature,
        "mm_projector_type": joint.projector,
        "use_mm_proj": True,
        **mode_named(joint.aspect).llava_keys(side if isinstance(side, int) else 224),
    }


def _generation(base: Path) -> JsonObject:
    return read_optional_json(base / "generation_config.json") or {}


def _fresh(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Return a projector as torch begins one, and the row end; the same for the same seed.

    Source: LLaVA llava_arch.py: image_newline is normal with variance 1 / width.
    """
    if config.projector is None:
        raise ConfigError("a model without a vision tower has no projector")
    width = config.text.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = build_projector(config.projector, config.vision)
        newline = torch.randn(width) * width**-0.5
    prefix = family_of(config.text).stem
    found = {f"{prefix}.mm_projector.{name}": t for name, t in projector.state_dict().items()}
    if config.has_newline:
        found[f"{prefix}.image_newline"] = newline
    return found


def _round_fresh(loaded: Loaded) -> None:
    """Convert the fresh projector to the number format of most numbers beside it."""
    common = common_dtypes(loaded.model.state_dict())[0]
    for name, parameter in loaded.model.named_parameters():
        if name.startswith((PROJECTOR, NEWLINE)):
            parameter.data = parameter.data.to(common)


def _with_pad(base: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Return tokenizer_config.json with a padding token, where the base has none."""
    found = dict(read_optional_json(base / "tokenizer_config.json") or {})
    others = read_optional_json(base / "special_tokens_map.json") or {}
    index = tokenizer.unk_id if tokenizer.unk_id is not None else tokenizer.eos_id
    if found.get("pad_token") or others.get("pad_token") or index is None:
        return {}
    found["pad_token"] = tokenizer.id_to_token(index)
    return {"tokenizer_config.json": json.dumps(found, indent=2) + "\n"}


def replace_projector(source: str, out: Path, *, projector: str, seed: int = 0) -> tuple[str, ...]:
    """Write the checkpoint with this projector.

    Weights of the old projector are kept where all of them fit (an mlp and the pooled one have the
    same); otherwise the projector is fresh and wants an `align` stage.

    `projector` is a name such as "pool2x2_mlp2x_gelu" or "resampler144".

    Returns:
        Names of the fresh parameters; none where the old ones were kept.

    Raises:
        ConfigError: a text model, or a projector that this tower cannot have.
        CheckpointError: the directory is there already.
    """
    loaded = load_checkpoint(source, device="cpu", dtype=STORED)
    config = loaded.config
    if config.vision is None or config.image is None or config.projector is None:
        raise ConfigError(f"{source} reads text only: it has no projector to replace")
    if config.layout != "llava":
        raise ConfigError(
            f"{source} has Hugging Face's layout, which cannot say {projector!r}: save it in the "
            "original's first (lapilli export)"
        )
    wanted = parse_projector(
        projector,
        vision_size=config.vision.hidden_size,
        hidden_size=config.text.hidden_size,
    )
    config = replace(config, projector=wanted)
    build_model(config)  # refuses what this tower or this merge cannot have
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_projector(wanted, config.vision)
    image = cast("ImageModality", loaded.model.modality("image"))
    old = image.projector.state_dict()
    new = fresh.state_dict()
    fits = {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    if fits:
        fresh.load_state_dict(old)
    image.projector = fresh.to(
        next(iter((*image.projector.parameters(), *loaded.model.parameters()))).dtype
    )
    save_loaded(out, loaded, config=config)
    return () if fits else tuple(new)

"""`inspect_checkpoint`: format, sizes and tensors of a checkpoint, without reading its weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import wrap

from lapilli.checkpoint.formats.quantized import LayerQuantizer, stored_quantization
from lapilli.checkpoint.keymaps import ATTENTION, NEWLINE, PROJECTOR, TEXT, TOWER
from lapilli.checkpoint.read.assemble import Matching, build_model
from lapilli.checkpoint.read.directory import VISION
from lapilli.checkpoint.read.plan import Plan, make_plan
from lapilli.checkpoint.source import in_folder
from lapilli.checkpoint.template import choose_for
from lapilli.config.modalities import settings_of
from lapilli.config.model import ModelConfig
from lapilli.config.projector import tile_features
from lapilli.config.reader import in_file
from lapilli.geometry import ImageSize
from lapilli.kernels.library import why_not_native
from lapilli.modality.image.modes import mode_of, num_tokens
from lapilli.prompt.choose import Template
from lapilli.quant.autotune import Choices, layer_shapes

# Common pictures: thumbnail, screen shot, phone, wide.
COMMON_SIZES = (
    ImageSize(224, 224),
    ImageSize(336, 336),
    ImageSize(480, 640),
    ImageSize(1024, 1024),
    ImageSize(1080, 1920),
    ImageSize(1920, 1080),
)
# One new token, eight sequences at once, and a prompt with a picture of LLaVA 1.5 in it.
ROWS = (1, 8, 616)
LAYOUTS = {
    "llava": "original LLaVA",
    "hf_llava": "Hugging Face LLaVA 1.5",
    "hf_llava_next": "Hugging Face LLaVA-NeXT",
    "text": "language model without images",
}
COMPONENTS = {
    "language model": TEXT,
    "vision tower": "modalities.image.vision_tower.",
    "projector": PROJECTOR,
    "newline": NEWLINE,
    "cross-attention": ATTENTION[1],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything that `lapilli inspect` prints, as plain values.

    Args:
        format: layout and form, such as "original LLaVA, LoRA".
        architecture: family and sizes of the language model.
        quantization: format, bits, groups and zero points of packed weights, or empty.
        template: name, reason and, if the user overrode it, a note.
        tower: family, sizes and place of the vision tower; empty without images.
        projector: kind and widths; empty without images.
        modalities: what the configuration declares besides images: name -> kind and settings.
        image: aspect, layout of the features, resolutions; empty without images.
        dtypes: dtype -> numbers stored in it, over all files.
        parameters: component -> number of parameters.
        visual_tokens: picture size -> number of its tokens in a prompt.
        special_tokens: role -> "token (id)".
        context: tokens that the language model was trained for.
        ignored_keys: configuration keys that are not read on purpose.
        unknown_keys: configuration keys that nothing reads.
        paths: component -> its directory.
        layers_on_cpu: times of the kernels on this machine for every size of linear layer, if
            measured.
    """

    source: str
    format: str
    architecture: dict[str, object]
    quantization: str = ""
    template: dict[str, str]
    tower: dict[str, object] = field(default_factory=dict)
    projector: dict[str, object] = field(default_factory=dict)
    image: dict[str, object] = field(default_factory=dict)
    modalities: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    visual_tokens: dict[str, int] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    context: int = 0
    ignored_keys: tuple[str, ...] = ()
    unknown_keys: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    paths: dict[str, str] = field(default_factory=dict)
    layers_on_cpu: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return plain values for json.dumps."""
        return asdict(self)

    def to_text(self) -> str:
        """Render one fact per line, empty ones left out; `CUT` shortens lists."""
        lines: list[str] = []
        for key, value in self.to_dict().items():
            text = _value(key, value)
            if text:
                label = "bytes in files" if key == "num_bytes" else key.replace("_", " ")
                lines.append(f"{label:<{LABEL_WIDTH}} {text}")
        return "\n".join(lines)


def inspect_checkpoint(
    source: str | Path,
    *,
    base: str | None = None,
    adapter: str | None = None,
    template: str | Template | None = None,
    choices: Choices | None = None,
) -> Inspection:
    """Inspect a checkpoint without reading its weights.

    The arguments are those of `load_checkpoint`; of a hub repository only the small files are
    fetched. `choices` measures the kernels of linear layers on this CPU; None: nothing is measured.

    Raises:
        CheckpointError: files are missing or damaged. Missing and unexpected tensors are listed.
        ConfigError: config.json cannot be followed.
    """
    plan = make_plan(source, base=base, adapter=adapter, fetch=False)
    with in_folder(plan.path):
        model = build_model(plan.config)
        shapes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
        sizes = layer_shapes(model, ROWS) if choices is not None else []
        packed = stored_quantization(plan.weights_raw)
        if packed is not None:
            names = plan.parameters
            LayerQuantizer(
                model, packed.config, stored=True, published=packed.published, names=names
            )
        matching = plan.match(model)
    choice = choose_for(plan, template)
    chosen = {"name": choice.template.name, "reason": choice.reason}
    tensors = [info for part in plan.parts for info in part.store.infos.values()]
    tensors += list(plan.adapter.store.infos.values()) if plan.adapter else []
    dtypes: Counter[str] = Counter()
    for info in tensors:
        dtypes[str(info.dtype).removeprefix("torch.")] += info.num_parameters
    return Inspection(
        source=str(source),
        format=f"{LAYOUTS[plan.config.layout]}, {plan.form}",
        architecture=_architecture(plan),
        quantization="" if packed is None else str(packed),
        template=chosen if choice.note is None else {**chosen, "note": choice.note},
        tower=_tower(plan),
        projector=_projector(plan.config),
        image=_image(plan.config),
        modalities=_modalities(plan.config),
        dtypes=dict(dtypes),
        parameters=_parameters(shapes, [name for name, _ in plan.config.modalities]),
        num_bytes=sum(info.num_bytes for info in tensors),
        visual_tokens=_visual_tokens(plan.config),
        special_tokens=_special_tokens(plan),
        context=plan.config.text.max_positions,
        ignored_keys=plan.keys.ignored,
        unknown_keys=plan.keys.unknown,
        dropped=matching.dropped,
        missing=_missing(plan, matching),
        unexpected=matching.unexpected,
        paths=_paths(plan),
        layers_on_cpu=tuple(choices.describe(size) for size in sizes) if choices else (),
        notes=tuple(note for note in (*plan.notes, why_not_native()) if note),
    )


def _architecture(plan: Plan) -> dict[str, object]:
    text = plan.config.text
    found: dict[str, object] = {
        "model_type": plan.raw.get("model_type"),
        "family": text.family,
        "layers": text.num_layers,
        "width": text.hidden_size,
        "heads": text.num_heads,
        "kv_heads": text.num_kv_heads,
        "vocabulary": text.vocab_size,
        "torch_dtype": plan.config.torch_dtype,
    }
    if plan.adapter is not None:
        found["lora_rank"] = plan.adapter.config.rank
    return found


def _tower(plan: Plan) -> dict[str, object]:
    vision = plan.config.vision
    if vision is None:
        return {}
    inside = any(
        name.startswith(TOWER) and not part.is_dropped(foreign)
        for part in plan.parts
        if part.label != VISION
        for name, foreign in part.parameters.items()
    )
    return {
        "family": vision.family,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layers": vision.num_layers,
        "width": vision.hidden_size,
        "feature_layer": vision.feature_layer,
        "feature_select": vision.feature_select,
        "from": "the checkpoint" if inside else plan.config.vision_source or "the checkpoint",
    }


def _projector(config: ModelConfig) -> dict[str, object]:
    projector = config.projector
    if projector is None:
        return {}
    found: dict[str, object] = {
        "kind": projector.kind,
        "layers": projector.depth,
        "from": projector.vision_size,
        "to": projector.hidden_size,
    }
    if projector.joins and config.vision is not None:
        found |= {"pool": projector.pool} if projector.pool > 1 else {}
        found |= {"features_per_tile": tile_features(config.vision, projector).number}
    return found


def _image(config: ModelConfig) -> dict[str, object]:
    image = config.image
    if image is None:
        return {}
    found: dict[str, object] = {"aspect": image.aspect}
    if mode_of(image).is_tiled:
        found["merge"] = image.merge
        found["resolutions"] = ", ".join(str(size) for size in image.pinpoints)
    return found


def _modalities(config: ModelConfig) -> dict[str, str]:
    """Return kind and plain settings of every declared modality."""
    found = {}
    for name, modality in config.modalities:
        settings = settings_of(modality).items()
        plain = [f"{key} {value}" for key, value in settings if key != "kind" and _is_plain(value)]
        found[name] = f"({', '.join((modality.kind, *plain))})"
    return found


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _parameters(shapes: dict[str, int], declared: Sequence[str] = ()) -> dict[str, int]:
    parts = COMPONENTS | {name: f"modalities.{name}." for name in declared}
    counts = {
        label: sum(count for name, count in shapes.items() if name.startswith(prefix))
        for label, prefix in parts.items()
    }
    counts["language model"] -= counts["cross-attention"]
    return {label: count for label, count in counts.items() if count}


def _visual_tokens(config: ModelConfig) -> dict[str, int]:
    if config.image is None or config.vision is None:
        return {}
    with in_file():
        return {str(size): num_tokens(size, config) for size in COMMON_SIZES}


def _special_tokens(plan: Plan) -> dict[str, str]:
    tokenizer, tokens = plan.tokenizer, plan.config.tokens
    eos = tokens.eos_ids or ((tokenizer.eos_id,) if tokenizer.eos_id is not None else ())
    roles = {
        "bos": (tokenizer.bos_id,),
        "eos": eos,
        "pad": (tokenizer.pad_id,),
        "unk": (tokenizer.unk_id,),
        "image": (tokens.image_id,),
    }
    found: dict[str, str] = {}
    for role, ids in roles.items():
        known = [i for i in ids if i is not None and i < tokenizer.vocab_size]
        if known:
            found[role] = ", ".join(f"{tokenizer.id_to_token(i)} ({i})" for i in known)
    return found


def _missing(plan: Plan, matching: Matching) -> tuple[str, ...]:
    """Return parameters without a tensor; none where no weights are on this disk."""
    if not plan.parts:
        return ()
    waits = not any(part.has(TOWER) for part in plan.parts) and plan.tower_path is not None
    return tuple(name for name in matching.missing if not (waits and name.startswith(TOWER)))


def _paths(plan: Plan) -> dict[str, str]:
    paths = {"checkpoint": plan.path, "base": plan.base_path, "vision tower": plan.tower_path}
    if plan.adapter is not None:
        paths["adapter"] = plan.adapter.path
    return {label: str(path) for label, path in paths.items() if path is not None}


LABEL_WIDTH = 16
LINE_WIDTH = 100
# Hundreds of tensors may be dropped (a whole text tower); the JSON form lists them all.
CUT = {"dropped": 12}


def _value(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _list(key, [str(one) for one in value])
    return _number(value) if value else ""


def _mapping(value: Mapping[object, object]) -> str:
    known = {str(key): one for key, one in value.items() if one is not None}
    if set(known) >= {"name", "reason"}:
        rest = f"; {known['note']}" if "note" in known else ""
        return f"{known['name']} ({known['reason']}){rest}"
    return ", ".join(f"{key} {_number(one)}" for key, one in known.items())


def _list(key: str, names: list[str]) -> str:
    """Render sentences one per line, names beside each other."""
    if not names:
        return ""
    margin = "\n" + " " * (LABEL_WIDTH + 1)
    if key in ("notes", "layers_on_cpu"):
        return margin.join(names)
    shown = names[: CUT.get(key, len(names))]
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    text = f"{len(names)}: {', '.join(shown)}{more}"
    return margin.join(wrap(text, LINE_WIDTH - LABEL_WIDTH, break_on_hyphens=False))


def _number(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)

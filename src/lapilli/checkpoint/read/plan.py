"""Plan of a load: the form of a checkpoint, and the files that give each of its tensors.

    weights of a model                        full
    adapter_config.json + config.json of LLaVA  LoRA: base + what was trained beside it + adapter
    adapter_config.json                       PEFT adapter on the model that it names
    mm_projector.bin                          projector on a plain language model

A plan reads config files, the tokenizer, and names and shapes of tensors; of their values only an
output layer that should be the embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lapilli.checkpoint.formats.quantized import KEY, is_packed_here, with_quantization_file
from lapilli.checkpoint.formats.weights import WeightStore, find_weight_files
from lapilli.checkpoint.keymaps import ATTENTION, DECLARED, OUTPUT, PROJECTOR, KeyMap
from lapilli.checkpoint.read.adapter import Adapter, is_adapter, open_adapter
from lapilli.checkpoint.read.assemble import (
    Matching,
    Vocabulary,
    has_other_head,
    match,
    saved_tables,
    tied_heads,
)
from lapilli.checkpoint.read.directory import (
    ADAPTER,
    CHECKPOINT,
    WeightPart,
    base_part,
    check_base,
    find_base,
    find_tower,
    keymap_of,
    open_weights,
    pixel_notes,
    preprocessor_of,
    with_tower,
)
from lapilli.checkpoint.source import (
    has_file,
    in_folder,
    is_local,
    read_json,
    read_optional_json,
    resolve,
)
from lapilli.checkpoint.tokenizer import has_tokenizer, tokenizer_of
from lapilli.config.huggingface import parse_config
from lapilli.config.llava import is_original, sampling_notes
from lapilli.config.model import ModelConfig
from lapilli.config.reader import JsonObject, KeyReport, in_file
from lapilli.errors import ConfigError, MissingFileError
from lapilli.modality.image.modes import mode_of
from lapilli.prompt.tokenizer import Tokenizer

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
PEFT_ADAPTER = "PEFT adapter"
# Beginnings of names that carry the `model.` of PEFT's wrapper before their own.
WRAPPED = ("model.model.", "model.transformer.", f"model.{ATTENTION[0]}", f"model.{DECLARED[0]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Form of a checkpoint, its configuration, and the parts that its tensors come from.

    Args:
        form: "full", "LoRA", PEFT_ADAPTER or "projector".
        raw: its config.json, naming the tower that is read.
        weights_raw: config.json beside the weights of the language model (a base's, for an
            adapter), with their quantization.
        config: of the model, its vocabulary already of the tokenizer's length.
        parts: sources of the tensors; later ones override earlier ones.
        keymap: of the names of an adapter's modules.
        tokenizer: with the tokens added that the original adds.
        tokenizer_path: directory of the tokenizer and the chat template.
        adapter: laid over the model when it is filled.
        base_path: of the language model under an adapter or projector.
        tower_path: of a vision tower outside the checkpoint.
    """

    form: str
    path: Path
    raw: JsonObject
    weights_raw: JsonObject
    config: ModelConfig
    keys: KeyReport
    parts: tuple[WeightPart, ...]
    keymap: KeyMap
    tokenizer: Tokenizer
    tokenizer_path: Path
    vocabulary: Vocabulary
    adapter: Adapter | None = None
    base_path: Path | None = None
    tower_path: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> frozenset[str]:
        """The parameters that the files have tensors for."""
        return frozenset(name for part in self.parts for name in part.parameters)

    @property
    def beside(self) -> tuple[str, ...]:
        """The parameters that came whole with an adapter or a projector."""
        labels = (ADAPTER, *NON_LORA_FILES, *PROJECTOR_FILES)
        parts = [part for part in self.parts if part.label in labels]
        return tuple(dict.fromkeys(name for part in parts for name in part.parameters))

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Every weight file, those of a base, a tower and an adapter too."""
        stores = [part.store for part in self.parts]
        stores += [] if self.adapter is None else [self.adapter.store]
        return tuple(dict.fromkeys(s.path for store in stores for s in store.shards.values()))

    def with_text(self, note: str, **changes: Any) -> "Plan":  # noqa: ANN401  of any field
        """Return the plan of a changed language model, with a note that says so."""
        text = replace(self.config.text, **changes)
        config = replace(self.config, text=text)
        return replace(self, config=config, notes=(*self.notes, note))

    def with_head(self, note: str, label: str = ADAPTER) -> "Plan":
        """Return the plan of a model whose output layer is a copy of its embedding."""
        apart = self.with_text(note, tie_embeddings=False)
        return replace(apart, parts=(*tied_heads(self.parts, label), *self.parts))

    def match(self, model: nn.Module) -> Matching:
        """Match the parameters of a model with the tensors of the files."""
        return match(self.parts, model, tied=self.config.text.tie_embeddings)


def make_plan(
    source: str | Path,
    *,
    base: str | None = None,
    adapter: str | None = None,
    fetch: bool = True,
) -> Plan:
    """Plan the load of a checkpoint.

    The arguments are those of `load_checkpoint`. With fetch=False the weights of a hub repository
    stay where they are, and `parts` is empty.

    Raises:
        CheckpointError: files are missing, damaged, or do not belong together.
        ConfigError: config.json cannot be followed.
    """
    plan = _plan_source(source, base, fetch=fetch)
    if adapter is not None:
        plan = _with_adapter(plan, resolve(adapter))
    return _with_stored_head(plan)


def _plan_source(source: str | Path, base: str | None, *, fetch: bool) -> Plan:
    path = resolve(source, weights=fetch)
    weights = fetch or is_local(source)
    if is_adapter(path):
        return _plan_adapter(path, base, fetch=fetch)
    if _first(path, PROJECTOR_FILES) is not None and not find_weight_files(path):
        return _plan_on_base("projector", path, base, PROJECTOR_FILES, fetch=fetch)
    if base is not None:
        raise ConfigError(
            f"base {base!r} was given, but {path} is a whole model: a base is for LoRA and "
            "projector-only checkpoints"
        )
    plan = _plan("full", path, weights=weights, fetch=fetch)
    if weights and not any(part.label == CHECKPOINT for part in plan.parts):
        raise MissingFileError(
            f"no weights in {path}: looked for model.safetensors, pytorch_model.bin and their "
            "shards, adapter_config.json and mm_projector.bin"
        )
    return plan


def _plan_adapter(path: Path, base: str | None, *, fetch: bool) -> Plan:
    """Plan a directory with adapter_config.json: the original's LoRA, or a PEFT adapter."""
    adapter = open_adapter(path)
    raw = read_optional_json(path / "config.json")
    if raw is not None and is_original(raw):
        return _plan_on_base("LoRA", path, base, NON_LORA_FILES, adapter=adapter, fetch=fetch)
    below = find_base(base, adapter.base_name, path, revision=adapter.revision, fetch=fetch)
    return _with_adapter(_plan_source(below, None, fetch=fetch), path)


def _with_adapter(plan: Plan, path: Path) -> Plan:
    """Add a PEFT adapter to a plan."""
    adapter = open_adapter(path)
    if plan.adapter is not None:
        raise ConfigError(
            f"{plan.path} is an adapter itself: merge it into a whole checkpoint before laying "
            f"{path} over it"
        )
    own = read_optional_json(path / "config.json")
    # A folder in the original layout has the original's names, whatever the layout of the base.
    keymap = keymap_of(own) if own is not None and is_original(own) else plan.keymap
    parts = (*plan.parts, *_saved_part(adapter, keymap))
    beside = _first(path, NON_LORA_FILES)
    if beside is not None:
        parts += (_trained_part(beside, keymap),)
    laid = replace(
        plan,
        form=PEFT_ADAPTER,
        adapter=adapter,
        parts=parts,
        keymap=keymap,
        base_path=plan.base_path or plan.path,
        path=path,
    )
    return _with_own_head(_with_longer_vocabulary(laid))


def _with_stored_head(plan: Plan) -> Plan:
    """Keep an output layer of the files that differs from the embedding that it should be.

    Source: transformers from 5.0 keeps both tables and warns.
    """
    if not plan.config.text.tie_embeddings or not has_other_head(plan.parts):
        return plan
    note = (
        "config.json says that the output layer is the embedding (tie_word_embeddings), but the "
        "files hold another one: that is used"
    )
    return plan.with_text(note, tie_embeddings=False)


def _with_own_head(plan: Plan) -> Plan:
    """Untie output layer and embedding where the adapter changes one of them.

    Source: PEFT: LoRA and modules_to_save lie on one module, the other keeps the base's weight.
    """
    adapter = plan.adapter
    if adapter is None or not plan.config.text.tie_embeddings:
        return plan
    saved = saved_tables(plan.parts)
    adapted = f"{OUTPUT.removesuffix('weight')}lora_A.weight" in adapter.halves(plan.keymap)
    if not adapted and OUTPUT not in saved and (adapter.keeps_ties or not saved):
        return plan
    note = (
        "the base's output layer is its embedding, but the adapter changes one of the two: they "
        "are kept apart"
    )
    return plan.with_head(note)


def _with_longer_vocabulary(plan: Plan) -> Plan:
    """Add the tokens of the adapter to the plan, whose vocabulary tables have rows for them.

    Source: PEFT stores both tables whole where a program gave the model more rows.
    """
    saved = saved_tables(plan.parts)
    rows = max(saved.values(), default=0)
    path, before = plan.path, plan.vocabulary.rows
    if has_tokenizer(path):
        tokenizer = tokenizer_of(path, plan.config)[0]
        if tokenizer.vocab_size > plan.tokenizer.vocab_size:
            plan = replace(plan, tokenizer=tokenizer, tokenizer_path=path)
    if rows <= before:
        return plan
    table = replace(plan.vocabulary, rows=rows, accepted=plan.vocabulary.accepted | {rows})
    note = f"the adapter's vocabulary has {rows} rows, the base's {before}"
    return replace(plan.with_text(note, vocab_size=rows), vocabulary=table)


def _plan_on_base(
    form: str,
    path: Path,
    base: str | None,
    files: Sequence[str],
    *,
    adapter: Adapter | None = None,
    fetch: bool = True,
) -> Plan:
    """Plan the original's LoRA or projector: its own config.json over a plain model's weights."""
    raw = read_json(path / "config.json")
    named = adapter.base_name if adapter else None
    revision = adapter.revision if adapter and named else None
    recorded = raw.get("_name_or_path")
    named = named or (recorded if isinstance(recorded, str) else None)
    base_path = find_base(base, named, path, revision=revision, fetch=fetch)
    below = base_part(base_path, fetch=fetch)
    parts = [] if below is None else [below]
    trained = _first(path, files)
    if trained is not None:
        parts.append(_trained_part(trained, keymap_of(raw)))
    elif below is not None and not below.has(PROJECTOR):
        raise MissingFileError(f"{files[-1]} is missing in {path}: the projector is in it")
    parts += _saved_part(adapter, keymap_of(raw))
    plan = _plan(form, path, extra=parts, adapter=adapter, base_path=base_path, fetch=fetch)
    return _with_own_head(plan)


def _saved_part(adapter: Adapter | None, keymap: KeyMap) -> list[WeightPart]:
    """Return a part of the whole tensors inside an adapter, if it has any."""
    saved = WeightStore() if adapter is None else adapter.saved_modules()
    return [WeightPart(ADAPTER, saved, keymap)] if saved.infos else []


def _trained_part(file: Path, keymap: KeyMap) -> WeightPart:
    """Open tensors that were stored under the names of a model wrapped by PEFT.

    Source: LLaVA builder.py: `base_model.` is stripped, then one `model.` where all have two.
    """
    store, plain = WeightStore.of_files([file]), WeightStore()
    names = {n: n.removeprefix("module.").removeprefix("base_model.") for n in store.infos}
    wrapped = any(name.startswith(WRAPPED) for name in names.values())
    for foreign, name in names.items():
        plain.rename(store, foreign, name.removeprefix("model.") if wrapped else name)
    return WeightPart(file.name, plain, keymap)


def _first(path: Path, names: Sequence[str]) -> Path | None:
    return next((path / name for name in names if has_file(path / name)), None)


def _plan(
    form: str,
    path: Path,
    *,
    extra: Sequence[WeightPart] = (),
    adapter: Adapter | None = None,
    base_path: Path | None = None,
    weights: bool = True,
    fetch: bool = True,
) -> Plan:
    """Plan a directory with a config.json.

    `extra` are weights that belong to it but lie elsewhere; they may bring the vision tower. With
    weights=False only the small files are looked at and `parts` is empty, with fetch=False the
    weights of a vision tower on the hub stay there.
    """
    raw = read_json(path / "config.json")
    tower_path, has_moved = find_tower(raw, path, base=base_path, fetch=fetch)
    if has_moved:
        raw = {**raw, "mm_vision_tower": str(tower_path)}
    store = open_weights(path) if weights else WeightStore()
    generation = read_optional_json(path / "generation_config.json")
    tower = read_json(tower_path / "config.json") if tower_path else None
    preprocessor = preprocessor_of(tower_path or path)
    with in_folder(path), in_file():
        config, keys = parse_config(
            raw,
            tower=tower,
            preprocessor=preprocessor,
            generation=generation,
            weight_names=frozenset(store.infos),
        )
        if config.image is not None:
            mode_of(config.image)  # a mode that is not ours is refused before weights are read
    keymap = keymap_of(raw)
    parts = (*extra, *([WeightPart(CHECKPOINT, store, keymap)] if store.infos else ()))
    notes = [*pixel_notes(tower_path or path, config), *sampling_notes(generation or {})]
    if has_moved:
        notes.append(
            f"the vision tower is the base's, {tower_path}: the one that was named is gone"
        )
    if tower_path is not None and weights:
        parts, more = with_tower(parts, config, tower_path, fetch=fetch)
        notes += more
    before = base_rows = rows = config.text.vocab_size
    below_raw, tokenizer_path = raw, path
    if base_path is not None:
        base_rows = check_base(config.text, base_path)
        below_raw = read_json(base_path / "config.json")
        tokenizer_path = path if has_tokenizer(path) else base_path
    tokenizer, new = tokenizer_of(tokenizer_path, config)
    if config.layout == "llava":
        if not is_packed_here(raw):  # packed rows stay as they were written
            rows = tokenizer.vocab_size
        how = "cut" if rows < before else "grown, new rows being the mean of the others,"
        change = f"{how} from {before} to {rows} rows, the length of the tokenizer"
        notes += [] if rows == before else [f"the vocabulary was {change}"]
    weights_raw = with_quantization_file(below_raw, base_path or path)
    return Plan(
        form=form,
        path=path,
        raw=raw,
        weights_raw=weights_raw,
        config=replace(config, text=replace(config.text, vocab_size=rows)),
        keys=keys.with_read(KEY) if raw.get(KEY) == weights_raw.get(KEY) else keys,
        parts=parts,
        keymap=keymap,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        vocabulary=Vocabulary(rows=rows, accepted=frozenset({before, base_rows}), new_rows=new),
        adapter=adapter,
        base_path=base_path,
        tower_path=tower_path,
        notes=tuple(notes),
    )

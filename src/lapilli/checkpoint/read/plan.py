"""What loading will do: which form a checkpoint has, and which files give which tensors.

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

import torch
from torch import nn

from lapilli.checkpoint.formats.files import has_file, read_json, read_optional_json
from lapilli.checkpoint.formats.quantized import is_packed_here, with_quantization_file
from lapilli.checkpoint.formats.weights import WeightStore, find_weight_files
from lapilli.checkpoint.keymaps import EMBEDDINGS, LANGUAGE_MODEL, OUTPUT, PROJECTOR, KeyMap
from lapilli.checkpoint.read.adapter import Adapter, is_adapter, open_adapter
from lapilli.checkpoint.read.assemble import Matching, Vocabulary, match
from lapilli.checkpoint.read.directory import (
    CheckpointDirectory,
    WeightPart,
    base_part,
    check_base,
    find_base,
    keymap_of,
    open_directory,
)
from lapilli.checkpoint.source import is_local, resolve
from lapilli.checkpoint.tokenizer import add_image_tokens, has_tokenizer, load_tokenizer
from lapilli.config.families import family_of
from lapilli.config.model import ModelConfig
from lapilli.config.parse import is_original
from lapilli.config.reader import JsonObject, KeyReport
from lapilli.errors import ConfigError, ConfigFileError, MissingFileError
from lapilli.prompt.tokenizer import Tokenizer

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
ADAPTER = "adapter"
# What names begin with that carry the `model.` of PEFT's wrapper before their own.
WRAPPED = ("model.model.", "model.transformer.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checkpoint, understood.

    Args:
        form: "full", "LoRA", "PEFT adapter" or "projector".
        path: the directory that was asked for.
        raw: its config.json.
        weights_raw: config.json of the language model's weights, a base's for what lies on one;
            it says how they are packed.
        config: what the model is, its vocabulary already of the tokenizer's length.
        keys: what becomes of the configuration keys.
        parts: where the tensors come from; later ones override earlier ones.
        keymap: the names that an adapter's modules have.
        tokenizer: with the tokens added that the original adds.
        tokenizer_path: where it and the chat template come from.
        vocabulary: how the vocabulary tables of the files are fitted.
        adapter: laid over the model when it is filled.
        base_path: of the language model under an adapter or projector.
        tower_path: of a vision tower outside the checkpoint.
        notes: for the report.
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
        """Return the parameters that the files have a tensor for, by the rules for names."""
        names = (part.parameter(name) for part in self.parts for name in part.store.infos)
        return frozenset(name for name in names if name is not None)

    @property
    def beside(self) -> tuple[str, ...]:
        """Return the parameters that came whole with an adapter or a projector."""
        labels = (ADAPTER, *NON_LORA_FILES, *PROJECTOR_FILES)
        parts = [part for part in self.parts if part.label in labels]
        names = [part.parameter(name) for part in parts for name in part.store.infos]
        return tuple(dict.fromkeys(name for name in names if name is not None))

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Return every file that gives tensors, a base's, a tower's and an adapter's too."""
        stores = [part.store for part in self.parts]
        stores += [] if self.adapter is None else [self.adapter.store]
        return tuple(dict.fromkeys(s.path for store in stores for s in store.shards.values()))

    def match(self, model: nn.Module) -> Matching:
        """Pair every tensor of the files with a parameter of the model."""
        return match(self.parts, model, tied=self.config.text.tie_embeddings)

    @property
    def has_weights(self) -> bool:
        """Return whether the weights were looked at."""
        return bool(self.parts)


def make_plan(
    source: str | Path,
    *,
    base: str | None = None,
    adapter: str | None = None,
    fetch: bool = True,
) -> Plan:
    """Understand a checkpoint.

    Args:
        source: a directory, a hub id or "pebble".
        base: the language model under a LoRA or a projector; None takes what the checkpoint names.
        adapter: a PEFT adapter to lay over the checkpoint.
        fetch: False leaves the weights of a hub repository where they are; `parts` is then empty.

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
    directory = open_directory(path, weights=weights, fetch=fetch)
    if weights and not any(part.label == "checkpoint" for part in directory.parts):
        raise MissingFileError(
            f"no weights in {path}: looked for model.safetensors, pytorch_model.bin and their "
            "shards, adapter_config.json and mm_projector.bin"
        )
    return _plan("full", directory)


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
    # The original's folder keeps the original's names, whatever the base calls its modules.
    keymap = keymap_of(own) if own is not None and is_original(own) else plan.keymap
    parts = (*plan.parts, *_saved_part(adapter, keymap))
    beside = _first(path, NON_LORA_FILES)
    if beside is not None:
        parts += (_trained_part(beside, keymap),)
    laid = replace(
        plan,
        form="PEFT adapter",
        adapter=adapter,
        parts=parts,
        keymap=keymap,
        base_path=plan.base_path or plan.path,
        path=path,
    )
    return _with_own_head(_with_longer_vocabulary(laid))


def _with_stored_head(plan: Plan) -> Plan:
    """Keep the output layer of the files where it is not the embedding that it should be.

    Source: transformers from 5.0 keeps both tables and warns.
    """
    text = plan.config.text
    if not text.tie_embeddings or not _has_other_head(plan.parts):
        return plan
    note = (
        "config.json says that the output layer is the embedding (tie_word_embeddings), but the "
        "files hold another one: that is used"
    )
    config = replace(plan.config, text=replace(text, tie_embeddings=False))
    return replace(plan, config=config, notes=(*plan.notes, note))


def _has_other_head(parts: Sequence[WeightPart]) -> bool:
    """Return whether the last part with an output layer holds another one than its embedding.

    Only of a model whose configuration says that both are one: some programs that fold an adapter
    in leave that as it was.
    """
    for part in reversed(parts):
        named = {part.parameter(foreign): foreign for foreign in part.store.infos}
        head = named.get(OUTPUT)
        if head is None or part.is_dropped(head):
            continue
        table = next((named[name] for name in EMBEDDINGS if name in named), None)
        infos = part.store.infos
        if table is None or infos[table].shape != infos[head].shape:
            return True
        dtype = None if infos[table].dtype == infos[head].dtype else torch.float32
        return not torch.equal(part.store.tensor(head, dtype), part.store.tensor(table, dtype))
    return False


def _with_own_head(plan: Plan) -> Plan:
    """Give the plan an output layer of its own where the adapter changes one of a tied pair.

    Source: PEFT: LoRA and modules_to_save lie on one module, the other keeps the base's weight.
    """
    adapter = plan.adapter
    if adapter is None or not plan.config.text.tie_embeddings:
        return plan
    saved = _saved_tables(plan)
    adapted = f"{OUTPUT.removesuffix('weight')}lora_A.weight" in adapter.halves(plan.keymap)
    if not adapted and OUTPUT not in saved and (adapter.keeps_ties or not saved):
        return plan
    heads = []
    for part in plan.parts:
        head = WeightStore()
        for foreign in part.store.infos if part.label != ADAPTER else ():
            if part.parameter(foreign) in EMBEDDINGS:
                head.rename(part.store, foreign, "lm_head.weight")
        heads += [WeightPart(ADAPTER, head, LANGUAGE_MODEL)] if head.infos else []
    note = (
        "the base's output layer is its embedding, but the adapter changes one of the two: they "
        "are kept apart"
    )
    return replace(
        plan,
        config=replace(plan.config, text=replace(plan.config.text, tie_embeddings=False)),
        parts=(*heads, *plan.parts),
        notes=(*plan.notes, note),
    )


def _with_longer_vocabulary(plan: Plan) -> Plan:
    """Add the tokens of the adapter to the plan: its tables have rows for them.

    Source: PEFT stores both tables whole where a program gave the model more rows.
    """
    saved = _saved_tables(plan)
    rows = max(saved.values(), default=0)
    path, before = plan.path, plan.vocabulary.rows
    if has_tokenizer(path):
        tokenizer = _tokenizer_of(path, plan.config)[0]
        if tokenizer.vocab_size > plan.tokenizer.vocab_size:
            plan = replace(plan, tokenizer=tokenizer, tokenizer_path=path)
    if rows <= before:
        return plan
    table = replace(plan.vocabulary, rows=rows, accepted=plan.vocabulary.accepted | {rows})
    return replace(
        plan,
        config=replace(plan.config, text=replace(plan.config.text, vocab_size=rows)),
        vocabulary=table,
        notes=(*plan.notes, f"the adapter's vocabulary has {rows} rows, the base's {before}"),
    )


def _saved_tables(plan: Plan) -> dict[str, int]:
    """Return the vocabulary tables that the adapter holds whole, and their rows."""
    found = (
        (part.parameter(name), info.shape[0] if info.shape else 0)
        for part in plan.parts
        if part.label == ADAPTER
        for name, info in part.store.infos.items()
    )
    return {name: rows for name, rows in found if name in (*EMBEDDINGS, OUTPUT)}


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
    base_path = find_base(base, named or _name_of_base(raw), path, revision=revision, fetch=fetch)
    below = base_part(base_path, fetch=fetch)
    parts = [] if below is None else [below]
    trained = _first(path, files)
    if trained is not None:
        parts.append(_trained_part(trained, keymap_of(raw)))
    elif below is not None and not below.has(PROJECTOR):
        raise MissingFileError(f"{files[-1]} is missing in {path}: the projector is in it")
    parts += _saved_part(adapter, keymap_of(raw))
    directory = open_directory(path, extra=parts, base=base_path, fetch=fetch)
    base_rows = check_base(directory.config.text, base_path)
    return _with_own_head(
        _plan(
            form,
            directory,
            adapter=adapter,
            base_path=base_path,
            base_rows=base_rows,
        )
    )


def _name_of_base(raw: JsonObject) -> str | None:
    name = raw.get("_name_or_path")
    return name if isinstance(name, str) and name else None


def _saved_part(adapter: Adapter | None, keymap: KeyMap) -> list[WeightPart]:
    """Return the whole tensors inside an adapter, where it has some."""
    saved = WeightStore() if adapter is None else adapter.saved_modules()
    return [WeightPart(ADAPTER, saved, keymap)] if saved.infos else []


def _trained_part(file: Path, keymap: KeyMap) -> WeightPart:
    """Open tensors that were trained and stored under the names of a wrapped model.

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
    directory: CheckpointDirectory,
    *,
    adapter: Adapter | None = None,
    base_path: Path | None = None,
    base_rows: int | None = None,
) -> Plan:
    """Complete a plan: the tokenizer, and the vocabulary of its length."""
    config = directory.config
    where = directory.path
    if base_path is not None and not has_tokenizer(where):
        where = base_path
    tokenizer, new = _tokenizer_of(where, config)
    before = config.text.vocab_size
    rows = before
    notes = list(directory.notes)
    if config.layout == "llava":
        if not is_packed_here(directory.raw):  # packed rows stay as they were written
            rows = tokenizer.vocab_size
        notes += _vocabulary_notes(before, rows)
    return Plan(
        form=form,
        path=directory.path,
        raw=directory.raw,
        weights_raw=_weights_raw(directory, base_path),
        config=replace(config, text=replace(config.text, vocab_size=rows)),
        keys=directory.keys,
        parts=directory.parts,
        keymap=keymap_of(directory.raw),
        tokenizer=tokenizer,
        tokenizer_path=where,
        vocabulary=Vocabulary(
            rows=rows, accepted=frozenset({before, base_rows or before}), new_rows=new
        ),
        adapter=adapter,
        base_path=base_path,
        tower_path=directory.tower_path,
        notes=tuple(notes),
    )


def _tokenizer_of(path: Path, config: ModelConfig) -> tuple[Tokenizer, int]:
    """Load a tokenizer as this kind of model reads it; return how many tokens were added too."""
    # A model that came with an image token was tokenized by its tokenizer.json.
    has_image_token = config.tokens.image_id is not None
    fast = config.layout != "llava" or not family_of(config.text).slow_tokenizer
    fast = fast or has_image_token
    tokenizer = load_tokenizer(path, fast=fast)
    _check_image_id(config, tokenizer)
    if config.layout != "llava":
        image = config.tokens.image_id
        if image in tokenizer.added_vocab.values() and image is not None:
            # Whatever its file says: typed by a person it stands for no picture.
            tokenizer.add_tokens([tokenizer.id_to_token(image)], special=True)
        return tokenizer, 0
    new = add_image_tokens(
        tokenizer,
        use_patch=config.tokens.use_patch_token,
        use_start_end=config.tokens.use_start_end,
    )
    return tokenizer, new


def _check_image_id(config: ModelConfig, tokenizer: Tokenizer) -> None:
    image_id = config.tokens.image_id
    # A table often has more rows than the tokenizer has tokens, and the image may stand for one.
    size = max(tokenizer.vocab_size, config.text.vocab_size)
    if image_id is not None and not 0 <= image_id < size:
        raise ConfigFileError(
            f"config.json: image_token_index is {image_id}, but there are {size} tokens: they do "
            "not belong together"
        )


def _weights_raw(directory: CheckpointDirectory, base_path: Path | None) -> JsonObject:
    if base_path is None:
        return with_quantization_file(directory.raw, directory.path)
    return with_quantization_file(read_json(base_path / "config.json"), base_path)


def _vocabulary_notes(before: int, rows: int) -> list[str]:
    if rows == before:
        return []
    how = "cut" if rows < before else "grown, new rows being the mean of the others,"
    return [f"the vocabulary was {how} from {before} to {rows} rows, the length of the tokenizer"]

"""`load_checkpoint`: a model, its tokenizer and template, and a report, from a plan.

Checkpoints are read only, and weights are memory-mapped where they need no conversion.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lapilli.checkpoint.device import AUTO, choose_device, choose_dtype
from lapilli.checkpoint.formats.quantized import (
    LayerQuantizer,
    StoredQuantization,
    faster_tower_dtype,
    stored_quantization,
)
from lapilli.checkpoint.keymaps import LANGUAGE_MODEL
from lapilli.checkpoint.read.assemble import (
    LoadReport,
    Progress,
    Vocabulary,
    build_model,
    check_complete,
    fill,
)
from lapilli.checkpoint.read.directory import CHECKPOINT, open_weights
from lapilli.checkpoint.read.plan import Plan, make_plan
from lapilli.checkpoint.source import in_folder, read_optional_json, resolve
from lapilli.checkpoint.template import choose_for
from lapilli.checkpoint.tokenizer import load_tokenizer
from lapilli.config.families import IGNORED, family_of
from lapilli.config.huggingface import supported_types
from lapilli.config.llava import parse_tokens
from lapilli.config.modalities import Modalities, attention_every, declared, modality_config
from lapilli.config.model import ModelConfig
from lapilli.config.reader import (
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_WIDTH,
    MOST_WORDS,
    JsonObject,
    KeyReader,
    KeyReport,
)
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.lm import add_cross_attention
from lapilli.lm.foreign import load_foreign
from lapilli.lora import inject, merge
from lapilli.modality import build_modality
from lapilli.model import VisionLanguageModel
from lapilli.prompt.choose import Template, TemplateChoice
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.quant import QuantConfig, quant_config, quantize
from lapilli.quant.autotune import (
    Choices,
    cache_file,
    take_faster_layers,
    take_faster_products,
)

STORED = "stored"  # every tensor in the dtype of its file


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint in memory.

    Args:
        model: in evaluation mode.
        tokenizer: with the tokens added that the original adds at loading.
        template: the conversation template and why it was chosen.
        report: used, dropped, missing and unexpected tensors; read and unread keys.
        tokenizer_path: the directory of its tokenizer (a base's, for an adapter).
        raw: config.json as it is, for the names of the original.
        weight_files: files of its tensors; none where transformers read them.
        quantization: of the linear layers, for `save_llava`; None where they are not quantized.
        beside: parameters that came whole with an adapter or a projector, not with the base.
        stored: dtype of the floats of a parameter in the files, by its name; passed to a writer as
            `dtype`, it keeps every tensor from being rounded.
    """

    model: VisionLanguageModel
    tokenizer: Tokenizer
    config: ModelConfig
    template: TemplateChoice
    report: LoadReport
    path: Path
    tokenizer_path: Path
    dtype: torch.dtype
    raw: JsonObject
    weight_files: tuple[Path, ...] = ()
    quantization: QuantConfig | None = None
    beside: tuple[str, ...] = ()
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)


def load_checkpoint(
    source: str | Path,
    *,
    base: str | None = None,
    adapter: str | None = None,
    template: str | Template | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    strict_config: bool = False,
    merge_lora: bool = True,
    check_finite: bool = True,
    progress: Progress | None = None,
    quantization: str | QuantConfig | None = None,
    quantize_tower: bool = False,
    float32_parameters: Callable[[str], bool] | None = None,
) -> Loaded:
    """Load a model, its tokenizer and a report from any LLaVA checkpoint as it was published.

    Args:
        source: a directory, a hub id ("owner/name" or "owner/name@revision") or "pebble".
        base: the language model under a LoRA or a projector-only checkpoint; None takes what the
            checkpoint names.
        adapter: a PEFT adapter to lay over the checkpoint.
        template: see `lapilli.prompt.choose.choose_template`; None: the checkpoint's own.
        device: "auto" takes a CUDA device where there is one, else the CPU.
        dtype: see `choose_dtype`; "stored": every tensor as its file holds it, to be written again
            and not to be computed with.
        strict_config: refuse configuration keys that nothing reads.
        merge_lora: fold a LoRA into the weights; False keeps it beside them.
        check_finite: refuse NaN and infinities, at the cost of one pass over the weights.
        progress: called after every tensor with the number of bytes read and of all bytes.
        quantization: "int8", "int4" or a QuantConfig: linear layers are packed while they are
            read, so that memory holds the packed model and one layer more; None: as the files are.
            Layers that AWQ and GPTQ files hold packed stay as they are; "int4" packs the rest.
        quantize_tower: pack the vision tower and the projector too, in 8 bits.
        float32_parameters: tells the names of parameters that are float32 whatever `dtype` says,
            to be trained; None: none. An adapter kept beside the weights is float32 too.

    Raises:
        CheckpointError: files are missing, damaged, unsafe, or do not belong together.
        ConfigError: the configuration cannot be followed.
        PromptError: no template has the name that was asked for.

    Source: LLaVA builder.py load_pretrained_model.
    Note: the original decides by the name of the folder; here the files decide. On a CPU, weights
        that have the dtype already are views of their files, not copies: replace such a file by
        renaming a new one over it, as `save_llava` does. One that is changed or truncated in place
        changes the model or crashes the process.
    """
    where = choose_device(device)
    try:
        plan = make_plan(source, base=base, adapter=adapter)
    except UnsupportedModelError as refusal:
        if base is not None or adapter is not None:
            raise
        if quantization is not None:
            raise UnsupportedModelError(f"{refusal}; other families are not quantized") from refusal
        model, plan = load_foreign_model(source, refusal, device=where, dtype=dtype)
        report = LoadReport(used=tuple(model.state_dict()), notes=plan.notes, keys=plan.keys)
        return _loaded(model, plan, report, template)
    if strict_config:
        plan.keys.refuse_unknown()
    with in_folder(plan.path):
        stored = stored_quantization(plan.weights_raw)
        asked = _asked(quantization, stored, where, quantize_tower=quantize_tower)
        plan = _with_head_to_pack(plan, asked, stored)
        model = build_model(plan.config)
        free = where.type == "cpu" and dtype == AUTO  # to take the faster dtype
        computes = where.type == "cpu" and dtype != STORED
        quantizer = _quantizer(
            plan, model, asked, stored, merge_lora=merge_lora, free=free, reads_kept=computes
        )
        matching = plan.match(model)
        check_complete(matching)
        target = None
        if dtype != STORED:
            target = choose_dtype(
                dtype,
                device=where,
                stored=plan.config.torch_dtype,
                num_parameters=_num_floats(model, quantizer),
            )
        fill(
            model,
            matching,
            plan.vocabulary,
            dtype=target,
            device=where,
            check_finite=check_finite,
            progress=progress,
            quantizer=quantizer,
            float32_parameters=float32_parameters,
        )
        if plan.adapter is not None:
            tensors = plan.adapter.tensors(plan.keymap, check_finite=check_finite)
            inject(model, plan.adapter.config_of(plan.keymap), tensors, dtype=torch.float32)
            if merge_lora:
                merge(model)
        notes = () if quantizer is None else quantizer.notes
        if asked is not None and quantizer is None:  # an adapter had to be folded in first
            notes = quantize(model, asked).notes
        if computes:
            choices = Choices(cache_file())
            take_faster_products(model, choices)
            take_faster_layers(model, choices)
    report = LoadReport(
        used=tuple(sorted(matching.sources)),
        dropped=matching.dropped,
        missing=matching.missing,
        unexpected=matching.unexpected,
        notes=(*plan.notes, *notes),
        keys=plan.keys,
    )
    config = asked if quantizer is None else quantizer.config
    loaded = _loaded(model, plan, report, template)
    return replace(loaded, quantization=config, stored=matching.dtypes)


def with_modalities(
    loaded: Loaded,
    modalities: Mapping[str, object],
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Return a checkpoint that declares more modalities, whose weights are fresh; same for a seed.

    The first that is attended to brings gated blocks, whose gates are shut.

    Args:
        loaded: the checkpoint, whose model is changed in place.
        modalities: by name a ModalityConfig, or settings as in a config.json; those of a kind with
            an encoder of its own may say `from`: the language model whose weights that begins with.
        seed: of what is drawn.
        dtype: of the weights; None: float32.

    Raises:
        ConfigError: settings that do not fit, or a name that the model has already.
        UnsupportedModelError: a kind that nobody registered.
    """
    model, width = loaded.model, loaded.config.text.hidden_size
    configs = list(loaded.config.modalities)
    for name, given in modalities.items():
        if name in model.modalities:
            raise ConfigError(f"the model has a modality {name!r} already: give another name")
        settings, encoder = _with_encoder(name, given, loaded)
        configs.append((name, modality_config(name, settings)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build_modality(name, configs[-1][1], hidden_size=width)
        if encoder is not None:
            module.get_submodule("encoder").load_state_dict(encoder)
        config = configs[-1][1]
        model.add_modality(name, module.to(model.device, dtype).eval(), attended=config.is_attended)
    _add_blocks(model, tuple(configs), seed=seed, dtype=dtype)
    attach_tokenizer(model, loaded.tokenizer)
    return replace(loaded, config=replace(loaded.config, modalities=tuple(configs)))


def _add_blocks(
    model: VisionLanguageModel, modalities: Modalities, *, seed: int, dtype: torch.dtype | None
) -> None:
    """Give the language model fresh gated blocks where a modality needs them and it has none."""
    every = attention_every(modalities)
    if every is None or getattr(model.language_model, "cross_attention", None):
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_cross_attention(model.language_model, every)
    blocks = model.get_submodule("language_model.cross_attention")
    blocks.to(model.device, dtype).train(model.training)


def _with_encoder(
    name: str, given: object, loaded: Loaded
) -> tuple[object, dict[str, torch.Tensor] | None]:
    """Return settings without `from`, and the weights of the language model that it names.

    Raises:
        ConfigError: it has another tokenizer than the model that the modality is added to.
    """
    if not isinstance(given, Mapping) or given.get("from") is None:
        return given, None
    source = str(given["from"])
    other = load_checkpoint(source, device="cpu", dtype=STORED)
    text, sample = other.config.text, "A text, of 3 words: naïve café."
    if other.tokenizer.encode(sample) != loaded.tokenizer.encode(sample):
        raise ConfigError(
            f"modality {name!r}: {source} has another tokenizer than {loaded.path}, and one "
            "tokenizer is shared: take an encoder of the same vocabulary"
        )
    config = {"model_type": text.family, **family_of(text).write(text)}
    state = other.model.language_model.state_dict()  # type: ignore[attr-defined]  # a module that follows the protocol
    weights = {key: tensor for key, tensor in state.items() if not key.startswith("lm_head.")}
    rest = {key: value for key, value in given.items() if key != "from"}
    return {**rest, "text_config": config}, weights


def attach_tokenizer(model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
    """Give the language model's tokenizer to the modalities that read text.

    Modules know no files; a tokenizer of a modality's own is not read yet.
    """
    for modality in model.modalities.values():
        if hasattr(modality, "tokenizer"):
            modality.tokenizer = tokenizer  # type: ignore[assignment]  # no module, whatever torch says


def _asked(
    quantization: str | QuantConfig | None,
    stored: StoredQuantization | None,
    where: torch.device,
    *,
    quantize_tower: bool,
) -> QuantConfig | None:
    """Return the quantization to load in.

    "int4" has the groups and zero points of AWQ files, and linear levels on a GPU, where torch has
    a product for those alone.
    """
    if quantization is None:
        return None
    asked = quant_config(quantization, quantize_tower=quantize_tower)
    if stored is None and quantization == "int4" and where.type != "cpu":
        return QuantConfig(levels="symmetric", quantize_tower=quantize_tower)
    if stored is None or stored.published is None or quantization != "int4":
        return asked
    own = stored.config
    return replace(asked, group_size=own.group_size, levels=own.levels, value_bits=own.value_bits)


def _with_head_to_pack(
    plan: Plan, asked: QuantConfig | None, stored: StoredQuantization | None
) -> Plan:
    """Give a model with tied embeddings an output layer of its own, to be packed.

    Every token reads the whole output layer, and one row of the embedding, which stays float.
    """
    is_packed = stored is not None and stored.published is None
    if asked is None or asked.head_bits is None or is_packed:
        return plan
    if not plan.config.text.tie_embeddings:
        return plan
    bits = max(asked.head_bits, asked.bits)
    note = (
        f"the output layer is the embedding: it is packed in {bits} bits as a layer of its own, "
        "and the embedding stays float"
    )
    return plan.with_head(note, CHECKPOINT)


def _quantizer(
    plan: Plan,
    model: torch.nn.Module,
    asked: QuantConfig | None,
    stored: StoredQuantization | None,
    *,
    merge_lora: bool,
    free: bool,
    reads_kept: bool,
) -> LayerQuantizer | None:
    """Return the quantizer of layers while they are read; None where an adapter comes first.

    Raises:
        ConfigError: the files are packed otherwise, or an adapter would lie over packed layers.
    """
    if stored is not None and asked is not None:
        stored.check_request(asked, plan.path)
    if plan.adapter is not None:
        if stored is not None:
            raise ConfigError(
                "an adapter cannot be laid over quantized layers: lay it over the checkpoint "
                "before quantization, with quantize= to pack the result"
            )
        if asked is not None and not merge_lora:
            raise ConfigError("quantized layers carry no adapter: quantize= needs merge_lora=True")
        return None
    config = stored.config if asked is None and stored is not None else asked
    if config is None:
        return None
    is_free = free and not config.quantize_tower
    published = None if stored is None else stored.published
    return LayerQuantizer(
        model,
        config,
        stored=stored is not None and (asked is None or published is None),
        published=published,
        names=plan.parameters,
        tower_dtype=faster_tower_dtype(plan.config, Choices(cache_file())) if is_free else None,
        reads_kept=reads_kept,
    )


def _num_floats(model: torch.nn.Module, quantizer: LayerQuantizer | None) -> int:
    """Return the number of weights that are not packed."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if quantizer is None or not quantizer.takes(name)
    )


def _loaded(
    model: VisionLanguageModel, plan: Plan, report: LoadReport, template: str | Template | None
) -> Loaded:
    attach_tokenizer(model, plan.tokenizer)
    return Loaded(
        model=model.eval(),
        tokenizer=plan.tokenizer,
        config=plan.config,
        template=choose_for(plan, template),
        report=report,
        path=plan.path,
        tokenizer_path=plan.tokenizer_path,
        dtype=next(model.parameters()).dtype,
        raw=plan.raw,
        weight_files=plan.weight_files,
        beside=plan.beside,
    )


# Sizes that memory and time grow with, under the keys of other families.
_SIZES = {
    MOST_LAYERS: ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    MOST_WIDTH: ("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner"),
    MOST_WORDS: ("vocab_size",),
    MOST_POSITIONS: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
}


def load_foreign_model(
    source: str | Path,
    refusal: UnsupportedModelError,
    *,
    device: torch.device,
    dtype: str | torch.dtype,
) -> tuple[VisionLanguageModel, Plan]:
    """Load a plain language model of another family through transformers.

    The arguments are those of `load_checkpoint`; `refusal` says why it is none of lapilli's own.

    Raises:
        UnsupportedModelError: no language model, or transformers is missing or cannot read it.
        MissingFileError: no tokenizer.
        ConfigFileError: a size beyond every model that there is.

    Note: transformers reads the configuration, so no key is reported as unknown.
    """
    path = resolve(source, weights=False)
    raw = read_optional_json(path / "config.json") or {}
    is_causal = "ForCausalLM" in str(raw.get("architectures", ""))
    if not is_causal or raw.get("model_type") in supported_types():
        raise refusal
    if names := declared(raw):
        raise UnsupportedModelError(
            f"{refusal}; and it declares the modality {names[0]!r}, which only lapilli's own "
            "families take"
        )
    reader = KeyReader(raw, "config.json", IGNORED)
    for most, keys in _SIZES.items():  # before transformers builds a model of these sizes
        for key in keys:
            reader.optional_positive(key, most=most)
    path = resolve(source)
    tokenizer = load_tokenizer(path, fast=True)
    infos = open_weights(path).infos.values()
    number_format = choose_dtype(
        dtype,
        device=device,
        stored=str(raw.get("dtype") or raw.get("torch_dtype")),
        num_parameters=sum(info.num_parameters for info in infos),
    )
    try:
        language_model = load_foreign(path, dtype=number_format, device=device)
    except UnsupportedModelError as error:
        second = str(error).partition("\n")[0]
        raise UnsupportedModelError(f"{refusal}; and as another family: {second}") from error
    generation = read_optional_json(path / "generation_config.json")
    text = language_model.config
    config = ModelConfig(
        text=text,
        tokens=parse_tokens(reader, generation)[0],
        layout="text",
        torch_dtype=str(number_format).removeprefix("torch."),
        context_length=text.max_positions,
    )
    note = (
        f"model_type {raw.get('model_type')!r} is read through the library transformers: "
        "it is none of lapilli's own families"
    )
    plan = Plan(
        form="through transformers",
        path=path,
        raw=raw,
        weights_raw=raw,
        config=config,
        keys=KeyReport(used=tuple(sorted(raw))),
        parts=(),
        keymap=LANGUAGE_MODEL,
        tokenizer=tokenizer,
        tokenizer_path=path,
        vocabulary=Vocabulary(rows=text.vocab_size, accepted=frozenset()),
        notes=(note,),
    )
    return VisionLanguageModel(language_model, {}), plan

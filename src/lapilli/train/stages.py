"""Stages: the model that a recipe begins with, and which of its parameters are trained.

    model.checkpoint --load_checkpoint--> Loaded
    model.projector  --mm_projector.*---> over the projector of it
    data.template    --is it the base's? does the vocabulary have its marks?--> Template

    align            the projectors of all modalities, gated cross-attention, the learned row end
    instruct         those and the language model, or an adapter beside its layers
    both             the tower too with `model.tune_tower`: the layers that its features come from;
                     encoders of declared modalities with `model.tune_encoder`

Knows checkpoints and models; must not know samples, batches or the loop.
"""

import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, cast

import torch
from torch import nn

from lapilli.checkpoint.formats.quantized import stored_quantization
from lapilli.checkpoint.formats.weights import WeightStore
from lapilli.checkpoint.keymaps import (
    ATTENTION,
    DECLARED,
    NEWLINE,
    PROJECTOR,
    TOWER,
    is_declared,
    is_joint,
)
from lapilli.checkpoint.load import Loaded, load_checkpoint, with_modalities
from lapilli.checkpoint.read.plan import PROJECTOR_FILES, make_plan
from lapilli.checkpoint.source import RESULTS
from lapilli.checkpoint.template import find_chat_template
from lapilli.config.modalities import modality_config, settings_of
from lapilli.config.reader import given_path
from lapilli.errors import (
    ConfigError,
    MissingFileError,
    MissingWeightsError,
    ShapeMismatchError,
    UnsupportedModelError,
)
from lapilli.lm.decoder import Decoder
from lapilli.lm.foreign import ForeignLanguageModel
from lapilli.lm.mpt import Mpt
from lapilli.lora import LoraConfig, adapter_tensors, adapters, inject
from lapilli.modality.image.image import ImageModality, VisionTransformer
from lapilli.model import VisionLanguageModel
from lapilli.nn.linear import FrozenQuantizedLinear
from lapilli.prompt.choose import Template, around_media, check_base_template, template_by_name
from lapilli.prompt.encode import media_gap
from lapilli.prompt.template import ChatTemplate
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.quant import QuantConfig
from lapilli.quant.nf4 import store_nf4
from lapilli.train.recipe import LoraRecipe, ModelRecipe, Recipe, RunRecipe

_INT4: Final = QuantConfig(bits=4, head_bits=None, mode="weight_only")
_MARK: Final = re.compile(r"</?s>|<\|[^|<>\s]+\|>")


def load_start(recipe: Recipe) -> Loaded:
    """Load the checkpoint, its adapter beside its layers, with the recipe's projector.

    What will be trained is float32, and so is everything where frozen weights will be saved with
    it. Else frozen weights are in the precision of the run: so they need not be cast in every pass,
    and what is kept for the backward pass is the weight itself. `lora.base` packs while reading.

    Raises:
        ConfigError: the recipe names no checkpoint, one that reads text only, a packed one for
            more than a projector, or modalities that the checkpoint has otherwise.
        CheckpointError: it cannot be read, or the projector does not fit.
    """
    if recipe.model.checkpoint is None:
        raise ConfigError(
            "recipe key model.checkpoint is missing: name what `lapilli build` made, or any LLaVA"
        )
    _check_floats(recipe, recipe.model.checkpoint)
    loaded = load_checkpoint(
        recipe.model.checkpoint,
        adapter=recipe.model.adapter,
        merge_lora=False,
        device="cpu",
        dtype="float32" if recipe.saves_frozen else recipe.run.precision,
        float32_parameters=partial(_is_float32, recipe.model),
        quantization=_INT4 if recipe.lora is not None and recipe.lora.base == "int4" else None,
    )
    loaded = with_modalities(loaded, _fresh_modalities(recipe, loaded), seed=recipe.run.seed)
    if not loaded.model.modalities:
        raise ConfigError(
            f"{loaded.path} reads text only: give it a tower and a projector with `lapilli build`, "
            "or a modality with [model.modalities.NAME]"
        )
    if recipe.model.projector is not None:
        load_projector(loaded.model, given_path(recipe.model.projector))
    return loaded


def _check_floats(recipe: Recipe, checkpoint: str) -> None:
    """Check that what the stage trains, or lays an adapter on, is not packed.

    An adapter learns beside packed layers, but belongs to the floats that were packed: rounded
    twice, files would lose more than the adapter gives, so none is laid over them afterwards.

    Raises:
        ConfigError: the language model of the checkpoint is packed.
    """
    with suppress(UnsupportedModelError):  # of a foreign family, or a format that loading refuses
        stored = stored_quantization(make_plan(checkpoint).weights_raw)
        if stored is None or recipe.stage != "instruct":
            return
        if recipe.lora is None:
            raise ConfigError(
                f"{checkpoint} is quantized ({stored}), and packed weights do not learn: train the "
                "checkpoint that it was made from"
            )
        raise ConfigError(
            f"{checkpoint} is quantized ({stored}), and an adapter that was trained on it could "
            "not be loaded afterwards: train on the float checkpoint that it was made from; "
            'lora.base = "int4" or "nf4" packs it while it trains'
        )


def _is_float32(model: ModelRecipe, name: str) -> bool:
    """Return whether a parameter may learn although the language model rests."""
    if is_declared(name):
        owner, _, part = name.removeprefix("modalities.").partition(".")
        return not part.startswith("encoder.") or owner in model.tune_encoder
    return is_joint(name) or (model.tune_tower and name.startswith(TOWER))


def _fresh_modalities(recipe: Recipe, loaded: Loaded) -> dict[str, object]:
    """Return the recipe's modalities that the checkpoint does not have.

    Raises:
        ConfigError: it has one of them with other settings.
    """
    has = dict(loaded.config.modalities)
    wanted = recipe.model.modalities
    for name in wanted.keys() & has.keys():
        settings = wanted[name]
        if isinstance(settings, dict):  # what it leaves out is as the checkpoint has it
            given = {key: value for key, value in settings.items() if key != "from"}
            settings = {**settings_of(has[name]), **given}
        if modality_config(name, settings) != has[name]:
            raise ConfigError(
                f"recipe key model.modalities.{name} says {wanted[name]}, and the checkpoint "
                f"has {has[name]}: leave the key out, or give another name"
            )
    return {name: settings for name, settings in wanted.items() if name not in has}


def load_projector(model: VisionLanguageModel, folder: Path) -> None:
    """Load the projector that an earlier run left over the model's own, in place.

    `folder` is of the run, or of its results.

    Raises:
        MissingFileError: there is no projector.
        MissingWeightsError: it lacks a tensor, or has one that the model's does not.
        ShapeMismatchError: it was made for another tower or another language model.
    """
    places = [at / name for at in (folder, folder / RESULTS) for name in PROJECTOR_FILES]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise MissingFileError(
            f"recipe key model.projector: no {' or '.join(PROJECTOR_FILES)} in {folder} or "
            f"{folder / RESULTS}: give the folder of an align run"
        )
    own = {name: parameter for name, parameter in model.named_parameters() if is_joint(name)}
    store = WeightStore.of_files([file])
    pairs = ((_own_name(name), name) for name in store.infos)
    found = {ours: name for ours, name in pairs if ours is not None}
    needed = {name for name in own if name != NEWLINE}
    strange = sorted(found.keys() - own.keys()) + sorted(needed - found.keys())
    if strange:
        raise MissingWeightsError(
            f"{file} and the projector of the model differ in {strange[0]}: was it trained with "
            "another projector type?"
        )
    for name, foreign in found.items():
        tensor = store.tensor(foreign, torch.float32)
        target = own[name]
        if tensor.shape != target.shape:
            raise ShapeMismatchError(
                f"{file}: {foreign} is {list(tensor.shape)}, the model's is {list(target.shape)}: "
                "was it trained with another tower or language model?"
            )
        with torch.no_grad():
            target.copy_(tensor)


def _own_name(foreign: str) -> str | None:
    """Return the parameter of a tensor beside a base; None where it is no projector's."""
    if foreign.endswith("image_newline"):
        return NEWLINE
    for mark, prefix in (("mm_projector.", PROJECTOR), ATTENTION, DECLARED):
        _, found, rest = foreign.rpartition(mark)
        if found:
            return prefix + rest
    return None


def choose_template(recipe: Recipe, loaded: Loaded) -> Template:
    """Return the recipe's template, `plain` for the first stage, else the checkpoint's own.

    Raises:
        PromptError: no template has the name.
        ConfigError: the vocabulary lacks a mark that the template ends turns with, or the chat
            template beside the checkpoint takes turns otherwise.
    """
    name = recipe.data.template or ("plain" if recipe.stage == "align" else "")
    own = loaded.template.template
    template = template_by_name(name) if name else own
    if name and name != own.name:
        check_base_template(
            name,
            find_chat_template(loaded.tokenizer_path),
            str(loaded.path),
            otherwise=f"leave data.template out: the checkpoint asks for {own.name!r}",
        )
    check_marks(template, loaded.tokenizer, own.name)
    return for_model(template, loaded)


def for_model(template: Template, loaded: Loaded) -> Template:
    """Return the template with the tokens that this checkpoint has around a picture."""
    tokens = loaded.config.tokens
    gap = media_gap(loaded.tokenizer, tokens.image_id)
    return around_media(template, use_start_end=tokens.use_start_end, gap=gap)


def check_marks(template: Template, tokenizer: Tokenizer, own: str) -> None:
    """Check that the marks which a template ends turns with are tokens of the vocabulary.

    `own` names the template that the checkpoint itself asks for.

    Raises:
        ConfigError: a mark is no token: it would be learned as several pieces of text, and an
            answer would never end.
    """
    if not isinstance(template, ChatTemplate):
        return
    for mark in _MARK.findall(f"{template.sep} {template.sep2 or ''}"):
        if tokenizer.token_to_id(mark) is None:
            raise ConfigError(
                f"template {template.name!r} ends turns with {mark!r}, which is no token of this "
                f"checkpoint's vocabulary: set data.template to {own!r}, which it asks for itself"
            )


def choose_trainable(model: VisionLanguageModel, recipe: Recipe) -> tuple[str, ...]:
    """Mark what the recipe trains in the model, which is changed in place; the rest is frozen.

    Args:
        model: without adapters, or with the one that `model.adapter` names.
        recipe: stage, model and lora.

    Returns:
        Full names of the parameters that are trained.

    Raises:
        ConfigError: a stage of another name, or one that would train nothing in the model.

    Source: LLaVA section 4.2 and train.py: tune_mm_mlp_adapter, find_all_linear_names; LLaVA-NeXT
        for the tower and the row end.
    """
    if recipe.stage not in ("align", "instruct"):
        raise ConfigError(
            f"stage {recipe.stage!r} is unknown: a recipe has the stages align and instruct"
        )
    model.requires_grad_(False)
    trained: list[nn.Parameter] = []
    _check_encoders(model, recipe.model)
    for name, modality in model.modalities.items():
        if isinstance(modality, ImageModality):
            trained += modality.projector.parameters()
            trained += [] if modality.image_newline is None else [modality.image_newline]
            trained += _used(modality.vision_tower) if recipe.model.tune_tower else []
        else:
            trained += _of_declared(modality, encoder=name in recipe.model.tune_encoder)
    trained += [p for name, p in model.named_parameters() if name.startswith(ATTENTION[1])]
    if recipe.stage == "instruct":
        trained += _of_language_model(model, recipe.lora)
    for parameter in trained:
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.startswith(recipe.model.freeze):
            parameter.requires_grad_(False)
    names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if not names:
        raise ConfigError(f"stage {recipe.stage!r} trains nothing in this model")
    return names


def _of_declared(modality: nn.Module, *, encoder: bool) -> list[nn.Parameter]:
    """Return the parameters of a modality, with those of its encoder or without."""
    found = getattr(modality, "encoder", None)
    resting = set() if found is None or encoder else {id(p) for p in found.parameters()}
    return [parameter for parameter in modality.parameters() if id(parameter) not in resting]


def _check_encoders(model: VisionLanguageModel, recipe: ModelRecipe) -> None:
    """Check that the modalities whose encoder is to learn have one.

    Raises:
        ConfigError: one has none, or is no modality of the model.
    """
    having = [name for name, one in model.modalities.items() if hasattr(one, "encoder")]
    for name in recipe.tune_encoder:
        if name not in having:
            other = "; the tower of pictures is model.tune_tower" if name == "image" else ""
            raise ConfigError(
                f"recipe key model.tune_encoder names {name!r}: the modalities with an encoder are "
                f"{', '.join(having) or 'none'}{other}"
            )


def _used(tower: VisionTransformer) -> list[nn.Parameter]:
    """Return the tower's parameters that its features depend on; others would get no gradient."""
    stack = tower.vision_model
    idle = [stack.post_layernorm, *stack.encoder.layers[tower.num_used_layers :]]
    unused = {id(parameter) for module in idle for parameter in module.parameters()}
    return [parameter for parameter in tower.parameters() if id(parameter) not in unused]


def _of_language_model(model: VisionLanguageModel, lora: LoraRecipe | None) -> list[nn.Parameter]:
    """Return all of its parameters, or those of an adapter, fresh where it has none."""
    if lora is None:
        return list(model.language_model.parameters())  # type: ignore[attr-defined]  # a module that follows the protocol
    if not any(True for _ in adapters(model)):
        if lora.base == "nf4":
            store_nf4(model, default_targets(model), double_quant=lora.double_quant)
        targets = lora.targets or default_targets(model)
        config = LoraConfig(rank=lora.rank, alpha=lora.alpha, targets=targets, dropout=lora.dropout)
        inject(model, config, dtype=torch.float32)
    elif lora.base != "float":
        raise ConfigError(
            f"lora.base is {lora.base!r} and the model has an adapter already: go on with an "
            'adapter over floats (lora.base = "float"), or merge it first'
        )
    else:
        _go_on(model, lora)
    return [cast(nn.Parameter, tensor) for tensor in adapter_tensors(model).values()]


def _go_on(model: VisionLanguageModel, lora: LoraRecipe) -> None:
    """Check that the recipe means the adapter that the model has, and set its dropout.

    Raises:
        ConfigError: the recipe names another rank, alpha or other layers than the adapter has.
    """
    usual = LoraRecipe()
    config = LoraConfig(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    for path, layer in adapters(model):
        rank = layer.lora_A.weight.shape[0]
        has = {"rank": rank, "alpha": round(layer.scaling * rank, 6)}
        for key, value in has.items():
            asked = getattr(lora, key)
            if asked not in (value, getattr(usual, key)):
                raise ConfigError(
                    f"lora.{key} is {asked}, and the adapter that the run goes on with has {value}:"
                    f" leave lora.{key} out, or merge the adapter and begin another one"
                )
        if lora.targets and not config.is_target(path):
            raise ConfigError(
                f"lora.targets leaves out {path}, where the adapter that the run goes on with lies:"
                " leave lora.targets out, or merge the adapter and begin another one"
            )
        if lora.dropout != usual.dropout:
            layer.dropout.p = lora.dropout


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Return every linear layer of the language model but the head and the gated blocks, by path.

    Source: LLaVA train.py find_all_linear_names.
    """
    return tuple(
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | FrozenQuantizedLinear)
        and path.startswith("language_model.")
        and not path.startswith(ATTENTION[1])
        and not path.endswith(".lm_head")
    )


def set_up_layers(model: VisionLanguageModel, run: RunRecipe) -> None:
    """Switch on recomputation and compilation of the layers, as the run asks for them."""
    for part in model.modules():
        if isinstance(part, Decoder | Mpt | VisionTransformer):
            part.gradient_checkpointing = run.gradient_checkpointing
        elif run.gradient_checkpointing and isinstance(part, ForeignLanguageModel):
            part.recompute_layers()
    if not run.compile:
        return
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.compile(dynamic=True)

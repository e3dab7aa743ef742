"""Stages: which parameters a recipe trains.

align      the projector and the learned row end
instruct   those and the language model, or an adapter beside its layers
both       the tower too with `model.tune_tower`: the layers that its features come from
"""

from typing import cast

import torch
from torch import nn

from lapilli.errors import ConfigError
from lapilli.lm.decoder import Decoder
from lapilli.lm.foreign import ForeignLanguageModel
from lapilli.lm.mpt import Mpt
from lapilli.lora import LoraConfig, adapter_tensors, adapters, inject
from lapilli.modality.image.image import ImageModality, VisionTransformer
from lapilli.model import VisionLanguageModel
from lapilli.nn.linear import FrozenQuantizedLinear
from lapilli.quant.nf4 import store_nf4
from lapilli.train.recipe import LoraRecipe, Recipe, RunRecipe


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
    for modality in model.modalities.values():
        trained += modality.projector.parameters()  # type: ignore[union-attr]  # all modalities have one
        newline = getattr(modality, "image_newline", None)
        trained += [] if newline is None else [newline]
        if recipe.model.tune_tower and isinstance(modality, ImageModality):
            trained += _used(modality.vision_tower)
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
    """Return every linear layer of the language model but the head, by path.

    Source: LLaVA train.py find_all_linear_names.
    """
    return tuple(
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | FrozenQuantizedLinear)
        and path.startswith("language_model.")
        and not path.endswith(".lm_head")
    )


def set_up_layers(model: VisionLanguageModel, run: RunRecipe) -> None:
    """Switch on recomputation and compilation of the layers, as the run asks for them."""
    towers = [getattr(modality, "vision_tower", None) for modality in model.modalities.values()]
    for part in (model.language_model, *towers):
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

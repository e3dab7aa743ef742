"""Fold adapters into the weights beside them."""

from torch import nn

from lapilli.lora.inject import LoraReport, adapters, report


def merge(model: nn.Module) -> LoraReport:
    """Every adapter of `model` added to its weight and gone; the model is changed in place.

    Sums are taken in float32 and rounded once to the dtype of the weight.

    Source: LLaVA model/builder.py merges at load time (peft merge_and_unload).
    """
    done = report(model)
    for path, layer in list(adapters(model)):
        model.set_submodule(path, layer.merged().train(layer.training))
    return done

"""Projector and language model over features that the tower made earlier; knows no pictures."""

import torch
from torch import nn

from lapilli.errors import ConfigError
from lapilli.lm import LanguageModel
from lapilli.model import fuse
from lapilli.shapes import Float, Tensor
from lapilli.train.trainer.loop import Loss
from lapilli.train.trainer.model import cross_entropy_sum, scores, supervised
from lapilli.train.trainer.task import TrainingBatch
from pebble.recipe import Stage


class FeatureReader(nn.Module):
    """Projector and language model over features that a frozen tower made earlier."""

    def __init__(self, language_model: LanguageModel, projector: nn.Module) -> None:
        super().__init__()
        self.language_model: LanguageModel = language_model
        self.projector = projector

    def hidden(self, batch: TrainingBatch) -> Float[Tensor, "B T D"]:
        """Hidden states of every position after the final norm."""
        embeds = self.language_model.embed(batch.input_ids)
        if torch.is_autocast_enabled("cpu"):  # a residual stream of half the width: a fifth faster
            embeds = embeds.to(torch.get_autocast_dtype("cpu"))
        if batch.media:
            sizes = [span.length for span in batch.spans]
            projected = self.projector(_stacked(batch.media))
            embeds = fuse(embeds, projected.split(sizes), batch.spans)
        return self.language_model.forward(embeds, position_ids=batch.position_ids)

    def loss(self, batch: TrainingBatch) -> Loss:
        """Return the summed cross entropy of the supervised tokens, the only ones with logits."""
        where, targets = supervised(batch.input_ids, batch.loss_mask)
        logits = scores(self.language_model.logits, self.hidden(batch)[where])
        return Loss(cross_entropy_sum(logits, targets))


def _stacked(media: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([item.float() for item in media])


def freeze(model: nn.Module, stage: Stage) -> None:
    """Mark what a stage trains: the projector alone in `align`, else everything it is given.

    Raises:
        ConfigError: the stage would train nothing in this model.

    Source: LLaVA section 4.2; `tune_mm_mlp_adapter` in the original's first stage.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage != "align" or "projector" in name.split("."))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"stage {stage!r} trains nothing in a {type(model).__name__}")

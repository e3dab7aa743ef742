"""The trainer of the original (llava.train.llava_trainer): transformers', and what it adds to it.

The training program does not use it: see training.py. Programs that make a trainer of their own do.
"""

# The types of transformers differ from release to release, and no release has all of them.
# mypy: allow-untyped-calls, allow-subclassing-any, disable-error-code="override,misc"

from pathlib import Path
from typing import Any

import torch
import transformers

from lapilli.compat.foreign import Foreign
from lapilli.train.data.order import (
    LengthGroupedSampler,
    even_chunks,
    grouped_by_length,
    grouped_by_modality,
)

__all__ = [
    "LLaVATrainer",
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_modality_length_grouped_indices",
    "split_to_even_chunks",
]

split_to_even_chunks = even_chunks
get_length_grouped_indices = grouped_by_length
get_modality_length_grouped_indices = grouped_by_modality


class LLaVATrainer(transformers.Trainer):
    """A trainer with batches of one kind, a learning rate for the projector, and small checkpoints.

    It reads three more arguments where they are there: `group_by_modality_length`,
    `mm_projector_lr` and `tune_mm_mlp_adapter`.
    """

    def __init__(self, *args: Foreign, tokenizer: Foreign = None, **options: Foreign) -> None:
        # What the original's release of transformers calls a tokenizer is a processing class now.
        if tokenizer is not None:
            options["processing_class"] = tokenizer
        super().__init__(*args, **options)

    def _get_train_sampler(self, *dataset: Foreign) -> Foreign:
        data: Any = self.train_dataset
        if data is None or not getattr(self.args, "group_by_modality_length", False):
            return super()._get_train_sampler(*dataset)
        return LengthGroupedSampler(
            self.args.train_batch_size,
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            lengths=data.modality_lengths,
            group_by_modality=True,
        )

    def create_optimizer(self, *model: Foreign) -> Foreign:
        """Return the optimizer, with a learning rate of its own for the projector if one is set."""
        rate = getattr(self.args, "mm_projector_lr", None)
        if self.optimizer is not None or rate is None:
            return super().create_optimizer(*model)
        learner: Any = model[0] if model and model[0] is not None else self.model
        decayed = set(self.get_decay_parameter_names(learner))
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in learner.named_parameters():
            if parameter.requires_grad:
                key = ("mm_projector" in name, name in decayed)
                groups.setdefault(key, []).append(parameter)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind(
            [
                {
                    "params": parameters,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                    **({"lr": rate} if is_projector else {}),
                }
                for (is_projector, decays), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def _save(self, *args: Foreign, **options: Foreign) -> None:
        """Save nothing more where the projector alone is trained."""
        if not getattr(self.args, "tune_mm_mlp_adapter", False):
            super()._save(*args, **options)

    def _save_checkpoint(self, model: Foreign, *trial: Foreign, **options: Foreign) -> None:
        """Save the projector alone where it alone is trained, as the original does."""
        if not getattr(self.args, "tune_mm_mlp_adapter", False):
            super()._save_checkpoint(model, *trial, **options)
            return
        learner: Any = self.model
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        learner.config.save_pretrained(folder)
        keys = ("mm_projector", "vision_resampler")
        weights = {
            name: tensor.cpu()
            for name, tensor in learner.state_dict().items()
            if any(key in name for key in keys)
        }
        torch.save(weights, folder / "mm_projector.bin")

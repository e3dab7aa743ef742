"""Data sets, collator and trainer, for programs that make a trainer of their own.

The names are those of llava.train.train and llava.train.llava_trainer. The training program itself
is training.py, which learns through lapilli.train, whose labels come from the template. Here
labels are counted as the original counts them (quirk 13), every row without a picture carries an
empty one (quirk 3), and the template is a global of the conversation module.
"""

# The types of transformers differ from release to release, and no release has all of them.
# mypy: allow-untyped-calls, allow-subclassing-any, disable-error-code="override,misc"

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lapilli.compat import conversation
from lapilli.compat.llava_arch import average_new_rows
from lapilli.compat.mm_utils import IGNORE_INDEX, Foreign, one_tile
from lapilli.compat.tokenizer import NO_LIMIT, PreTrainedTokenizer, inner_of
from lapilli.config.reader import unique_keys
from lapilli.errors import PromptError
from lapilli.prompt.original_labels import original_sample, show_images_first
from lapilli.shapes import Tensor
from lapilli.train.data.sampler import (
    LengthGroupedSampler,
    even_chunks,
    grouped_by_length,
    grouped_by_modality,
)

__all__ = [
    "DataCollatorForSupervisedDataset",
    "LLaVATrainer",
    "LazySupervisedDataset",
    "LengthGroupedSampler",
    "find_all_linear_names",
    "get_length_grouped_indices",
    "get_modality_length_grouped_indices",
    "make_supervised_data_module",
    "preprocess",
    "preprocess_multimodal",
    "safe_save_model_for_hf_trainer",
    "smart_tokenizer_and_embedding_resize",
    "split_to_even_chunks",
]

split_to_even_chunks = even_chunks
get_length_grouped_indices = grouped_by_length
get_modality_length_grouped_indices = grouped_by_modality

Source = list[dict[str, str]]
IMAGE_WORDS = 128  # what a picture counts when samples are grouped by length


def preprocess_multimodal(sources: Sequence[Source], data_args: Foreign) -> Sequence[Source]:
    """Move `<image>` to the front of every turn, in place, as in the original."""
    if not data_args.is_multimodal:
        return sources
    version = conversation.default_conversation.version
    for source in sources:
        for turn in source:
            turn["value"] = show_images_first(
                turn["value"], version, use_start_end=data_args.mm_use_im_start_end
            )
    return sources


def preprocess(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizer, has_image: bool = False
) -> dict[str, Tensor]:
    """Return `input_ids` and `labels` of conversations, one row each.

    Raises:
        PromptError: turns that the template cannot have.
    """
    limit = tokenizer.model_max_length
    samples = [
        original_sample(
            [(turn["from"], turn["value"]) for turn in source],
            conversation.default_conversation.template,
            inner_of(tokenizer),
            has_image=has_image,
            max_length=None if limit >= NO_LIMIT else limit,
            pad_id=tokenizer.pad_token_id,
        )
        for source in sources
    ]
    for counted, actual in (sample.mismatch for sample in samples if sample.mismatch):
        sys.stdout.write(f"WARNING: tokenization mismatch: {counted} vs. {actual}. (ignored)\n")
    ids = [torch.tensor(sample.input_ids) for sample in samples]
    labels = [torch.tensor(sample.labels) for sample in samples]
    fill = tokenizer.pad_token_id or 0
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=fill),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }


class LazySupervisedDataset(Dataset[dict[str, Tensor]]):
    """Data set of a JSON file, which tokenizes a record when it is asked for.

    Args:
        data_path: list of {"image"?: name, "conversations": [{"from", "value"}, ...]}.
        tokenizer: of the language model, with a pad token.
        data_args: is_multimodal, mm_use_im_start_end, image_folder, image_processor,
            image_aspect_ratio.

    Raises:
        PromptError: the file is no list, or no JSON, or says a key twice in an object.
    """

    def __init__(
        self, data_path: str | Path, tokenizer: PreTrainedTokenizer, data_args: Foreign
    ) -> None:
        self.tokenizer = tokenizer
        self.data_args = data_args
        try:
            text = Path(data_path).read_text(encoding="utf-8")
            found = json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{data_path} is no JSON file that can be read: {error}") from error
        self.list_data_dict: list[dict[str, Any]] = found
        if not isinstance(self.list_data_dict, list):
            raise PromptError(f"{data_path} does not hold a list of records")

    def __len__(self) -> int:
        return len(self.list_data_dict)

    @property
    def lengths(self) -> list[int]:
        """Return the words of every record, a picture counting 128."""
        return [
            _words(record) + (IMAGE_WORDS if "image" in record else 0)
            for record in self.list_data_dict
        ]

    @property
    def modality_lengths(self) -> list[int]:
        """Return the words of every record, negative for those without a picture."""
        return [
            _words(record) if "image" in record else -_words(record)
            for record in self.list_data_dict
        ]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        record = self.list_data_dict[i]
        sources: Sequence[Source] = [copy.deepcopy(record["conversations"])]
        if "image" in record:
            sources = preprocess_multimodal(sources, self.data_args)
        rows = preprocess(sources, self.tokenizer, has_image="image" in record)
        item = {name: row[0] for name, row in rows.items()}
        if "image" in record:
            item["image"] = self._pixels(record["image"])
        elif self.data_args.is_multimodal:
            crop = self.data_args.image_processor.crop_size
            item["image"] = torch.zeros(3, crop["height"], crop["width"])
        return item

    def _pixels(self, name: str) -> Tensor:
        """Return a picture of the folder; a mode of several tiles is the middle of the picture."""
        processor = self.data_args.image_processor
        with Image.open(Path(self.data_args.image_folder) / name) as opened:
            image = opened.convert("RGB")
        image = one_tile(image, processor, self.data_args.image_aspect_ratio)
        pixels: Tensor = processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
        return pixels


def _words(record: Mapping[str, Any]) -> int:
    return sum(len(turn["value"].split()) for turn in record["conversations"])


class DataCollatorForSupervisedDataset:
    """Collator of rows into one batch, padded on the right and cut to the tokenizer's length.

    The attention mask leaves out the pad token, which the tokenizer has to have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, instances: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Return input_ids, labels, attention_mask, images (stacked when they have one shape)."""
        pad = self.tokenizer.pad_token_id
        limit = self.tokenizer.model_max_length
        ids = _stack([row["input_ids"] for row in instances], pad)[:, :limit]
        labels = _stack([row["labels"] for row in instances], IGNORE_INDEX)[:, :limit]
        batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(pad)}
        if "image" in instances[0]:
            images = [row["image"] for row in instances]
            same = len({image.shape for image in images}) == 1
            batch["images"] = torch.stack(images) if same else images
        return batch


def _stack(rows: Sequence[Tensor], fill: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=fill)


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizer, data_args: Foreign
) -> dict[str, Any]:
    """Return the arguments of a trainer that are data: data set and collator."""
    return {
        "train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


class LLaVATrainer(transformers.Trainer):
    """Trainer of transformers with what the original adds to it.

    It reads three more arguments where they are there: `group_by_modality_length` (batches of one
    kind), `mm_projector_lr` and `tune_mm_mlp_adapter` (checkpoints of the projector alone).
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
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        safe_save_model_for_hf_trainer(self, str(folder))


def find_all_linear_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of the layers that a LoRA is laid beside.

    Source: LLaVA train.py.
    """
    beside = ("mm_projector", "vision_tower", "vision_resampler")
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(word in name for word in beside)
    }
    return sorted(names - {"lm_head"})


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: Mapping[str, Any], tokenizer: Foreign, model: Foreign
) -> None:
    """Add special tokens, and let their embeddings begin as the mean of all others."""
    new = tokenizer.add_special_tokens(dict(special_tokens_dict))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    average_new_rows(model, new)


def safe_save_model_for_hf_trainer(trainer: Foreign, output_dir: str) -> None:
    """Save what a trainer of transformers has trained: the projector alone, or the whole model."""
    state = {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()}
    if not getattr(trainer.args, "tune_mm_mlp_adapter", False):
        trainer._save(output_dir, state_dict=state)
        return
    keys = ["mm_projector", "vision_resampler"]
    if getattr(trainer.args, "use_im_start_end", False):
        keys += ["embed_tokens", "embed_in"]
    trainer.model.config.save_pretrained(output_dir)
    kept = {name: value for name, value in state.items() if any(key in name for key in keys)}
    torch.save(kept, Path(output_dir) / "mm_projector.bin")

"""Records of the original's JSON as rows to learn from, its quirks included (llava.train.train).

Our own training reads the same records through lapilli.train.data, whose labels come from the
template. Here labels are counted as the original counts them (quirk 13), every row without a
picture carries an empty one (quirk 3), and the template is a global of the conversation module.
"""

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lapilli.compat import conversation
from lapilli.compat.constants import IGNORE_INDEX
from lapilli.compat.foreign import Foreign
from lapilli.compat.mm_utils import expand2square
from lapilli.compat.tokenizer import NO_LIMIT, PreTrainedTokenizer, inner_of
from lapilli.errors import PromptError
from lapilli.prompt.original_mask import OriginalSample, original_sample, show_images_first
from lapilli.shapes import Tensor

Source = list[dict[str, str]]
IMAGE_WORDS = 128  # what a picture counts when samples are grouped by length


def preprocess_multimodal(sources: Sequence[Source], data_args: Foreign) -> Sequence[Source]:
    """The turns with `<image>` moved to their front; changed in place, as in the original."""
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
    """`input_ids` and `labels` of conversations, one row each.

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
    for sample in samples:
        _warn(sample)
    ids = [torch.tensor(sample.input_ids) for sample in samples]
    labels = [torch.tensor(sample.labels) for sample in samples]
    fill = tokenizer.pad_token_id or 0
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=fill),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }


def _warn(sample: OriginalSample) -> None:
    if sample.mismatch is not None:
        counted, actual = sample.mismatch
        sys.stdout.write(f"WARNING: tokenization mismatch: {counted} vs. {actual}. (ignored)\n")


class LazySupervisedDataset(Dataset[dict[str, Tensor]]):
    """A JSON file of records; each is tokenized, and its picture opened, when it is asked for.

    Args:
        data_path: list of {"image"?: name, "conversations": [{"from", "value"}, ...]}.
        tokenizer: of the language model, with a pad token.
        data_args: is_multimodal, mm_use_im_start_end, image_folder, image_processor,
            image_aspect_ratio.

    Raises:
        PromptError: the file is no list, or no JSON.
    """

    def __init__(
        self, data_path: str | Path, tokenizer: PreTrainedTokenizer, data_args: Foreign
    ) -> None:
        self.tokenizer = tokenizer
        self.data_args = data_args
        try:
            found = json.loads(Path(data_path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{data_path} is no JSON file that can be read: {error}") from error
        self.list_data_dict: list[dict[str, Any]] = found
        if not isinstance(self.list_data_dict, list):
            raise PromptError(f"{data_path} does not hold a list of records")

    def __len__(self) -> int:
        return len(self.list_data_dict)

    @property
    def lengths(self) -> list[int]:
        """Words of every record, a picture counting 128."""
        return [
            _words(record) + (IMAGE_WORDS if "image" in record else 0)
            for record in self.list_data_dict
        ]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of every record, negative for those without a picture."""
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
        """A picture of the folder; every aspect but `pad` is the middle of the picture."""
        processor = self.data_args.image_processor
        with Image.open(Path(self.data_args.image_folder) / name) as opened:
            image = opened.convert("RGB")
        if self.data_args.image_aspect_ratio == "pad":
            image = expand2square(image, tuple(int(x * 255) for x in processor.image_mean))
        pixels: Tensor = processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
        return pixels


def _words(record: Mapping[str, Any]) -> int:
    return sum(len(turn["value"].split()) for turn in record["conversations"])


class DataCollatorForSupervisedDataset:
    """Rows of a dataset as one batch, padded on the right and cut to the tokenizer's length.

    Args:
        tokenizer: with a pad token, which is also what the attention mask leaves out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, instances: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """input_ids, labels, attention_mask, images (stacked when they have one shape)."""
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

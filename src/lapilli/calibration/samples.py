"""Calibration samples: texts and conversations with pictures, embedded for the first layer.

    file.txt                 blocks of text, one after the other
    file.jsonl, .json, ...   a record with "text" is a text; others are conversations as `lapilli
                             train` reads them, with pictures or without
    builtin                  builtin.py

A text becomes blocks of 512 tokens, as AWQ's authors cut it; a conversation stays whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lapilli.calibration.builtin import BUILTIN, builtin_samples, builtin_text
from lapilli.checkpoint.load import Loaded
from lapilli.config.reader import given_path, shown
from lapilli.errors import ConfigError, DataError
from lapilli.model import VisionLanguageModel, fuse
from lapilli.prompt.encode import EncodedPrompt
from lapilli.quant.activations import Sample
from lapilli.train.data.dataset import OPENERS, check_foreign, open_dataset
from lapilli.train.data.encoder import EncodedSample, SampleEncoder
from lapilli.train.data.formats import MEDIA_KEYS
from lapilli.train.recipe import SourceRecipe

BLOCK = 512
"""Tokens of a block of text. Source: llm-awq's calibration."""
_SEED = 42
_TEXT = ".txt"


def read_samples(
    source: str | Path, number: int, loaded: Loaded, *, images: str | Path | None = None
) -> list[EncodedSample]:
    """Return calibration samples for a model; a choice of `number` where there are more.

    Args:
        source: a file, or "builtin".
        number: of samples.
        loaded: whose tokenizer, template and modalities prepare them.
        images: the folder that image paths are relative to; None: the file's own.

    Raises:
        ConfigError: no samples, or one that is longer than the context of the model.
        DataError: a file or a record that cannot be read.
    """
    if number < 1:
        raise ConfigError(f"the number of calibration samples must be 1 or more, found {number}")
    longest = loaded.config.max_length or loaded.config.context_length
    length = min(BLOCK, longest)
    source = str(source)
    if source == BUILTIN:
        samples = _builtin(number, loaded, _encoder(loaded, longest), length)
    elif _kind_of(given_path(source)) == _TEXT:
        samples = _blocks(_read_text(given_path(source)), loaded, length, source)
    else:
        recipe = SourceRecipe(path=source, images=None if images is None else str(images))
        samples = _records(recipe, number, loaded, _encoder(loaded), length)
    for sample in samples:
        if len(sample.prompt) > longest:
            raise ConfigError(
                f"{sample.id}: the calibration sample has {len(sample.prompt)} positions, and the "
                f"context of the model {longest}: leave it out, or cut it"
            )
    return _some(samples, number)


def _kind_of(path: Path) -> str:
    """Return how the name of a file of samples ends; "" for a pattern of several files.

    Raises:
        DataError: a folder, or a file that holds no samples.
    """
    kind = path.suffix.lower()
    known = (_TEXT, *OPENERS)
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file in it that ends in {', '.join(known)}")
    if path.is_file() and kind not in known:
        check_foreign(path)
        raise DataError(
            f"{path} is no file of calibration samples that is known: give {', '.join(known)}"
        )
    return kind


def _encoder(loaded: Loaded, max_length: int | None = None) -> SampleEncoder:
    return SampleEncoder(
        loaded.tokenizer,
        loaded.template.template,
        loaded.model,
        max_length,
        image_id=loaded.config.tokens.image_id,
    )


def _some(samples: list[Any], number: int) -> list[Any]:
    """Return a random choice in the order of the file, always the same one."""
    if len(samples) <= number:
        return samples
    chosen = np.random.default_rng(_SEED).choice(len(samples), size=number, replace=False)
    return [samples[at] for at in sorted(chosen.tolist())]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: save it in UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _blocks(text: str, loaded: Loaded, length: int, where: str) -> list[EncodedSample]:
    """Return a text as blocks of tokens of which all but the first count.

    Raises:
        ConfigError: it is shorter than one block.
    """
    prefix = list(loaded.tokenizer.prefix_ids)
    ids = loaded.tokenizer.encode(text, add_bos=False)
    size = length - len(prefix)
    if len(ids) < size:
        raise ConfigError(
            f"{where} has {len(ids)} tokens, and calibration takes blocks of {size}: give more text"
        )
    found = []
    for start in range(0, len(ids) - size + 1, size):
        block = [*prefix, *ids[start : start + size]]
        prompt = EncodedPrompt(block, [True] * len(block))
        found.append(EncodedSample(prompt, id=f"{where}, tokens {start} to {start + size}"))
    return found


def _builtin(
    number: int, loaded: Loaded, encoder: SampleEncoder, length: int
) -> list[EncodedSample]:
    """Return built-in samples: half of them pictures, where the model sees any.

    What the encoder cuts off their end is a second question.
    """
    pictures = number // 2 if "image" in loaded.model.modalities else 0
    texts = _some(_blocks(builtin_text(), loaded, length, "the built-in text"), number - pictures)
    return [*texts, *(encoder.encode(sample) for sample in builtin_samples(pictures))]


def _records(
    source: SourceRecipe, number: int, loaded: Loaded, encoder: SampleEncoder, length: int
) -> list[EncodedSample]:
    """Return the texts of a file of records as blocks, or its conversations."""
    dataset = open_dataset([source]).declaring(encoder.modalities)
    (records,) = dataset.sources
    if _is_text(records.record(0)):
        places = range(len(records))
        texts = [_text(records.record(at), records.where(at)) for at in places]
        return _blocks("\n\n".join(texts), loaded, length, source.path)
    chosen = _some(list(range(len(dataset))), number)
    return [encoder.encode(dataset.sample(at)) for at in chosen]


def _is_text(record: object) -> bool:
    return (
        isinstance(record, Mapping)
        and "text" in record
        and "conversations" not in record
        and "messages" not in record
    )


def _text(record: object, where: str) -> str:
    text = record.get("text") if isinstance(record, Mapping) and _is_text(record) else None
    if isinstance(record, Mapping) and any(record.get(key) for key in MEDIA_KEYS):
        raise DataError(
            f'{where}: a record with "text" shows no pictures: write it as a conversation'
        )
    if not isinstance(text, str):
        raise DataError(
            f'{where}: expected a record with "text", as the first one has, found '
            f"{shown(record)}: keep texts and conversations in files of their own"
        )
    return text


@torch.no_grad()
def embed_samples(
    model: VisionLanguageModel, samples: Sequence[EncodedSample], device: torch.device
) -> list[Sample]:
    """Return samples before the first layer, features in their places.

    All is computed in float32, whatever the number format of the files, as a packed model does.
    """
    found = []
    with in_float32(model.modalities):
        for sample in samples:
            prompt = sample.prompt
            ids = torch.tensor(prompt.input_ids).clamp(min=0)  # features have none
            is_picture = torch.zeros(len(prompt), dtype=torch.bool)
            for span in prompt.spans:
                is_picture[span.start : span.start + span.length] = True
            features = [
                model.modality(span.modality).embed([item])[0]
                for span, item in zip(prompt.spans, sample.media, strict=True)
            ]
            hidden = fuse(model.language_model.embed(ids[None]).float(), features, prompt.spans)
            counts = torch.tensor(prompt.loss_mask)
            parts = (hidden, is_picture, counts, ids)
            found.append(Sample(*(part.to(device) for part in parts)))
    return found


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Keep a module in float32 for a while, and have it back as it was, views of files included."""
    before = {name: one.data for name, one in module.named_parameters()}
    buffers = {name: one.data for name, one in module.named_buffers()}
    module.float()
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = before[name]
        for name, buffer in module.named_buffers():
            buffer.data = buffers[name]

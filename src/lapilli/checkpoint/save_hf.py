"""A model as Hugging Face's LLaVA: LlavaForConditionalGeneration, or LlavaNext for anyres.

    config.json  generation_config.json  model.safetensors or shards with index
    tokenizer.json  tokenizer_config.json  preprocessor_config.json  processor_config.json
    chat_template.jinja

One vocabulary entry stands for every position of a picture; it is added where there is none.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lapilli.checkpoint.assemble import VOCABULARY
from lapilli.checkpoint.keymaps import HF_LLAVA
from lapilli.checkpoint.save import (
    generation_ids,
    merged_state,
    renamed,
    renamed_formats,
    settle_generation,
    write_chat_template,
    write_extra,
)
from lapilli.checkpoint.save_files import (
    SHARD_BYTES,
    Deferred,
    Formats,
    Stored,
    common_dtypes,
    dtype_name,
    new_directory,
    value,
    write_json,
    write_weights,
)
from lapilli.checkpoint.save_tokenizer import save_tokenizer_with
from lapilli.checkpoint.template import WrittenTemplate, written_template
from lapilli.checkpoint.tokenizer_files import load_tokenizer
from lapilli.checkpoint.vocabulary import resized
from lapilli.config.model import ModelConfig
from lapilli.config.write_hf import (
    IMAGE_TOKEN,
    processor_class,
    refuse_unsayable,
    write_hf_config,
    write_hf_preprocessor,
    write_hf_processor,
)
from lapilli.errors import ConfigError
from lapilli.model.vlm import VisionLanguageModel
from lapilli.prompt.choose import Template
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.quant.linear import QuantLinear


def save_hf(
    path: Path,
    model: VisionLanguageModel,
    config: ModelConfig,
    *,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    dtype: Formats = None,
    template: str | Template | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    state: Mapping[str, Stored] | None = None,
    extra: Mapping[str, str | bytes] | None = None,
) -> None:
    """A whole checkpoint that transformers and this loader read; adapters are folded in.

    Args:
        path: the new directory.
        model: what is saved.
        config: what it is, in whatever layout it came.
        tokenizer: of the model.
        tokenizer_path: the directory that it came from.
        dtype: of the stored weights, or of each by the name of its parameter (such as
            `Loaded.stored`, what the files hold that it came from); None: as they are.
        template: the conversation template that the model was trained with, or its name; None: what
            it came with (see `written_template`).
        overwrite: replace a directory that is there.
        shard_bytes: largest size of one weight file.
        state: other tensors under the names of `model.state_dict()`, without adapters.
        extra: more files by name, such as README.md.

    Raises:
        CheckpointError: the directory is there already, or the disk is full.
        ConfigError: the model is quantized.
        UnsupportedModelError: something that the layout of Hugging Face cannot say.

    Note: rows that the image token needs in both vocabulary tables are the mean of the others.
    """
    refuse_unsayable(config)
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ConfigError("the model is quantized: save it from one that is not")
    spoken = written_template(template, config, tokenizer_path)
    whole = merged_state(model) if state is None else state
    with new_directory(path, overwrite=overwrite) as folder:
        image_id = _write_words(folder, config, tokenizer, tokenizer_path, spoken)
        rows = max(config.text.vocab_size, image_id + 1)
        tensors = {name: _with_rows(name, tensor, rows) for name, tensor in whole.items()}
        formats = renamed_formats(dtype, HF_LLAVA)
        write_weights(folder, renamed(tensors, HF_LLAVA), dtype=formats, shard_bytes=shard_bytes)
        written = replace(config, text=replace(config.text, vocab_size=rows))
        write_json(
            folder / "config.json",
            write_hf_config(
                written,
                image_id=image_id,
                torch_dtype=dtype_name(common_dtypes(whole, dtype)[0]),
                template=spoken.name,
            ),
        )
        _write_generation(folder, config)
        write_json(folder / "preprocessor_config.json", write_hf_preprocessor(config))
        write_extra(folder, extra or {})


def refuse_unwritable(
    config: ModelConfig,
    *,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    template: str | Template | None,
) -> None:
    """Refuse before a run what `save_hf` would refuse after it.

    Args:
        config: of the model.
        tokenizer: as for `save_hf`.
        tokenizer_path: as for `save_hf`.
        template: as for `save_hf`.

    Raises:
        CheckpointError: the tokenizer cannot be written as a tokenizer.json.
        ConfigError: the template cannot be written.
        PromptError: the template is one for captions.
        UnsupportedModelError: something that the layout of Hugging Face cannot say.
    """
    refuse_unsayable(config)
    spoken = written_template(template, config, tokenizer_path)
    with tempfile.TemporaryDirectory(prefix="lapilli-words-") as folder:
        _write_words(Path(folder), config, tokenizer, tokenizer_path, spoken)


def _write_words(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    spoken: WrittenTemplate,
) -> int:
    """The files of tokenizer, processor and template; the id of the image token."""
    own = config.tokens.image_id
    token = IMAGE_TOKEN if own is None else tokenizer.id_to_token(own)
    image_id = save_tokenizer_with(
        folder, tokenizer_path, tokenizer, token, processor=processor_class(config)
    )
    write_json(folder / "processor_config.json", write_hf_processor(config, token))
    source = spoken.for_whole_prompts(
        load_tokenizer(folder, fast=True), image_id, was_whole=own is not None
    )
    write_chat_template(folder, source)
    return image_id


def _with_rows(name: str, tensor: Stored, rows: int) -> Stored:
    if name not in VOCABULARY or tensor.shape[0] == rows:
        return tensor
    shape = torch.Size((rows, *tensor.shape[1:]))
    return Deferred(shape, tensor.dtype, partial(_grown, tensor, rows))


def _grown(tensor: Stored, rows: int) -> torch.Tensor:
    return resized(value(tensor), rows)


def _write_generation(folder: Path, config: ModelConfig) -> None:
    """generation_config.json, unless the tokenizer's directory had one."""
    path = folder / "generation_config.json"
    if path.is_file():
        settle_generation(folder, config.tokens)
    else:
        write_json(path, {"_from_model_config": True, **generation_ids(config.tokens)})

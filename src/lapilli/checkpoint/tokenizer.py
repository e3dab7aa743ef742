"""Tokenizer of a checkpoint, read and written, and the small files that are written beside it.

Hugging Face's layout has one more token, for pictures: `save_tokenizer_with`.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers.processors import TemplateProcessing

from lapilli.checkpoint.source import (
    has_file,
    in_folder,
    read_optional_bytes,
    read_optional_json,
    read_optional_text,
)
from lapilli.checkpoint.write.files import write_json
from lapilli.config.families import family_of
from lapilli.config.model import ModelConfig, TokenConfig
from lapilli.config.reader import KeyReader
from lapilli.errors import CheckpointError, ConfigFileError, MissingFileError
from lapilli.prompt.tokenizer import Tokenizer, TokenizerFiles, build_tokenizer
from lapilli.prompt.tokenizer.fast import llama_tokenizer
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer

MOST_BYTES = 64 << 20
"""Largest file of a tokenizer that is read; the largest published ones have half as much."""
IMAGE_PATCH = "<im_patch>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"


def load_tokenizer(
    directory: Path, *, fast: bool, settings: Mapping[str, object] | None = None
) -> Tokenizer:
    """Load the tokenizer of a directory.

    `fast` says the original's class for this language model: SentencePiece itself for llama
    (False), the tokenizers library for all others. `settings` are laid over what
    tokenizer_config.json and special_tokens_map.json say.

    Raises:
        MissingFileError: it has no tokenizer.
        CheckpointError: a file of it is damaged.
    """
    with in_folder(directory):
        return build_tokenizer(_files(directory, settings or {}), fast=fast)


def _files(directory: Path, asked: Mapping[str, object]) -> TokenizerFiles:
    config = read_optional_json(directory / "tokenizer_config.json") or {}
    special = read_optional_json(directory / "special_tokens_map.json") or {}
    added = read_optional_json(directory / "added_tokens.json") or {}
    files = TokenizerFiles(
        model=read_optional_bytes(directory / "tokenizer.model", most=MOST_BYTES),
        json=read_optional_text(directory / "tokenizer.json", most=MOST_BYTES),
        config={**config, **asked},
        special_map={**special, **{key: asked[key] for key in special if key in asked}},
        added=KeyReader(added, "added_tokens.json").all_ids(),
    )
    if files.model is None and files.json is None:
        raise MissingFileError(
            f"no tokenizer in {directory}: looked for tokenizer.model and tokenizer.json; "
            "copy them from the language model that the checkpoint was made from"
        )
    return files


def tokenizer_of(path: Path, config: ModelConfig) -> tuple[Tokenizer, int]:
    """Load a tokenizer as this kind of model reads it; return how many tokens were added too.

    Raises:
        ConfigFileError: config.json names an image token beyond the vocabulary.
    """
    image_id, is_original = config.tokens.image_id, config.layout == "llava"
    # A model that came with an image token was tokenized by its tokenizer.json.
    slow = is_original and image_id is None and family_of(config.text).slow_tokenizer
    tokenizer = load_tokenizer(path, fast=not slow)
    # A table often has more rows than the tokenizer has tokens, and the image may stand for one.
    size = max(tokenizer.vocab_size, config.text.vocab_size)
    if image_id is not None and not 0 <= image_id < size:
        raise ConfigFileError(
            f"{path}: config.json: image_token_index is {image_id}, but there are {size} tokens: "
            "they do not belong together"
        )
    if is_original:
        tokens = config.tokens
        use_patch, use_start_end = tokens.use_patch_token, tokens.use_start_end
        return tokenizer, add_image_tokens(
            tokenizer, use_patch=use_patch, use_start_end=use_start_end
        )
    if image_id is not None and image_id in tokenizer.added_vocab.values():
        # Special, whatever its file says: in the text of a user it stands for no picture.
        tokenizer.add_tokens([tokenizer.id_to_token(image_id)], special=True)
    return tokenizer, 0


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds a tokenizer."""
    return any(has_file(directory / name) for name in ("tokenizer.model", "tokenizer.json"))


def add_image_tokens(tokenizer: Tokenizer, *, use_patch: bool, use_start_end: bool) -> int:
    """Add the tokens that the original adds at loading; return how many were new.

    Source: LLaVA builder.py: `<im_patch>` first, then `<im_start>` and `<im_end>`, all special.
    """
    count = tokenizer.add_tokens([IMAGE_PATCH], special=True) if use_patch else 0
    if use_start_end:
        count += tokenizer.add_tokens([IMAGE_START, IMAGE_END], special=True)
    return count


TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def write_beside(
    folder: Path,
    tokenizer_path: Path | None,
    extra: Mapping[str, str | bytes] | None,
    *,
    jinja: str | None,
    tokens: TokenConfig,
) -> None:
    """Write the tokenizer's files, the chat template, and further files such as a model card."""
    copy_tokenizer(tokenizer_path, folder)
    settle_generation(folder, tokens)
    write_extra(folder, extra)
    write_chat_template(folder, jinja)


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Copy the files of a tokenizer."""
    if source is None:
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_chat_template(folder: Path, source: str | None) -> None:
    """Write chat_template.jinja, and remove the template in tokenizer_config.json."""
    if source is None:
        return
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8", newline="")
    settings = read_optional_json(folder / "tokenizer_config.json") or {}
    if "chat_template" in settings:
        others = {key: entry for key, entry in settings.items() if key != "chat_template"}
        write_json(folder / "tokenizer_config.json", others)


def settle_generation(folder: Path, tokens: TokenConfig) -> None:
    """Write the special ids of the model into a generation_config.json that was copied.

    It takes precedence over config.json, and may come from the base of an adapter.
    """
    found = read_optional_json(folder / "generation_config.json")
    if found is None:
        return
    ids = {key: one for key, one in special_ids(tokens).items() if one is not None}
    if any(found.get(key) != one for key, one in ids.items()):
        write_json(folder / "generation_config.json", {**found, **ids})


def special_ids(tokens: TokenConfig) -> dict[str, int | list[int] | None]:
    """Return the special ids under the keys of config.json and generation_config.json."""
    eos = list(tokens.eos_ids)
    return {
        "bos_token_id": tokens.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokens.pad_id,
    }


def write_extra(folder: Path, files: Mapping[str, str | bytes] | None) -> None:
    """Write further files of a checkpoint, such as its model card."""
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def save_tokenizer_with(
    folder: Path, source: Path, tokenizer: Tokenizer, token: str, *, processor: str
) -> int:
    """Write tokenizer.json and its configuration with `token` among them; return its id.

    `source` is a directory with tokenizer.json or tokenizer.model, `tokenizer` the same, loaded,
    with the tokens that were added at loading. `token`, the placeholder of a picture, is added at
    the end if it is new; `processor` is the class of transformers that reads the files.

    Raises:
        CheckpointError: the files give other ids than the loaded tokenizer.
    """
    is_slow = isinstance(tokenizer, SentencePieceTokenizer)
    rust, legacy = _rust(source, tokenizer)
    for index, one in sorted(tokenizer.added_tokens.items()):
        entry = tokenizers.AddedToken(
            one.content,
            single_word=one.single_word,
            lstrip=one.lstrip,
            rstrip=one.rstrip,
            # A slow tokenizer matches its added tokens before normalization.
            normalized=one.normalized and not is_slow,
        )
        add = rust.add_special_tokens if one.special else rust.add_tokens
        add([entry])
        if rust.token_to_id(one.content) != index:
            raise CheckpointError(
                f"{source}: token {one.content!r} has id {index}, but would get "
                f"{rust.token_to_id(one.content)} in tokenizer.json"
            )
    rust.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
    _frame(rust, tokenizer)
    copy_tokenizer(source, folder)
    (folder / "tokenizer.json").write_text(rust.to_str(pretty=True), encoding="utf-8")
    written = dict(read_optional_json(source / "tokenizer_config.json") or {})
    # tokenizer.json has the added tokens now.
    for key in ("added_tokens_decoder", "auto_map"):
        written.pop(key, None)
    (folder / "added_tokens.json").unlink(missing_ok=True)
    written |= {"padding_side": "left", "processor_class": processor}
    if legacy is not None:
        written["legacy"] = legacy
    pad = _pad(tokenizer, written, read_optional_json(source / "special_tokens_map.json") or {})
    if pad is not None:
        written["pad_token"] = pad
    write_json(folder / "tokenizer_config.json", written)
    found = rust.token_to_id(token)
    if found is None:  # the library adds what it is asked to add
        raise CheckpointError(f"{token!r} could not be added to the tokenizer of {source}")
    return int(found)


def _rust(source: Path, tokenizer: Tokenizer) -> tuple[tokenizers.Tokenizer, bool | None]:
    """Return the tokenizer as one of the tokenizers library, and `legacy` of its configuration.

    A folder may have both files; a slow tokenizer was read from tokenizer.model. `legacy` is None
    for a tokenizer.json.
    """
    is_slow = isinstance(tokenizer, SentencePieceTokenizer)
    text = None if is_slow else read_optional_text(source / "tokenizer.json")
    if text is not None:
        return tokenizers.Tokenizer.from_str(text), None
    legacy = tokenizer.legacy if isinstance(tokenizer, SentencePieceTokenizer) else True
    model = (source / "tokenizer.model").read_bytes()
    return llama_tokenizer(model, legacy=legacy), legacy


def _frame(rust: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    """Add the tokens that our tokenizer writes before and after a text, such as <s>."""
    prefix, suffix = list(tokenizer.prefix_ids), list(tokenizer.suffix_ids)
    if rust.encode("").ids == prefix + suffix:
        return
    names = {index: str(tokenizer.id_to_token(index)) for index in (*prefix, *suffix)}
    single = [*(names[i] for i in prefix), "$A", *(names[i] for i in suffix)]
    rust.post_processor = TemplateProcessing(
        single=single,
        pair=[*single, *("$B:1" if part == "$A" else f"{part}:1" for part in single)],
        special_tokens=[(name, index) for index, name in names.items()],
    )


def _pad(
    tokenizer: Tokenizer, config: Mapping[str, object], special_map: Mapping[str, object]
) -> str | None:
    """Return a padding token where the files name none: unk as the original, else eos."""
    if config.get("pad_token") or special_map.get("pad_token"):
        return None
    for index in (tokenizer.pad_id, tokenizer.unk_id, tokenizer.eos_id):
        if index is not None:
            return tokenizer.id_to_token(index)
    return None

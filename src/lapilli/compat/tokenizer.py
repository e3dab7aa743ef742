"""Tokenizers of transformers that take ids and text from lapilli.prompt.

transformers 5 has no SentencePiece tokenizer any more, and its own reading of the same files gives
other ids than the release that the original is pinned to.
"""

# The types of transformers differ from release to release, and no release has all of them.
# mypy: allow-untyped-calls, allow-subclassing-any, disable-error-code="override,misc"

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from lapilli.checkpoint.source import read_optional_json, resolve
from lapilli.checkpoint.tokenizer import copy_tokenizer, load_tokenizer
from lapilli.checkpoint.write.files import write_json
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.prompt.tokenizer.fast import FastTokenizer

NO_LIMIT = int(1e30)
ROLES = ("bos", "eos", "unk", "pad")
SETTINGS = (
    *(f"{role}_token" for role in ROLES),
    *("add_bos_token", "add_eos_token", "legacy", "model_max_length", "padding_side"),
)


class PreTrainedTokenizer(transformers.PreTrainedTokenizer):
    """Tokenizer of ours as transformers has one."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  transformers' attribute

    def __init__(self, inner: Tokenizer, directory: Path) -> None:
        self.inner = inner
        self.directory = directory
        self.legacy: bool | None = None if self.is_fast else getattr(inner, "legacy", None)
        ids = {"bos": inner.bos_id, "eos": inner.eos_id, "unk": inner.unk_id, "pad": inner.pad_id}
        named = {
            f"{role}_token": inner.id_to_token(index)
            for role, index in ids.items()
            if index is not None
        }
        super().__init__(
            name_or_path=str(directory),
            padding_side=inner.padding_side,
            model_max_length=inner.model_max_length or NO_LIMIT,
            **named,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *_: object,
        use_fast: bool | None = None,
        **options: object,
    ) -> "PreTrainedTokenizer":
        """Open the tokenizer of a directory or of a repository.

        Args:
            path: with tokenizer.model or tokenizer.json.
            use_fast: the tokenizers library; False: SentencePiece itself, where there is a model;
                None: what the name of the class says.
            options: laid over tokenizer_config.json, such as padding_side or model_max_length.

        Raises:
            MissingFileError: no tokenizer there.
        """
        directory = resolve(str(path), weights=False)
        fast = cls.__name__.endswith("Fast") if use_fast is None else use_fast
        settings = {key: one for key, one in options.items() if key in SETTINGS and one is not None}
        return wrap_tokenizer(load_tokenizer(directory, fast=fast, settings=settings), directory)

    def __len__(self) -> int:
        return self.inner.vocab_size

    @property
    def vocab_size(self) -> int:
        """Return the number of ids without the ones that were added to the tokenizer's own file."""
        added = set(self.inner.added_vocab.values())
        end = len(self)
        while end - 1 in added:
            end -= 1
        return end

    def get_added_vocab(self) -> dict[str, int]:
        """Return the added tokens, the special ones among them, and their ids."""
        return dict(self.inner.added_vocab)

    def get_vocab(self) -> dict[str, int]:
        """Return every token and its id."""
        return {self.inner.id_to_token(index): index for index in range(len(self))}

    def _add_tokens(self, new_tokens: Sequence[Any], special_tokens: bool = False) -> int:
        new = [str(token) for token in new_tokens if self.inner.token_to_id(str(token)) is None]
        return self.inner.add_tokens(new, special=special_tokens) if new else 0

    def tokenize(self, text: str, **_: object) -> list[str]:
        """Return the tokens of a text, without what is written before and after it."""
        return [self.inner.id_to_token(i) for i in self.inner.encode(text, add_bos=False)]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return ids with what the tokenizer writes before and after every text."""
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        before, after = self.inner.prefix_ids, self.inner.suffix_ids
        return [index for ids in texts for index in (*before, *ids, *after)]

    def _convert_token_to_id_with_added_voc(self, token: str) -> int | None:
        found = self.inner.token_to_id(token)
        return self.inner.unk_id if found is None else found

    _convert_token_to_id = _convert_token_to_id_with_added_voc

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:  # noqa: ANN401
        """Return the token of an id, or the tokens of several."""
        if isinstance(ids, int):
            return self.inner.id_to_token(ids)
        left_out = self.all_special_ids if skip_special_tokens else ()
        return [self.inner.id_to_token(int(i)) for i in ids if int(i) not in left_out]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Return the text of tokens."""
        return self._decode(self.convert_tokens_to_ids(list(tokens)))

    def _decode(
        self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **_: object
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        return self.inner.decode(ids, skip_special=skip_special_tokens)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *_: object, **__: object
    ) -> tuple[str, ...]:
        """Write the files that the tokenizer came from, and what was changed since."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != self.directory.resolve():
            copy_tokenizer(self.directory, folder)
        config = dict(read_optional_json(folder / "tokenizer_config.json") or {})
        for role in ROLES:
            token = getattr(self, f"{role}_token")
            before = config.get(f"{role}_token")
            if token != (before.get("content") if isinstance(before, Mapping) else before):
                config[f"{role}_token"] = token
        config["padding_side"] = self.padding_side
        config["model_max_length"] = self.model_max_length
        write_json(folder / "tokenizer_config.json", config)
        named = {f"{role}_token": getattr(self, f"{role}_token") for role in ROLES}
        known = dict(read_optional_json(folder / "special_tokens_map.json") or {})
        known |= {name: token for name, token in named.items() if token and name not in known}
        write_json(folder / "special_tokens_map.json", known)
        added = {t: i for t, i in self.inner.added_vocab.items() if i >= self.vocab_size}
        if added:
            write_json(folder / "added_tokens.json", added)
        return tuple(str(path) for path in sorted(folder.glob("*token*")))


class LlamaTokenizer(PreTrainedTokenizer):
    """SentencePiece, as the original reads llama checkpoints."""


class PreTrainedTokenizerFast(PreTrainedTokenizer):
    """Tokenizer of the tokenizers library."""

    @property
    def is_fast(self) -> bool:
        """Return True: the tokenizers library does the work."""
        return True


class LlamaTokenizerFast(PreTrainedTokenizerFast):
    """Tokenizer of the tokenizers library on a llama vocabulary, as mistral has it."""


class GPTNeoXTokenizerFast(PreTrainedTokenizerFast):
    """Byte-level BPE, as MPT has it."""


CLASSES = {
    (False, "LlamaTokenizer"): LlamaTokenizer,
    (True, "LlamaTokenizer"): LlamaTokenizerFast,
    (True, "GPTNeoXTokenizer"): GPTNeoXTokenizerFast,
}


def wrap_tokenizer(inner: Tokenizer, directory: Path) -> PreTrainedTokenizer:
    """Return a tokenizer of ours under the class name that transformers has for these files."""
    config = read_optional_json(directory / "tokenizer_config.json") or {}
    family = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    is_fast = isinstance(inner, FastTokenizer)
    fallback = PreTrainedTokenizerFast if is_fast else LlamaTokenizer
    return CLASSES.get((is_fast, family), fallback)(inner, directory)


def inner_of(tokenizer: Any) -> Tokenizer:  # noqa: ANN401
    """Return the tokenizer of ours behind one of transformers, read from its files if need be."""
    if isinstance(tokenizer, PreTrainedTokenizer):
        return tokenizer.inner
    folder = resolve(tokenizer.name_or_path, weights=False)
    return load_tokenizer(folder, fast=bool(tokenizer.is_fast))


def take_auto_tokenizer() -> None:
    """Let AutoTokenizer read the SentencePiece tokenizers of llama with this module from now on.

    Programs of the original open a tokenizer by it, and transformers 5 gives other ids for
    spaces at the beginning of a text. All other tokenizers stay with transformers.
    """
    theirs = transformers.AutoTokenizer.from_pretrained
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def from_pretrained(path: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        if not _is_sentencepiece_llama(path, options):
            return theirs(path, *args, **options)
        return PreTrainedTokenizer.from_pretrained(path, **{"use_fast": True, **options})

    # A class of transformers: this is the one place that all programs ask.
    setattr(transformers.AutoTokenizer, "from_pretrained", staticmethod(from_pretrained))  # noqa: B010


def _is_sentencepiece_llama(path: str | os.PathLike[str], options: Mapping[str, Any]) -> bool:
    if any(options.get(name) for name in ("cache_dir", "revision", "subfolder", "gguf_file")):
        return False
    try:
        config = get_tokenizer_config(str(path))
        found = cached_file(str(path), "tokenizer.model")
    except (OSError, ValueError):  # transformers says it in its own words
        return False
    return found is not None and str(config.get("tokenizer_class")).startswith("LlamaTokenizer")

"""Our tokenizers with the attributes and calls of a transformers tokenizer.

As far as programs for the original use them; the ids and the text come from lapilli.prompt.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lapilli.checkpoint.formats.files import read_optional_json
from lapilli.checkpoint.tokenizer import load_tokenizer
from lapilli.compat.foreign import Foreign
from lapilli.compat.image_processor import BatchFeature
from lapilli.errors import PromptError
from lapilli.prompt.tokenizer import FastTokenizer, Tokenizer

ROLES = ("bos", "eos", "unk", "pad")
NO_LIMIT = int(1e30)


class BatchEncoding(BatchFeature):
    """What a call of a tokenizer returns: `input_ids` and `attention_mask`."""


class PreTrainedTokenizer:
    """A tokenizer as transformers has it.

    Args:
        inner: ours.
    """

    is_fast = False

    def __init__(self, inner: Tokenizer) -> None:
        self.inner = inner
        self._roles: dict[str, int | None] = {
            "bos": inner.bos_id,
            "eos": inner.eos_id,
            "unk": inner.unk_id,
            "pad": inner.pad_id,
        }
        self.padding_side = inner.padding_side
        self.model_max_length = inner.model_max_length or NO_LIMIT
        self.legacy: bool | None = None if self.is_fast else getattr(inner, "legacy", None)

    def __len__(self) -> int:
        return self.inner.vocab_size

    def __getattr__(self, name: str) -> Foreign:
        role, _, kind = name.partition("_token")
        if "_roles" in self.__dict__ and role in ROLES and kind in ("", "_id"):
            token_id = self._roles[role]
            if kind == "_id" or token_id is None:
                return token_id
            return self.inner.id_to_token(token_id)
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def __setattr__(self, name: str, value: Foreign) -> None:
        role, _, kind = name.partition("_token")
        if role in ROLES and kind in ("", "_id"):
            is_name = kind == "" and value is not None
            self._roles[role] = self.inner.token_to_id(value) if is_name else value
        else:
            super().__setattr__(name, value)

    @property
    def vocab_size(self) -> int:
        """Number of ids without the ones that were added to the tokenizer's own file."""
        added = self.get_added_vocab().values()
        end = len(self)
        while end - 1 in added:
            end -= 1
        return end

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that `decode(skip_special_tokens=True)` leaves out."""
        return sorted(self.inner.special_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens of `all_special_ids`."""
        return [self.inner.id_to_token(index) for index in self.all_special_ids]

    def get_added_vocab(self) -> dict[str, int]:
        """Added tokens, the special ones among them."""
        return dict(self.inner.added_vocab)

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return {self.inner.id_to_token(index): index for index in range(len(self))}

    def add_tokens(self, new_tokens: str | Sequence[Any], special_tokens: bool = False) -> int:
        """Grow the vocabulary; how many tokens were new."""
        names = [new_tokens] if isinstance(new_tokens, str) else [str(t) for t in new_tokens]
        return self.inner.add_tokens(names, special=special_tokens)

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any]) -> int:
        """Grow the vocabulary by named tokens (`pad_token`, ...) and give them their roles."""
        new = 0
        for name, value in special_tokens_dict.items():
            if name == "additional_special_tokens":
                new += self.add_tokens(value, special_tokens=True)
                continue
            new += self.add_tokens([str(value)], special_tokens=True)
            setattr(self, name, str(value))
        return new

    def encode(self, text: str, add_special_tokens: bool = True, **_: object) -> list[int]:
        """Ids of a text, with what the tokenizer writes before and after it."""
        ids = self.inner.encode(text, add_bos=add_special_tokens)
        return [*ids, *self.inner.suffix_ids] if add_special_tokens else ids

    def tokenize(self, text: str, **_: object) -> list[str]:
        """Tokens of a text."""
        return [self.inner.id_to_token(i) for i in self.encode(text, add_special_tokens=False)]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        **_: object,
    ) -> BatchEncoding:
        """Ids and attention mask of a text or of several.

        Raises:
            PromptError: tensors of rows of unequal length without padding.
        """
        single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.encode(t, add_special_tokens=add_special_tokens) for t in texts]
        limit = max_length if max_length is not None else self.model_max_length
        if truncation:
            rows = [row[:limit] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding:
            width = limit if padding == "max_length" else max(map(len, rows), default=0)
            masks = [self._padded(mask, 0, width) for mask in masks]
            rows = [self._padded(row, self._pad_id(), width) for row in rows]
        if return_tensors is None and single:
            return BatchEncoding(input_ids=rows[0], attention_mask=masks[0])
        if return_tensors is None:
            return BatchEncoding(input_ids=rows, attention_mask=masks)
        if len({len(row) for row in rows}) > 1:
            raise PromptError(
                f"rows of {sorted({len(row) for row in rows})} ids do not make one tensor: "
                "call the tokenizer with padding=True"
            )
        return BatchEncoding(
            input_ids=torch.tensor(rows, dtype=torch.long),
            attention_mask=torch.tensor(masks, dtype=torch.long),
        )

    def _pad_id(self) -> int:
        if self._roles["pad"] is None:
            raise PromptError(
                "the tokenizer has no pad token: set tokenizer.pad_token = tokenizer.unk_token"
            )
        return self._roles["pad"]

    def _padded(self, row: list[int], fill: int, width: int) -> list[int]:
        gap = [fill] * (width - len(row))
        return [*gap, *row] if self.padding_side == "left" else [*row, *gap]

    def decode(
        self,
        token_ids: Foreign,
        skip_special_tokens: bool = False,
        **_: object,
    ) -> str:
        """Text of ids, a list or a tensor of one row."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        return self.inner.decode(list(ids), skip_special=skip_special_tokens)

    def batch_decode(
        self,
        sequences: Foreign,
        skip_special_tokens: bool = False,
        **_: object,
    ) -> list[str]:
        """Texts of rows of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in sequences]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Foreign:
        """Id of a token, or ids of several; unknown ones become the unknown token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self.inner.token_to_id(tokens)
        return self._roles["unk"] if token_id is None else token_id

    def convert_ids_to_tokens(self, ids: Foreign) -> Foreign:
        """Token of an id, or tokens of several."""
        if isinstance(ids, int):
            return self.inner.id_to_token(ids)
        return [self.inner.id_to_token(int(index)) for index in ids]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of tokens."""
        return self.decode(self.convert_tokens_to_ids(list(tokens)))


class LlamaTokenizer(PreTrainedTokenizer):
    """SentencePiece, as the original reads llama checkpoints."""


class PreTrainedTokenizerFast(PreTrainedTokenizer):
    """The tokenizers library."""

    is_fast = True


class LlamaTokenizerFast(PreTrainedTokenizerFast):
    """The tokenizers library on a llama vocabulary, as the original reads mistral checkpoints."""


class GPTNeoXTokenizerFast(PreTrainedTokenizerFast):
    """Byte-level BPE, as MPT has it."""


CLASSES = {
    (False, "LlamaTokenizer"): LlamaTokenizer,
    (True, "LlamaTokenizer"): LlamaTokenizerFast,
    (True, "GPTNeoXTokenizer"): GPTNeoXTokenizerFast,
}


def wrap_tokenizer(inner: Tokenizer, directory: Path) -> PreTrainedTokenizer:
    """A tokenizer of ours under the class name that transformers has for these files."""
    config = read_optional_json(directory / "tokenizer_config.json") or {}
    family = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    is_fast = isinstance(inner, FastTokenizer)
    fallback = PreTrainedTokenizerFast if is_fast else LlamaTokenizer
    return CLASSES.get((is_fast, family), fallback)(inner)


class AutoTokenizer:
    """Opens the tokenizer of a directory, as transformers' class of this name."""

    @staticmethod
    def from_pretrained(path: str | Path, *, use_fast: bool = True) -> PreTrainedTokenizer:
        """The tokenizer of a directory.

        Args:
            path: with tokenizer.model or tokenizer.json.
            use_fast: the tokenizers library; False: SentencePiece itself, where there is a model.

        Raises:
            MissingFileError: no tokenizer there.
        """
        directory = Path(path)
        return wrap_tokenizer(load_tokenizer(directory, fast=use_fast), directory)

"""A tokenizer.json without its added tokens: for text in which a person typed one of them.

Nothing in such a text is special. The model of the tokenizer could still put a special token
together from its letters, so what it would need for that is taken out as well.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

import tokenizers

from lapilli.prompt.tokenizer.base import Token


class PlainText:
    """Encodes stretches of text between added tokens; built when first needed.

    Args:
        source: content of tokenizer.json, on demand.
    """

    def __init__(self, source: Callable[[], str]) -> None:
        self._source = source
        self._names: frozenset[str] = frozenset()
        self._first: tokenizers.Tokenizer | None = None
        self._later: tokenizers.Tokenizer | None = None

    def tokenize(self, text: str, start: int, end: int, names: Iterable[str]) -> list[Token]:
        """Tokens of text[start:end] that know none of the `names`."""
        first, later = self._build(frozenset(names))
        encoding = (later if start else first).encode(text[start:end], add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [Token(i, start + b, start + e) for i, (b, e) in found]

    def _build(self, names: frozenset[str]) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Two tokenizers: "first" may put a space in front of its text where "later" may not."""
        if self._first is None or self._later is None or names != self._names:
            raw = json.loads(self._source())
            raw["added_tokens"] = []
            raw["post_processor"] = None
            _forget(raw["model"], names)
            self._names = names
            self._first = tokenizers.Tokenizer.from_str(json.dumps(raw))
            _never_first(raw["pre_tokenizer"])
            self._later = tokenizers.Tokenizer.from_str(json.dumps(raw))
        return self._first, self._later


def _forget(model: dict[str, Any], names: frozenset[str]) -> None:
    """Make the tokenizer's model unable to produce the tokens `names` from text."""
    if "merges" in model:
        pairs = model["merges"]
        whole = ("".join(p.split(" ")) if isinstance(p, str) else "".join(p) for p in pairs)
        model["merges"] = [p for p, joined in zip(pairs, whole, strict=True) if joined not in names]
    elif isinstance(model.get("vocab"), list):  # unigram: [piece, score], the id is the index
        model["vocab"] = [
            [f"\0{i}", score] if piece in names else [piece, score]
            for i, (piece, score) in enumerate(model["vocab"])
        ]


def _never_first(pre_tokenizer: dict[str, Any] | None) -> None:
    """Turn "a space before the first word of the text" into "none"."""
    if pre_tokenizer is None:
        return
    for inner in pre_tokenizer.get("pretokenizers", []):
        _never_first(inner)
    if pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"

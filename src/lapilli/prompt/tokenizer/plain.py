"""A tokenizer.json without its special tokens: for text in which a person typed one of them.

Nothing in such a text is special; other added tokens are found there as everywhere. The model of
the tokenizer could still put a special token together from its letters, so what it would need for
that is taken out as well.
"""

import json
from collections.abc import Callable
from typing import Any

from lapilli.prompt.tokenizer.added import AddedTokens
from lapilli.prompt.tokenizer.base import Token
from lapilli.prompt.tokenizer.json_file import encode_text, parse_tokenizer


class PlainText:
    """Encodes stretches of text between special tokens; built when first needed.

    Args:
        source: content of tokenizer.json, on demand.
    """

    def __init__(self, source: Callable[[], str]) -> None:
        self._source = source
        self._added: AddedTokens | None = None
        self._ids: dict[int, int] = {}

    def tokenize(self, text: str, start: int, end: int, added: AddedTokens) -> list[Token]:
        """Tokens of text[start:end] that know none of the special ones among `added`."""
        if self._added is not added:
            self._build(added)
        tokenizer = self._later if start else self._first
        encoding = encode_text(tokenizer, text[start:end])
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [Token(self._ids.get(i, i), start + b, start + e) for i, (b, e) in found]

    def _build(self, added: AddedTokens) -> None:
        """Two tokenizers: "first" may put a space in front of its text where "later" may not."""
        special = {token.content for token in added.tokens.values() if token.special}
        raw = json.loads(self._source())
        raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] not in special]
        raw["post_processor"] = None
        _forget(raw["model"], special)
        self._first = parse_tokenizer(json.dumps(raw))
        _never_first(raw["pre_tokenizer"])
        self._later = parse_tokenizer(json.dumps(raw))
        # Tokens that are not in the model's vocabulary are counted anew.
        pairs = [(self._first.token_to_id(t["content"]), t["id"]) for t in raw["added_tokens"]]
        self._ids = {theirs: ours for theirs, ours in pairs if theirs not in (None, ours)}
        self._added = added


def _forget(model: dict[str, Any], names: set[str]) -> None:
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

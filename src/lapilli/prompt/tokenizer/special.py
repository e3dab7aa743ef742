"""Special and added tokens as the tokenizer files name them.

Source: behaviour of transformers 4.37.2 when it loads a tokenizer: `added_tokens_decoder` of
tokenizer_config.json where it exists, otherwise special_tokens_map.json over the configuration
and added_tokens.json.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from lapilli.errors import CheckpointError

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Order in which missing special tokens get new ids."""
_MOST_DIGITS = 9  # of an id
LLAMA_TOKENS: Mapping[str, str] = MappingProxyType({"bos": "<s>", "eos": "</s>", "unk": "<unk>"})
"""What the Llama family calls its tokens where no file says otherwise."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is cut out of the text before the model of the tokenizer sees it."""

    content: str
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`named`: role -> token; `additional`: further special ones; `added`: id -> token."""

    named: Mapping[str, AddedToken] = field(default_factory=dict)
    additional: tuple[AddedToken, ...] = ()
    added: Mapping[int, AddedToken] = field(default_factory=dict)

    @property
    def all(self) -> tuple[AddedToken, ...]:
        """Every special token once, in the order of `ROLES`, then the additional ones."""
        tokens = [self.named[role] for role in ROLES if role in self.named]
        return tuple({t.content: t for t in reversed([*tokens, *self.additional])}.values())[::-1]

    def content(self, role: str) -> str | None:
        """Text of the token with a role."""
        token = self.named.get(role)
        return None if token is None else token.content


def read_special_tokens(
    config: Mapping[str, object],
    special_map: Mapping[str, object],
    added: Mapping[str, int],
    *,
    defaults: Mapping[str, str],
) -> SpecialTokens:
    """Special tokens out of tokenizer_config.json, special_tokens_map.json, added_tokens.json.

    Raises:
        CheckpointError: a token that is neither a string nor an object with `content`.
    """
    settings = {f"{role}_token": token for role, token in defaults.items()} | dict(config)
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, Mapping):
        by_id = {_index(i): _token(t, special=False, normalized=True) for i, t in listed.items()}
    else:
        settings |= special_map
        by_id = {}
    named = {
        role: _token(settings[f"{role}_token"], special=True, normalized=False)
        for role in ROLES
        if settings.get(f"{role}_token") is not None
    }
    extra = settings.get("additional_special_tokens")
    names = extra if isinstance(extra, Sequence) and not isinstance(extra, str) else ()
    additional = tuple(_token(t, special=True, normalized=False) for t in names)
    if not isinstance(listed, Mapping):
        by_id = _from_names(added, {t.content for t in (*named.values(), *additional)})
    return SpecialTokens(named, additional, by_id)


def _from_names(added: Mapping[str, int], special: Iterable[str]) -> dict[int, AddedToken]:
    names = set(special)
    return {
        index: AddedToken(content, special=content in names, normalized=content not in names)
        for content, index in added.items()
    }


def _index(key: object) -> int:
    """The id that a key of `added_tokens_decoder` spells."""
    text = str(key)
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise CheckpointError(
            f"tokenizer_config.json: added_tokens_decoder has the key {text[:50]!r}, expected an id"
        )
    return int(text)


def _token(value: object, *, special: bool, normalized: bool) -> AddedToken:
    """A token written as a string or as an object."""
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=normalized)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        return AddedToken(
            value["content"],
            special=special or bool(value.get("special", False)),
            normalized=bool(value.get("normalized", normalized)),
            lstrip=bool(value.get("lstrip", False)),
            rstrip=bool(value.get("rstrip", False)),
            single_word=bool(value.get("single_word", False)),
        )
    raise CheckpointError(
        f"special token {value!r:.100}: expected a string or an object with `content`, as in "
        "special_tokens_map.json"
    )

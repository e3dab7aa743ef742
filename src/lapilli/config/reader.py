"""Readers of what comes from outside: JSON texts, their objects key by key, and paths.

    bytes -> parse_json -> a value -> KeyReader: typed keys, and which of them were read

The limits on a stranger's file stand here and nowhere else: what Python's parser takes may still
break who uses it (nests that exceed the stack when they are written again, half characters that
cannot be printed, a file larger than the memory). Errors name the file, the key, what was expected
and what was found. Knows nothing about models.
"""

import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Final, TypeGuard, TypeVar, get_args, overload

from lapilli.errors import CheckpointError, ConfigError, ConfigFileError, UnknownKeyError

JsonObject = Mapping[str, object]
T = TypeVar("T")

# Beyond every model that there is, and far below what could not be built or counted.
MOST_LAYERS: Final = 1000
MOST_HEADS: Final = 1 << 12
MOST_WIDTH: Final = 1 << 18
MOST_WORDS: Final = 1 << 24
MOST_POSITIONS: Final = 1 << 26
MOST_PIXELS: Final = 1 << 13  # of one side of a tile
MOST: Final = (1 << 31) - 1  # of everything else that is counted
LARGEST: Final = float(1 << 63)
LONGEST: Final = 1000  # characters of a value that is a string

_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlevel = 3

MOST_BYTES: Final = 32 << 20
"""Most bytes of a JSON file or header; the largest that are published have a third of it."""
MOST_DEPTH: Final = 100
_UTF_16 = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")


def parse_json(data: bytes, where: str, *, unique: bool = False) -> object:
    """Return the value of a JSON text.

    A byte order mark is skipped. `where` is the file, for messages. With `unique` a key that comes
    twice in an object is refused; else the last one counts.

    Raises:
        CheckpointError: not UTF-8, not JSON, or beyond a limit.
    """
    if len(data) > MOST_BYTES:
        raise CheckpointError(
            f"{where} has {len(data)} bytes of JSON, at most {MOST_BYTES} are read"
        )
    text = decode_text(data, where)
    try:
        found: object = json.loads(text, object_pairs_hook=unique_keys if unique else None)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where} is not valid JSON: {error.msg} in line {error.lineno}"
        ) from error
    except RecursionError:
        raise CheckpointError(f"{where} is nested more than {MOST_DEPTH} deep") from None
    except ValueError as error:  # a number of thousands of digits, a key that comes twice
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    if is_deep(found):
        raise CheckpointError(f"{where} is nested more than {MOST_DEPTH} deep")
    if "\\ud" in text or "\\uD" in text:
        _refuse_halves(found, where)
    return found


def decode_text(data: bytes, where: str) -> str:
    """Return the text of a file in UTF-8, without a byte order mark.

    Raises:
        CheckpointError: another encoding.
    """
    if data.startswith(_UTF_16):
        raise CheckpointError(f"{where} is UTF-16 text, expected UTF-8: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 text: is it damaged?") from error


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs, as an object_pairs_hook of the json module.

    Raises:
        ValueError: a key comes twice, so one of its values would be lost.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} comes twice in one object")
    return made


def is_deep(value: object) -> bool:
    """Return whether lists and objects lie in each other more than MOST_DEPTH deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for holder in level
            for inner in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse_halves(value: object, where: str) -> None:
    """Refuse half of a character beyond 16 bits, which JSON can write and UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{where} holds half a character (a lone surrogate): is it damaged?"
        ) from error


def is_object(value: object) -> TypeGuard[JsonObject]:
    """Return whether a value of a parsed JSON file is an object."""
    return isinstance(value, Mapping)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReport:
    """Fate of every key of the config files; nested keys are written with dots."""

    used: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __add__(self, other: "KeyReport") -> "KeyReport":
        return KeyReport(
            used=self.used + other.used,
            ignored=self.ignored + other.ignored,
            unknown=self.unknown + other.unknown,
        )

    def with_read(self, key: str) -> "KeyReport":
        """Return the report of a key that was read elsewhere, if it is there."""
        if key not in self.ignored:
            return self
        ignored = tuple(name for name in self.ignored if name != key)
        return replace(self, used=(*self.used, key), ignored=ignored)

    def refuse_unknown(self) -> None:
        """Refuse unknown keys, for strict_config.

        Raises:
            UnknownKeyError: a key was neither used nor knowingly ignored.
        """
        if self.unknown:
            raise UnknownKeyError(
                f"unknown configuration key {', '.join(self.unknown)}: nothing reads it; "
                "remove it, or load with strict_config=False to only report it"
            )


@dataclass(slots=True)
class KeyReader:
    """One JSON object whose keys are read once each; `null` counts as absent.

    Args:
        raw: the object.
        where: name of the object in messages, such as `config.json`.
        ignored: keys that are knowingly not read.
        prefix: what stands before its keys in the report, such as `text_config.`.
    """

    raw: JsonObject
    where: str
    ignored: frozenset[str] = frozenset()
    prefix: str = ""
    used: set[str] = field(default_factory=set)
    children: list["KeyReader"] = field(default_factory=list)

    def has(self, key: str) -> bool:
        """Return whether the key is there at all, `null` included."""
        return key in self.raw

    def value(self, key: str) -> object:
        """Return the raw value of a key (None when absent), marked as used."""
        if key in self.raw:
            self.used.add(key)
        return self.raw.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number; an integral float counts as one.

        Raises:
            ConfigFileError: absent without default, or something else.
        """
        found = self.optional_integer(key)
        if found is not None:
            return found
        if default is None:
            raise ConfigFileError(f"{self.where}: {self.prefix}{key} is missing, expected a number")
        return default

    def optional_integer(self, key: str) -> int | None:
        """Return a whole number of at most 63 bits, or None."""
        value = self.value(key)
        if value is None:
            return None
        if not _is_number(value) or not abs(value) < LARGEST or value != int(value):
            raise self._wrong(key, "a whole number", value)
        return int(value)

    def positive(self, key: str, default: int | None = None, *, most: int = MOST) -> int:
        """Return a whole number from 1 to `most`.

        Raises:
            ConfigFileError: absent without default, or something else.
        """
        return self._from(1, key, self.integer(key, default), most)

    def optional_positive(self, key: str, *, most: int = MOST) -> int | None:
        """Return a whole number from 1 to `most`, or None."""
        found = self.optional_integer(key)
        return None if found is None else self._from(1, key, found, most)

    def number(
        self, key: str, default: float, *, least: float = -LARGEST, most: float = LARGEST
    ) -> float:
        """Return a finite number from `least` to `most`."""
        found = self.optional_number(key, least=least, most=most)
        return default if found is None else found

    def optional_number(
        self, key: str, *, least: float = -LARGEST, most: float = LARGEST
    ) -> float | None:
        """Return a finite number from `least` to `most`, or None."""
        value = self.value(key)
        return None if value is None else self._number(key, value, least, most)

    def numbers(
        self, key: str, count: int, *, least: float = -LARGEST, most: float = LARGEST
    ) -> tuple[float, ...] | None:
        """Return a list of so many finite numbers from `least` to `most`, or None."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            raise self._wrong(key, f"a list of {count} numbers", value)
        return tuple(self._number(key, one, least, most) for one in value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    @overload
    def text(self, key: str, default: str) -> str: ...

    @overload
    def text(self, key: str, default: None = None) -> str | None: ...

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a string of at most LONGEST characters, or the default."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > LONGEST:
            raise self._wrong(key, "a short string", value)
        return value

    def choice(
        self,
        key: str,
        default: str,
        known: Mapping[str, T],
        refusal: type[ConfigError] = ConfigError,
    ) -> T:
        """Return what a key names.

        Raises:
            ConfigError: nothing has the name; a `refusal`.
        """
        name = self.text(key, default)
        if name not in known:
            where = f"{self.where}: {self.prefix}{key}"
            raise refusal(f"{where} is {name!r}, choose from {', '.join(known)}")
        return known[name]

    def child(self, key: str, ignored: frozenset[str] = frozenset()) -> "KeyReader":
        """Return a reader of a nested object, empty when absent; its keys join this report."""
        value = self.value(key)
        if value is None:
            value = {}
        if not is_object(value):
            raise self._wrong(key, "an object", value)
        child = KeyReader(value, self.where, ignored, f"{self.prefix}{key}.")
        self.children.append(child)
        return child

    def ids(self, key: str) -> tuple[int, ...]:
        """Return one id or a list of ids as a tuple."""
        value = self.value(key)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not all(type(one) is int and abs(one) <= MOST for one in values):
            raise self._wrong(key, "an id or a list of ids", value)
        return tuple(values)

    def all_ids(self) -> dict[str, int]:
        """Return every key with its id, of a file that maps tokens to ids."""
        return {key: self._from(0, key, self.integer(key), MOST_WORDS) for key in self.raw}

    def report(self) -> KeyReport:
        """Return what became of every key, those of nested objects included."""
        rest = self.raw.keys() - self.used
        report = KeyReport(
            used=self._named(self.used),
            ignored=self._named(rest & self.ignored),
            unknown=self._named(rest - self.ignored),
        )
        for child in self.children:
            report += child.report()
        return report

    def _named(self, keys: set[str]) -> tuple[str, ...]:
        return tuple(sorted(self.prefix + key for key in keys))

    def _from(self, least: int, key: str, found: int, most: int) -> int:
        if not least <= found <= most:
            limit = f"of at least {least}" if found < least else f"of at most {most}"
            raise self._wrong(key, f"a number {limit}", found)
        return found

    def _number(self, key: str, value: object, least: float, most: float) -> float:
        # NaN fails every comparison.
        if not _is_number(value) or not least <= value <= most:
            bounded = least > -LARGEST or most < LARGEST
            limits = f"a number from {least:g} to {most:g}" if bounded else "a finite number"
            raise self._wrong(key, limits, value)
        return float(value)

    def _wrong(self, key: str, expected: str, found: object) -> ConfigFileError:
        where = f"{self.where}: {self.prefix}{key[:100]}"  # keys of a vocabulary are foreign too
        return ConfigFileError(f"{where} must be {expected}, got {shown(found)}")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: object) -> str:
    """Return a value of a foreign file in a message: short, whatever it is, and on one line."""
    return _SHORT.repr(value)


@contextmanager
def in_file() -> Iterator[None]:
    """Make what a configuration refuses the fault of the file that it was read from.

    Raises:
        ConfigFileError: for a ConfigError inside; it names config.json if that named no file.
    """
    try:
        yield
    except CheckpointError:
        raise
    except ConfigError as error:
        where = "" if ".json" in str(error) else "config.json: "
        raise ConfigFileError(f"{where}{error}"[:LONGEST]) from error


_EXPECTED: Final = {
    str: "a text",
    int: "a whole number",
    bool: "True or False",
    NoneType: "None",
    Path: "a Path",
}


def check_type(name: str, value: object, kind: Any) -> None:  # noqa: ANN401  a type or several
    """Check the type of what a program gave; a bool is no number.

    Args:
        name: of the argument.
        value: that it has.
        kind: a class, or several as in `str | None`.

    Raises:
        ConfigError: a value of another type.
    """
    kinds = get_args(kind) or (kind,)
    if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
        return
    expected = " or ".join(_EXPECTED.get(one, f"a {one.__name__}") for one in kinds)
    raise ConfigError(f"{name} must be {expected}, got {shown(value)}")


def check_fields(record: Any) -> None:  # noqa: ANN401  any dataclass
    """Check that every field of a dataclass of plain values has a value of its type.

    Raises:
        ConfigError: see `check_type`.
    """
    for one in fields(record):
        check_type(one.name, getattr(record, one.name), one.type)


def given_path(name: str | os.PathLike[str]) -> Path:
    """Return the path that a person means; the `~` of a user who has no home stays as it is.

    Raises:
        ConfigError: neither text nor a path.
    """
    if not isinstance(name, str | os.PathLike):
        raise ConfigError(f"a path must be a text or a Path, got {shown(name)}")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """Yield a name of a file for libraries that take no other bytes than UTF-8.

    A file whose name is none goes by its open descriptor.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield str(path)

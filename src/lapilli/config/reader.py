"""Reading a foreign JSON object key by key, typed, and remembering which keys were read.

Knows nothing about models. Errors name the file, the key, what was expected and what was found.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from lapilli.errors import ConfigError, UnknownKeyError

JsonObject = Mapping[str, object]


def is_object(value: object) -> TypeGuard[JsonObject]:
    """Whether a value of a parsed JSON file is an object."""
    return isinstance(value, Mapping)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReport:
    """What became of every key of the config files; nested keys are written with dots."""

    used: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __add__(self, other: "KeyReport") -> "KeyReport":
        return KeyReport(
            used=self.used + other.used,
            ignored=self.ignored + other.ignored,
            unknown=self.unknown + other.unknown,
        )

    def refuse_unknown(self) -> None:
        """Used by strict_config.

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
        """Whether the key is there at all, `null` included."""
        return key in self.raw

    def value(self, key: str) -> object:
        """The raw value of a key (None when absent), marked as used."""
        if key in self.raw:
            self.used.add(key)
        return self.raw.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; an integral float counts as one.

        Raises:
            ConfigError: absent without default, or something else.
        """
        found = self.optional_integer(key)
        if found is not None:
            return found
        if default is None:
            raise ConfigError(f"{self.where}: {self.prefix}{key} is missing, expected a number")
        return default

    def optional_integer(self, key: str) -> int | None:
        """A whole number or None."""
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self._wrong(key, "a whole number", value)
        return int(value)

    def positive(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1.

        Raises:
            ConfigError: absent without default, or something else.
        """
        found = self.integer(key, default)
        if found < 1:
            raise self._wrong(key, "a number of at least 1", found)
        return found

    def number(self, key: str, default: float) -> float:
        """A number."""
        found = self.optional_number(key)
        return default if found is None else found

    def optional_number(self, key: str) -> float | None:
        """A number or None."""
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string or the default."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def child(self, key: str, ignored: frozenset[str] = frozenset()) -> "KeyReader":
        """A reader of a nested object, empty when absent; its keys join the report of this one."""
        value = self.value(key)
        if value is None:
            value = {}
        if not is_object(value):
            raise self._wrong(key, "an object", value)
        child = KeyReader(value, self.where, ignored, f"{self.prefix}{key}.")
        self.children.append(child)
        return child

    def ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids."""
        value = self.value(key)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        found: list[int] = []
        for one in values:
            if isinstance(one, bool) or not isinstance(one, int):
                raise self._wrong(key, "an id or a list of ids", value)
            found.append(one)
        return tuple(found)

    def report(self) -> KeyReport:
        """What became of every key, those of nested objects included."""
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

    def _wrong(self, key: str, expected: str, found: object) -> ConfigError:
        return ConfigError(f"{self.where}: {self.prefix}{key} must be {expected}, got {found!r}")

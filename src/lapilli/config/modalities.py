"""Declared modalities: the kinds that a config.json may name, their settings, and the one table.

    "lapilli_modalities": {"user": {"kind": "vector", "width": 64, "projector": "mlp2x_gelu"}}

A name is what messages, records and parameters call the modality, a kind what it is made of. The
kinds are rows of one table, `register_kind` adds one: the class of its settings, and what builds
its module from them (by name for our own, so that reading a configuration imports no torch). The
modality "image" stands in no such key: a checkpoint with a vision tower has it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from keyword import iskeyword
from typing import Any, ClassVar, cast

from lapilli.config.generation import SamplingParams
from lapilli.config.model import DecoderConfig, ModalityConfig, ProjectorConfig, TextConfig
from lapilli.config.projector import parse_projector
from lapilli.config.reader import (
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_WIDTH,
    MOST_WORDS,
    JsonObject,
    KeyReader,
    is_object,
    shown,
)
from lapilli.config.record import read_record, write_record
from lapilli.errors import ConfigError, ConfigFileError, UnsupportedModelError

KEY = "lapilli_modalities"
FUSIONS = ("tokens", "cross_attention")
MOST_TOKENS = 1 << 16
MOST_VALUES = 1 << 10  # of a feature in one event
Modalities = tuple[tuple[str, ModalityConfig], ...]
"""Names and settings of the declared modalities, in the order of the file."""

# A name stands beside these: as a keyword of Chat.ask, as a key of a record, as the type of a part.
RESERVED = frozenset(
    {
        *(field.name for field in fields(SamplingParams)),
        *("image", "images", "image_url", "input_image", "text", "input_text", "output_text"),
        *("question", "keep", "schema", "self", "cls", "role", "content", "system", "id", "type"),
        *("conversations", "messages", "conversation", "answer", "caption"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorConfig(ModalityConfig):
    """Vectors of another encoder, [n, width], through a projector.

    Attributes:
        width: of a vector.
        encoder: fingerprint of what made the vectors that it was trained with; vectors of another
            encoder in a store are refused. None: nobody says.
        projector: linear, mlpNx_gelu, identity (where the widths agree), or resamplerM: M positions
            of an item, however many vectors it has.
        tokens: positions of one vector: the projector's last layer is so many times as wide.

    Source: Ning et al. 2024 (User-LLM), section 3.2: a user embedding as soft prompt.
    """

    kind: ClassVar[str] = "vector"

    width: int
    encoder: str | None = None
    projector: str = "mlp2x_gelu"
    tokens: int = 1

    def __post_init__(self) -> None:
        _within("width", self.width, MOST_WIDTH)
        _within("tokens", self.tokens, MOST_TOKENS)
        if self.encoder == "":
            raise ConfigError(
                "encoder is empty: give the fingerprint of an encoder, or leave it out"
            )
        if self.tokens > 1 and self.projector.startswith(("identity", "none", "resampler")):
            raise ConfigError(
                f"tokens {self.tokens} needs a linear or mlpNx_gelu projector, found "
                f"{self.projector!r}: it makes several positions of one vector"
            )
        self.projector_for(self.width)  # a name that is none

    def projector_for(self, hidden_size: int) -> ProjectorConfig:
        """Return the projector into a language model of this width."""
        return projector_of(self.projector, self.width, hidden_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoricalFeature:
    """A feature of an event that is one of `size` values; 0 stands for unknown and padding.

    Attributes:
        most: values that an event may have at once, such as the genres of a film; the mean of
            their vectors is read.
    """

    name: str
    size: int
    width: int
    most: int = 1

    def __post_init__(self) -> None:
        _within(f"most of the feature {self.name!r}", self.most, MOST_VALUES)
        _within(f"size of the feature {self.name!r}", self.size, MOST_WORDS)
        _within(f"width of the feature {self.name!r}", self.width, MOST_WIDTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsConfig(ModalityConfig):
    """A history of events through a causal transformer of its own, then a projector.

    Attributes:
        categorical: features with a table of vectors each.
        numeric: names of features that are numbers.
        hidden_size: width of the encoder.
        intermediate_size: of its feed-forward blocks; 0: four widths.
        max_events: of a history; the last ones are kept.
        projector: linear or mlpNx_gelu (a position for every event), or resamplerM (M positions).
        tokens: last events whose states are handed on, each having seen all before it; 0: all.
        dropout: share of the joined vectors, and of what every block adds, that is left out while
            the encoder learns.

    Source: Ning et al. 2024 (User-LLM), section 3.1.
    """

    kind: ClassVar[str] = "events"

    categorical: tuple[CategoricalFeature, ...]
    numeric: tuple[str, ...] = ()
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 0
    max_events: int = 128
    projector: str = "resampler8"
    tokens: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.categorical] + list(self.numeric)
        if not self.categorical:
            raise ConfigError("categorical is empty: an event has at least one such feature")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"the feature {twice!r} comes twice: give every feature its own name")
        # They are names of modules too.
        if odd := next((name for name in names if not name.isidentifier()), None):
            raise ConfigError(f"a feature is called {odd!r}: expected a word such as 'genre'")
        _within("hidden_size", self.hidden_size, MOST_WIDTH)
        _within("num_layers", self.num_layers, MOST_LAYERS)
        _within("num_heads", self.num_heads, MOST_HEADS)
        _within("max_events", self.max_events, MOST_POSITIONS)
        _within("intermediate_size", self.intermediate_size, MOST_WIDTH, least=0)
        _within("tokens", self.tokens, self.max_events, least=0)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, expected at least 0 and below 1")
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_heads "
                f"{self.num_heads}: rotary positions turn pairs"
            )
        self.projector_for(self.hidden_size)

    @property
    def decoder(self) -> DecoderConfig:
        """The transformer between the events and the projector; it has no vocabulary."""
        return DecoderConfig(
            vocab_size=1,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size or 4 * self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            norm_eps=1e-6,
            rope_theta=10000.0,
            max_positions=self.max_events,
            tie_embeddings=True,
        )

    def projector_for(self, hidden_size: int) -> ProjectorConfig:
        """Return the projector into a language model of this width."""
        return projector_of(self.projector, self.hidden_size, hidden_size)


POOLS = ("last", "mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig(ModalityConfig):
    """A text through a language model of its own, of which hidden states are taken.

    Attributes:
        text_config: the encoder, as in a config.json of its family; the same tokenizer as the
            language model's.
        tokens: how many vectors are handed on.
        pool: "last": they are the hidden states of the last positions; "mean": the text is cut into
            so many stretches, and each is the mean of the states of one.
        projector: identity (where the widths agree), linear, or mlpNx_gelu.
        max_length: positions of a text; longer ones are cut on the right.

    Source: Guoyao Li et al. 2025 (MixLM): the final hidden states of the last T_S positions.
    """

    kind: ClassVar[str] = "text"

    text_config: TextConfig
    tokens: int = 1
    projector: str = "identity"
    max_length: int = 2048
    pool: str = "last"

    def __post_init__(self) -> None:
        _within("tokens", self.tokens, MOST_TOKENS)
        _within("max_length", self.max_length, MOST_POSITIONS)
        if self.pool not in POOLS:
            raise ConfigError(f"pool is {shown(self.pool)}, expected {' or '.join(POOLS)}")
        if self.max_length < self.tokens:
            raise ConfigError(
                f"max_length {self.max_length} is below tokens {self.tokens}: the last states are "
                "taken of at least so many positions"
            )
        if self.projector.startswith("resampler"):
            raise ConfigError(
                f"projector {self.projector!r} sets the number of positions, and so does tokens: "
                "expected identity, linear or mlpNx_gelu"
            )
        self.projector_for(self.text_config.hidden_size)

    def projector_for(self, hidden_size: int) -> ProjectorConfig:
        """Return the projector into a language model of this width."""
        return projector_of(self.projector, self.text_config.hidden_size, hidden_size)


def projector_of(name: str, width: int, hidden_size: int) -> ProjectorConfig:
    """Return the projector of this name between two widths.

    Raises:
        ConfigError: an unknown name, an identity between different widths, or one that averages
            neighbours on a tower's grid.
    """
    if name == "none":
        name = "identity"
    if name == "identity" and width != hidden_size:
        raise ConfigError(
            f"projector 'identity' hands on vectors of width {width}, and the language model has "
            f"width {hidden_size}: use linear or mlp2x_gelu"
        )
    try:
        found = parse_projector(name, vision_size=width, hidden_size=hidden_size)
    except UnsupportedModelError:
        found = None
    if found is None or found.pool > 1:
        raise ConfigError(
            f"projector {shown(name)} is unknown: expected linear, mlpNx_gelu, identity, "
            "resamplerM or resamplerMxN"
        )
    return found


def _within(name: str, value: int, most: int, *, least: int = 1) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value}, expected {least} to {most}")


Build = Callable[..., Any]
"""build(config, *, name, hidden_size) -> the module; hidden_size is the language model's width."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A row of the table.

    Attributes:
        config: class of the settings; its `kind` is the name of the row.
        build: what makes the module, or "package.module:name" of it.
    """

    config: type[ModalityConfig]
    build: Build | str

    def builder(self) -> Build:
        """Return what makes the module."""
        if not isinstance(self.build, str):
            return self.build
        module, _, name = self.build.partition(":")
        return cast("Build", getattr(importlib.import_module(module), name))


_KINDS: dict[str, Kind] = {
    kind.config.kind: kind
    for kind in (
        Kind(VectorConfig, "lapilli.modality.vector:build"),
        Kind(EventsConfig, "lapilli.modality.events:EventsModality"),
        Kind(TextEncoderConfig, "lapilli.modality.text:TextModality"),
    )
}


def register_kind(config: type, build: Build) -> None:
    """Add a kind of modality to the table, or replace one of yours.

    From then on checkpoints and recipes may name it; a program that loads one calls this first,
    which importing the file of the kind does.

    Args:
        config: a frozen dataclass over ModalityConfig; its class variable `kind` is the name, its
            fields (numbers, texts, flags, tuples and dataclasses of these) the keys in the file.
        build: called as build(config, name=..., hidden_size=...) for the module, which follows
            lapilli.modality.Modality. The class of the module itself will do.

    Raises:
        ConfigError: no such class, or the name of a kind of lapilli's own.
    """
    name = getattr(config, "kind", "")
    if not (
        isinstance(config, type) and issubclass(config, ModalityConfig) and is_dataclass(config)
    ):
        raise ConfigError(
            f"{shown(config)} describes no kind: expected a dataclass over ModalityConfig"
        )
    if not name or not isinstance(name, str):
        raise ConfigError(f'{config.__name__} names no kind: give it kind: ClassVar[str] = "..."')
    if isinstance(_KINDS.get(name), Kind) and isinstance(_KINDS[name].build, str):
        raise ConfigError(f"the kind {name!r} is one of lapilli's own: give yours another name")
    _KINDS[name] = Kind(config, build)


def kind_of(config: ModalityConfig) -> Kind:
    """Return the row of the table for these settings.

    Raises:
        UnsupportedModelError: nothing was registered for them.
    """
    found = _KINDS.get(config.kind)
    if found is None or not isinstance(config, found.config):
        raise UnsupportedModelError(_unknown(config.kind))
    return found


def _unknown(kind: object) -> str:
    return (
        f"the kind {shown(kind)} of a modality is unknown, there are {', '.join(sorted(_KINDS))}: "
        "import the file that registers it (register_kind) before the checkpoint is loaded"
    )


def check_name(name: object) -> None:
    """Refuse a name that could not be told from something else.

    Raises:
        ConfigError: no word, or one that Chat.ask or a record uses already.
    """
    is_word = isinstance(name, str) and name.isidentifier() and not iskeyword(name)
    if not is_word or str(name).startswith("_") or not str(name).isascii():
        raise ConfigError(f"a modality is called {shown(name)}: expected a word such as 'user'")
    if name in RESERVED:
        raise ConfigError(
            f"a modality is called {name!r}, which is the name of a sampling option, of a key of "
            "records, or of what every model has: choose another word such as 'user'"
        )


def parse_modalities(reader: KeyReader) -> Modalities:
    """Return what `lapilli_modalities` of a config.json declares; () without it.

    Raises:
        ConfigError: a name that cannot be one; a key that is missing, unknown, or has a wrong
            value.
        UnsupportedModelError: a kind that nobody registered.
    """
    section = reader.child(KEY)
    return tuple((name, _parse_one(section, name)) for name in section.raw)


def modality_config(name: str, settings: object) -> ModalityConfig:
    """Return the settings of one modality, from what a file or a program gives.

    Raises:
        ConfigError: see `parse_modalities`.
        UnsupportedModelError: a kind that nobody registered.
    """
    if isinstance(settings, ModalityConfig):
        check_name(name)
        kind_of(settings)
        _check_fusion(settings)
        return settings
    [(_, found)] = parse_modalities(KeyReader({KEY: {name: settings}}, "modality"))
    return found


def _parse_one(section: KeyReader, name: str) -> ModalityConfig:
    where = f"{section.where}: {section.prefix}{name}"
    try:
        check_name(name)
    except ConfigError as error:
        raise ConfigError(f"{section.where}: {KEY}: {error}") from error
    reader = section.child(name)
    kind = reader.text("kind")
    if kind is None:
        raise ConfigFileError(f"{where}.kind is missing, expected one of {', '.join(_KINDS)}")
    if kind not in _KINDS:
        raise UnsupportedModelError(f"{where}: {_unknown(kind)}")
    found = read_record(_KINDS[kind].config, reader, extra=frozenset({"kind"}))
    config = cast("ModalityConfig", found)
    try:
        _check_fusion(config)
    except ConfigError as error:
        raise ConfigFileError(f"{where}: {error}") from error
    return config


def _check_fusion(config: ModalityConfig) -> None:
    """Refuse a way of fusion that there is not, or half of one.

    Not in the class: a kind of somebody else's checks its own fields in the same place.
    """
    if config.fusion not in FUSIONS:
        raise ConfigError(f"fusion is {shown(config.fusion)}, expected {' or '.join(FUSIONS)}")
    if not config.is_attended and config.every is not None:
        raise ConfigError(
            f"every is {config.every}, and features that stand in the sequence have no blocks: set "
            'fusion = "cross_attention", or leave it out'
        )
    if config.is_attended and config.every is None:
        raise ConfigError(
            'fusion "cross_attention" needs every: a block before every n-th layer, such as every '
            "= 2"
        )
    if config.every is not None:
        _within("every", config.every, MOST_LAYERS)


def attended(modalities: Modalities) -> tuple[str, ...]:
    """Return the names of the modalities that take no position and are looked at."""
    return tuple(name for name, config in modalities if config.is_attended)


def attention_every(modalities: Modalities) -> int | None:
    """Return n, where a gated block stands before every n-th layer; None: there are none.

    Raises:
        ConfigError: the modalities name different numbers; they share the blocks.
    """
    wanted = {config.every: name for name, config in modalities if config.is_attended}
    if len(wanted) > 1:
        found = ", ".join(f"{name!r} every = {every}" for every, name in wanted.items())
        raise ConfigError(
            f"modalities that are attended to share their blocks, and name different ones: {found}:"
            " give all of them the same every"
        )
    return next(iter(wanted), None)


def write_modalities(modalities: Modalities) -> dict[str, object]:
    """Return the key of config.json that declares them; nothing where there are none."""
    if not modalities:
        return {}
    return {KEY: {name: settings_of(config) for name, config in modalities}}


def settings_of(config: ModalityConfig) -> dict[str, object]:
    """Return the settings of a modality as they stand in a config.json."""
    found = {"kind": config.kind, **write_record(config)}
    if not config.is_attended:
        del found["fusion"]  # as every file without it means
    if isinstance(config, TextEncoderConfig) and config.pool == "last":
        del found["pool"]
    return found


def declared(raw: JsonObject) -> tuple[str, ...]:
    """Return the names that a config.json declares, without reading what they are."""
    found = raw.get(KEY)
    return tuple(found) if is_object(found) else ()

"""Options of generation: how tokens are sampled, and the limits of an engine. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from math import inf, isinf
from types import NoneType
from typing import Any, cast, get_args

from lapilli.config.grammar import Grammar, as_grammar
from lapilli.errors import GenerationError

MIB = 1 << 20
EXCLUSIVE_SEED_LIMIT = 1 << 64


@dataclass(frozen=True, slots=True)
class Option:
    """Description of one sampling option, for `--help` and for the checks.

    Attributes:
        help: one line.
        low: smallest value, of an element where the option holds several; None: any.
        high: largest value.
        low_open: `low` itself is refused.
        in_terminal: whether `lapilli ask`, `chat` and `batch` have the option.
    """

    help: str
    low: int | float | None = None
    high: int | float | None = None
    low_open: bool = False
    in_terminal: bool = True

    def check(self, name: str, value: object, kind: object) -> None:
        """Check a value of the type `kind`.

        Raises:
            GenerationError: another type, or out of the bounds.
        """
        low = -inf if self.low is None else float(self.low)
        high = inf if self.high is None else float(self.high)
        if kind is float:
            check_number(name, value, low, high, low_open=self.low_open)
        elif kind is int:
            check_count(name, value, least=-(2**63) if self.low is None else int(self.low))
        elif kind == tuple[int, ...]:
            for token_id in _items(name, value):
                check_count(name, token_id, least=0)
        elif kind == tuple[str, ...]:
            if any(not isinstance(text, str) or not text for text in _items(name, value)):
                raise GenerationError(f"{name} must hold non-empty strings, got {value!r}")
        elif kind is Grammar:
            if not isinstance(value, Grammar):
                raise GenerationError(
                    f"{name} must be a Grammar, got {value!r:.100}: pass schema=... to "
                    "SamplingParams.from_options, or use lapilli.config.grammar.as_grammar"
                )
        else:
            for token_id, number in cast("Mapping[object, object]", value).items():
                check_count(f"a token id of {name}", token_id, least=0)
                check_number(f"{name} of token {token_id}", number, low, high)


def option(default: Any, text: str, **bounds: Any) -> Any:  # noqa: ANN401  of any field
    """Return a dataclass field with its help text and bounds as metadata."""
    metadata = {"option": Option(text, **bounds)}
    if isinstance(default, dict):  # a dict has no hash: equal parameters still hash alike
        return field(default_factory=dict, hash=False, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Settings of sampling, of the end of an answer, and of what is reported about it.

    A new option is one field here and one function in generate/sampler.py. The command line, the
    checks and the error for an unknown option are made from the fields.

    Raises:
        GenerationError: a value of another type, or out of its bounds.
    """

    max_new_tokens: int = option(512, "Longest answer, in tokens.", low=1)
    # With temperature 0 top_k, top_p and min_p change nothing: each keeps the best token.
    temperature: float = option(0.0, "0 takes the likeliest token each time.", low=0.0)
    top_p: float | None = option(None, "Nucleus sampling.", low=0.0, high=1.0, low_open=True)
    top_k: int | None = option(None, "Sample among the k likeliest.", low=1)
    min_p: float | None = option(
        None, "Drop tokens below this share of the likeliest.", low=0.0, high=1.0
    )
    # As in the transformers library; which tokens of the prompt count is the caller's choice.
    repetition_penalty: float = option(
        1.0, "Above 1: make tokens seen before less likely.", low=0.0, low_open=True
    )
    # These three as in OpenAI's interface; only tokens of the answer count.
    frequency_penalty: float = option(
        0.0, "Subtract this from a token's logit each time that it occurs.", low=-2.0, high=2.0
    )
    presence_penalty: float = option(
        0.0, "Subtract this once from the logit of a token that occurred.", low=-2.0, high=2.0
    )
    logit_bias: Mapping[int, float] = option(
        {}, "ID=BIAS: add to a token's logit, -100 forbids it; repeatable.", low=-100.0, high=100.0
    )
    # With a temperature the continuations of the beams are drawn (beam sampling).
    num_beams: int = option(1, "Beam search with so many beams.", low=1)
    length_penalty: float = option(
        1.0, "A beam's score is its log-probability / length ** this number."
    )
    # The stop string is not part of the answer.
    stop: tuple[str, ...] = option((), "End the answer before this text; repeatable.")
    stop_token_ids: tuple[int, ...] = option(
        (), "End the answer at this token, besides the model's own; repeatable.", low=0
    )
    seed: int | None = option(None, "Makes sampling repeatable.")
    logprobs: int | None = option(
        None,
        "Report each token's log-probability, and those of so many alternatives.",
        low=0,
        in_terminal=False,
    )
    # from_options and updated take what `as_grammar` does, under the name `schema` too.
    grammar: Grammar | None = option(  # noqa: RUF009  it is a field, as the others are
        None, "Form that the answer must have.", in_terminal=False
    )

    def __post_init__(self) -> None:
        # A dict of its own: the caller's may change.
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.default is not None:
                one.metadata["option"].check(one.name, value, value_type(one))
        if self.seed is not None and self.seed >= EXCLUSIVE_SEED_LIMIT:
            raise GenerationError(f"seed must be below 2 ** 64, got {self.seed}")
        if self.grammar is not None and self.num_beams > 1:
            raise GenerationError(
                f"num_beams {self.num_beams}: beams cannot follow a grammar (schema=...), leave "
                "one of them out"
            )

    @classmethod
    def from_options(cls, **options: object) -> "SamplingParams":
        """Return parameters from keyword options; one stop string may stand without a tuple.

        `schema` is what `as_grammar` takes: a JSON schema, a pydantic model class, choices or a
        regular expression.

        Raises:
            GenerationError: an option has another name than a field, or a value is out of bounds.
        """
        return cls().updated(**options)

    def updated(self, **options: object) -> "SamplingParams":
        """Return these parameters with some of them changed; see `from_options`."""
        if "schema" in options:
            options = _without_alias(options)
        known = sorted(one.name for one in fields(self))
        unknown = sorted(set(options) - set(known))
        if unknown:
            names = ", ".join(unknown)
            raise GenerationError(
                f"unknown sampling option {names}: choose from {', '.join(known)}"
            )
        # Whether each value has the type of its field is checked in __post_init__.
        values = {name: _normalized(name, value) for name, value in options.items()}
        return replace(self, **cast("dict[str, Any]", values))

    @property
    def is_greedy(self) -> bool:
        """True if every step takes the most probable token."""
        return self.temperature == 0 and self.num_beams == 1


def value_type(one: "Field[Any]") -> Any:  # noqa: ANN401  a type
    """Return the type of a field's values, None left out."""
    types = [part for part in get_args(one.type) if part is not NoneType]
    return types[0] if NoneType in get_args(one.type) else one.type


def _without_alias(options: Mapping[str, object]) -> dict[str, object]:
    """Return the options with `schema` under the name of its field, `grammar`."""
    if options.get("grammar") is not None:
        raise GenerationError("schema and grammar are the same option: give one of them")
    rest = {name: value for name, value in options.items() if name != "schema"}
    return rest | {"grammar": options["schema"]}


def _normalized(name: str, value: object) -> object:
    """Return an option as its field keeps it: sequences as tuples, a bias as a dict."""
    if name == "logit_bias":
        return _bias(value)
    if name == "stop" and isinstance(value, str):
        return (value,)
    if name == "grammar" and value is not None:
        return as_grammar(value)
    if name in ("stop", "stop_token_ids") and isinstance(value, Iterable):
        return tuple(value)
    return value


def _bias(value: object) -> dict[object, object]:
    """Return {token id: bias} from a mapping, or from "ID=BIAS" texts."""
    if isinstance(value, Mapping):
        return {
            key: float(number) if type(number) is int else number for key, number in value.items()
        }
    found: dict[object, object] = {}
    try:
        for text in cast("Iterable[str]", value):
            key, number = text.split("=")
            found[int(key)] = float(number)
    except (AttributeError, TypeError, ValueError) as error:
        raise GenerationError(
            f"logit_bias must be a mapping {{token id: bias}} or hold ID=BIAS, got {value!r}"
        ) from error
    return found


def _items(name: str, value: object) -> Iterable[object]:
    if not isinstance(value, tuple):
        raise GenerationError(f"{name} must hold several values, got {value!r}")
    return value


def check_count(name: str, value: object, *, least: int) -> None:
    """Check that a value is a whole number of at least `least`.

    Raises:
        GenerationError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise GenerationError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_number(
    name: str, value: object, low: float, high: float, *, low_open: bool = False
) -> None:
    """Check that a value is a number from `low` to `high`; infinite ends are open.

    Raises:
        GenerationError: it is no number, not a number (NaN) or out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GenerationError(f"{name} must be a number, got {value!r}")
    low_open = low_open or isinf(low)
    # NaN fails every comparison.
    fits = (low < value if low_open else low <= value) and (
        value < high if isinf(high) else value <= high
    )
    if not fits:
        span = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if isinf(high) else ']'}"
        raise GenerationError(f"{name} must be in {span}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Limits of an engine.

    Args:
        max_rows: most sequences that are worked on at the same time.
        max_waiting: most requests that wait for their turn; `submit` refuses more.
        chunk: most new prompt tokens per step while other answers are decoded, so that a long
            prompt delays their next token by the time of so many tokens only.
        max_step: most prompt tokens per step while no answer is decoded; one prompt of up to
            four times as many is read at once.
        block_size: tokens per block of keys and values.
        kv_bytes: memory for keys and values, cached ones included; on a CPU it is taken as it is
            used. None: a quarter of the machine's or the GPU's memory, no less than one whole
            context and no more than `max_rows` of them.
        kv_dtype: how keys and values are kept: "model": as they are computed; "bfloat16": half of
            float32; "int8": about a quarter, see QuantizedBlockStore for what it costs; "auto":
            bfloat16 for a packed model on a CPU, else as they are computed.
        prefix_bytes: of these, what may be kept of sequences that are over; 0 switches the prefix
            cache off. None: all of `kv_bytes`, or an eighth of the memory where that is None too.
        feature_bytes: most bytes of features of pictures that are kept; 0 keeps none.
        context_length: most tokens of prompt and answer together, no more than the model reads;
            None: as many as it reads. Longer prompts are refused with ContextTooLongError.
        speculate: whether draft tokens are verified: "off"; "auto", those that make tokens come
            faster by the clock; "on", those that would if each took a tenth of a pass.
        compile: how a step runs in which every row gives one token. "on": in fixed shapes and
            translated by torch.compile, on CUDA recorded as graphs; "static": the same without
            the compiler; "off": as every other step; "auto": on CUDA the first of these that
            works, else "off".

    Raises:
        GenerationError: a number below its least, or an unknown word.
    """

    max_rows: int = 16
    max_waiting: int = 1024
    chunk: int = 128
    max_step: int = 1024
    block_size: int = 32
    kv_bytes: int | None = None
    kv_dtype: str = "auto"
    prefix_bytes: int | None = None
    feature_bytes: int = 256 * MIB
    context_length: int | None = None
    speculate: str = "auto"
    compile: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_waiting", "chunk", "max_step", "block_size"):
            check_count(name, getattr(self, name), least=1)
        for name in ("kv_bytes", "prefix_bytes", "feature_bytes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=0)
        if self.context_length is not None:
            check_count("context_length", self.context_length, least=1)
        _check_word("kv_dtype", self.kv_dtype, "auto", "model", "bfloat16", "int8")
        _check_word("speculate", self.speculate, "on", "off", "auto")
        _check_word("compile", self.compile, "auto", "on", "static", "off")


def check_engine_options(given: object) -> None:
    """Refuse what gives an engine no limits.

    Raises:
        GenerationError: something else than EngineOptions or None.
    """
    if not isinstance(given, EngineOptions | None):
        raise GenerationError(f"engine must be EngineOptions or None, got {given!r:.100}")


def _check_word(name: str, value: object, *known: str) -> None:
    if value not in known:
        words = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise GenerationError(f"{name} must be {words}, got {value!r}")

"""Terminal: the options that commands share, and what they write for people.

Notes, bars and one-line errors go to standard error. Nothing here imports torch before a command
runs.
"""

import errno
import gc
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lapilli.checkpoint.source import PEBBLE, is_local
from lapilli.config.generation import EngineOptions, SamplingParams, value_type
from lapilli.config.grammar import Grammar
from lapilli.config.llava import SamplingNote
from lapilli.config.reader import given_path
from lapilli.errors import ConfigError, GrammarError, LapilliError, MediaError

if TYPE_CHECKING:
    from lapilli.modality.image.decode import Alpha
    from lapilli.pipeline import Chat
    from lapilli.store import Store

EXIT_BAD_INPUT = 2

PLACEHOLDER = "<image>"
STAYED_TEXT = f"{PLACEHOLDER} in the question stays text: the pictures stand before the question"

ModelSource = Annotated[
    str, typer.Option("--model", "-m", help="A directory, a hub id, or pebble.")
]
Base = Annotated[
    str | None,
    typer.Option(help="The language model under a LoRA or a projector-only checkpoint."),
]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter for the model.")]
Template = Annotated[
    str | None,
    typer.Option(help="Conversation template by name, such as vicuna_v1."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the answer.")]
Source = Annotated[str, typer.Argument(help="A directory, a hub id, or pebble.")]
Target = Annotated[Path, typer.Argument(help="The new directory.")]
IdColumn = Annotated[str, typer.Option("--id", help="The column, or key, of the ids.")]
TextColumn = Annotated[str, typer.Option("--text", help="The column, or key, of the texts.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the directory.")]

StoreOfModality = Annotated[
    list[str] | None,
    typer.Option(
        "--store",
        metavar="NAME=STORE",
        help="A store of embeddings, whose ids stand for media of the modality NAME.",
    ),
]

MediaOfModality = Annotated[
    list[str] | None,
    typer.Option(
        "--media",
        metavar="NAME=VALUE",
        help="A medium of the modality NAME: JSON, a file that ends in .json, or an id of its "
        "store (one that looks like JSON in double quotes).",
    ),
]


class EngineKind(StrEnum):
    """Where questions are answered."""

    LOCAL = "local"
    RAY = "ray"


Engine = Annotated[EngineKind, typer.Option(help="local, or ray: several processes or machines.")]
Cores = Annotated[int, typer.Option(min=1, help="Cores of one engine of Ray without a GPU.")]

Sampling = dict[str, Any]
"""Sampling options of a command: keyword arguments of SamplingParams.from_options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """Options of the commands that save a checkpoint in another form."""

    template: Template = None
    base: Base = None
    adapter: Adapter = None
    overwrite: Overwrite = False
    quiet: Quiet = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Options of the commands that answer questions.

    Raises:
        GenerationError: a wrong sampling option or schema, found before a model is loaded.
    """

    model: ModelSource = "pebble"
    base: Base = None
    adapter: Adapter = None
    template: Template = None
    sampling: Sampling
    schema: Annotated[
        Path | None,
        typer.Option(
            help="Form of the answer: a JSON schema (.json), a regular expression (.regex), "
            "choices, one per line (.txt), or a Lark grammar (.lark)."
        ),
    ] = None
    device: Device = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4: smaller and faster on a CPU.")
    ] = None
    speculate: Annotated[
        str,
        typer.Option(help="Guess tokens ahead and check them: on, off, or auto, while it pays."),
    ] = "auto"
    alpha: Annotated[
        str,
        typer.Option(
            help="Transparent pictures: drop shows what lies under, composite lays on white."
        ),
    ] = "drop"
    quiet: Quiet = False

    def __post_init__(self) -> None:
        if self.schema is not None:
            options = {**self.sampling, "grammar": read_grammar(self.schema)}
            object.__setattr__(self, "sampling", options)
        SamplingParams.from_options(**self.sampling)

    def of_model(self, model: str) -> "ChatOptions":
        """Return them with another model."""
        return replace(self, model=model)

    def load(
        self,
        stores: "Mapping[str, Store] | None" = None,
        **limits: Any,  # noqa: ANN401  see EngineOptions
    ) -> "Chat":
        """Load the model behind a bar, and say what a person should know about it.

        `stores` go by the names of modalities, `limits` are fields of EngineOptions.
        """
        with loading(self.model, quiet=self.quiet) as progress:
            import lapilli  # torch with it, which takes time too

            chat = lapilli.load(
                self.model,
                base=self.base,
                adapter=self.adapter,
                template=self.template,
                device=self.device,
                dtype=self.dtype,
                quantize=self.quantize,
                alpha=cast("Alpha", self.alpha),  # any text: it is checked there
                engine=EngineOptions(speculate=self.speculate, **limits),
                progress=progress,
                stores=stores,
            )
        # What torch and the model are made of stays until the process ends. Python's collector need
        # not look through it, which would pause an answer once in some twenty turns. It counts for
        # the whole process, so it is for a program to choose, and not done by lapilli.load.
        gc.collect()
        gc.freeze()
        if not self.quiet:
            _say_what_is_odd(chat)
        return chat


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Options of the commands that load a model and have it write nothing."""

    model: ModelSource = "pebble"
    base: Base = None
    adapter: Adapter = None
    template: Template = None
    device: Device = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4: smaller and faster on a CPU.")
    ] = None
    quiet: Quiet = False

    def of_chat(self) -> ChatOptions:
        """Return them as those of a model that answers."""
        return ChatOptions(
            sampling={}, **{one.name: getattr(self, one.name) for one in fields(self)}
        )


GRAMMARS: Mapping[str, Callable[[str], Grammar]] = {
    ".json": Grammar.json_schema,
    ".regex": lambda text: Grammar.regex(text.rstrip("\r\n")),
    ".txt": lambda text: Grammar.choice([line for line in text.splitlines() if line.strip()]),
    ".lark": Grammar.lark,
}
"""What the file of --schema holds, by the end of its name."""


def read_grammar(path: Path) -> Grammar:
    """Return the grammar that a file holds.

    Raises:
        GrammarError: the name ends otherwise than in `GRAMMARS`, or the file cannot be used.
    """
    read = GRAMMARS.get(path.suffix.lower())
    if read is None:
        known = ", ".join(GRAMMARS)
        raise GrammarError(f"--schema {path}: the name must end in one of {known}")
    try:
        return read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GrammarError(f"--schema {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise GrammarError(f"--schema {path}: not UTF-8 at byte {error.start + 1}") from error
    except GrammarError as error:
        raise GrammarError(f"--schema {path}: {error}") from error


def open_stores(given: Sequence[str]) -> "dict[str, Store]":
    """Return the stores that options NAME=STORE name.

    Raises:
        ConfigError: an option of another form, or a name that comes twice.
        StoreError: no store.
    """
    if not given:
        return {}
    from lapilli.store import Store

    said = ("NAME=STORE, a modality and a folder", "")
    return {name: Store.open(path) for name, path in _by_modality("--store", given, *said)}


def reachable(how: ChatOptions) -> ChatOptions:
    """Return the options with paths that mean the same in a process of another folder."""
    model = _whole(how.model) or how.model
    return replace(how, model=model, base=_whole(how.base), adapter=_whole(how.adapter))


def reachable_stores(given: Sequence[str]) -> tuple[str, ...]:
    """Return options NAME=STORE whose paths mean the same in a process of another folder."""
    parts = (one.partition("=") for one in given)
    return tuple(f"{name}{equals}{_whole(path) or path}" for name, equals, path in parts)


def _whole(name: str | None) -> str | None:
    """Return a path from the root; a hub id, and the embedded model, as they are."""
    if name is None or name == PEBBLE or not Path(name).exists():
        return name
    return str(Path(name).absolute())


def read_media(given: Sequence[str]) -> dict[str, Any]:
    """Return the media that options NAME=VALUE name: JSON, a file of JSON, or a text as it is.

    Raises:
        ConfigError: an option of another form, or a name that comes twice.
        MediaError: a .json file that is none.
    """
    said = ("NAME=VALUE, a modality and a medium", ": give it a JSON list")
    return {name: _medium(value) for name, value in _by_modality("--media", given, *said)}


def _by_modality(
    option: str, given: Sequence[str], expected: str, advice: str
) -> Iterator[tuple[str, str]]:
    """Yield names and values of options NAME=VALUE, each name once."""
    names = set[str]()
    for one in given:
        name, equals, value = one.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option} {one!r}: expected {expected}")
        if name in names:
            raise ConfigError(f"{option} names the modality {name!r} twice{advice}")
        names.add(name)
        yield name, value


def _medium(value: str) -> Any:  # noqa: ANN401  whatever JSON holds
    if not value.endswith(".json"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    try:
        return json.loads(given_path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise MediaError(f"--media {value} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise MediaError(f"--media {value} is not valid JSON: {error}") from error


def _say_what_is_odd(chat: "Chat") -> None:
    """Say that a CPU has no compiled kernels, and which settings of the files are not applied."""
    from lapilli.kernels.library import why_not_native

    reason = why_not_native()
    if reason and next(chat.model.parameters()).device.type == "cpu":
        note(reason)
    for line in chat.report.notes:
        if isinstance(line, SamplingNote):
            note(line)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of its parameters that are dataclasses.

    A field of the type Sampling becomes an option for each field of SamplingParams.
    """
    before = inspect.signature(command).parameters
    groups: dict[str, Any] = {
        name: one.annotation for name, one in before.items() if is_dataclass(one.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, one in before.items():
        if name in groups:
            parameters += [option for field in fields(groups[name]) for option in _options(field)]
        else:
            parameters.append(one.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def with_groups(**given: Any) -> None:  # noqa: ANN401  what typer read
        for name, value in given.items():
            if isinstance(value, Path):  # models, pictures and data are texts and see to it later
                given[name] = given_path(value)
        for name, group in groups.items():
            given[name] = group(**{field.name: _value(field, given) for field in fields(group)})
        command(**given)

    # typer reads both; mypy knows no such attribute of a function.
    vars(with_groups)["__signature__"] = inspect.Signature(parameters)
    with_groups.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_groups


def _options(field: "Field[Any]") -> list[inspect.Parameter]:
    """Return the command's parameters for a field of a group."""
    if field.type == Sampling:
        found = [_sampling_option(one) for one in fields(SamplingParams)]
        return [one for one in found if one is not None]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)]


def _value(field: "Field[Any]", given: dict[str, Any]) -> Any:  # noqa: ANN401  of any field
    """Return the value of a field, taken out of what typer read."""
    values = {one.name: given.pop(one.name) for one in _options(field)}
    if field.type == Sampling:
        return {name: value for name, value in values.items() if value is not None}
    return values[field.name]


def _sampling_option(one: "Field[Any]") -> inspect.Parameter | None:
    """Return the command's parameter for a sampling option; None: not for the terminal."""
    option, kind, default = one.metadata["option"], value_type(one), one.default
    if not option.in_terminal:
        return None
    bounds = {"min": option.low, "max": option.high}
    if kind not in (int, float):  # several values: the option is repeated
        kind, default = list[int] if kind == tuple[int, ...] else list[str], None
        bounds = bounds if kind == list[int] else {}
    annotation = kind if default is not None else kind | None
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, typer.Option(help=option.help, **bounds)],
    )


def add_command(app: typer.Typer, name: str, command: Callable[..., None]) -> None:
    """Add a command whose errors are one line; with a typer.Context, it may have other options."""
    context = typer.Context in inspect.get_annotations(command).values()
    settings = {"allow_extra_args": context, "ignore_unknown_options": context}
    app.command(name, context_settings=settings)(plain_errors()(with_options(command)))


def note(text: str) -> None:
    """Write a line on standard error, where a pipe does not see it; lost if it cannot be written.

    What goes wrong has an exit code too, and there is no other place to say it.
    """
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def in_one_line(error: BaseException) -> str:
    """Return the message without line ends, and without the number of a system error."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and not isinstance(error, LapilliError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([" -> ".join(names), error.strerror]) if names else error.strerror
        if error.errno == errno.EBADF and not names:  # see prepare_streams in main.py
            text = "standard output is closed, so nothing can be written to it"
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what goes wrong on purpose into one line and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except (LapilliError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0) from None  # the reader (head, less) has seen enough
        note(f"lapilli: {in_one_line(error)}")
        raise SystemExit(EXIT_BAD_INPUT) from error
    except KeyboardInterrupt:
        note("")
        raise SystemExit(130) from None


@contextmanager
def loading(model: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a spinner on standard error, then a bar; yield what `load(progress=...)` moves it by.

    Yields None in a pipe and with --quiet. A model from the hub shows the hub's own bars first.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    name = Path(model).name if is_local(model) else model
    console = Console(stderr=True)
    spinner = console.status(f"loading {name}")
    text = TextColumn("loading {task.description}", markup=False)
    bar = Progress(text, BarColumn(), DownloadColumn(), console=console, transient=True)
    task = bar.add_task(name)

    def show(done: int, total: int) -> None:
        spinner.stop()
        bar.start()
        bar.update(task, completed=done, total=total)

    if is_local(model):
        spinner.start()
    try:
        yield show
    finally:
        spinner.stop()
        bar.stop()


@contextmanager
def counting(*, quiet: bool, transient: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error; yield what moves it, by how many are done of how many.

    Nothing is shown in a pipe and with --quiet; a transient bar vanishes at the end.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=transient) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)

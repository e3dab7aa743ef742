"""Sandbox for chat templates of strangers: that of jinja2, with a price on every operation.

    text -> tree; loops and macros begin with a payment for what they hold, so do operations
            that jinja2 compiles past its own hooks
         -> code; nothing is computed while compiling
    run  -> each payment takes steps from a budget

So time, memory and output are bounded by one number, the same on every machine, in the process and
the thread that asks: an honest template takes some thousand of a million steps. A step is about a
tenth of a microsecond, or 16 characters. What grows is paid for before it grows, for the size that
it will have: a product of sizes where nothing better is known.
Knows jinja2; must not know messages.
"""

import json
import re
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cache, wraps
from itertools import chain
from typing import Any, Final, NoReturn, cast

import jinja2
from jinja2 import ext, nodes, runtime, sandbox, utils
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from markupsafe import Markup

_CHARACTERS: Final = 16  # of a step
_ELEMENT: Final = 32  # characters that an element of a container counts as
_MOST_DEPTH: Final = 200  # of containers in containers: Python itself recurses without a check
_MOST_BITS: Final = 4096  # of a whole number
Value = Any  # whatever a template holds


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Filters that read all of their value, and those that may read it again for every part of it; of
# the others some take from an iterator one by one, and the rest cost their arguments.
_WHOLE: Final = _names(
    "batch capitalize center dictsort e escape filesizeformat float forceescape format groupby "
    "indent int join list lower max min replace reverse safe slice sort string title tojson trim "
    "truncate unique upper urlencode wordcount"
)
_SQUARE: Final = _names("pprint striptags sum urlize wordwrap xmlattr")
_ONE_BY_ONE: Final = _names("map reject rejectattr select selectattr")
# Methods that a chat template may call.
_OF_TEXT: Final = _names(
    "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii "
    "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join "
    "ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
)
_OF_OTHERS: Final = _names("copy count get index is_integer items keys values")


class TooMuchError(jinja2.TemplateRuntimeError):
    """A template that wants more than its budget."""


@dataclass(slots=True)
class Budget:
    """Steps that a template was given, and those that are left."""

    steps: int
    left: int


_BUDGET: ContextVar[Budget] = ContextVar("budget of a chat template")


@contextmanager
def budget_of(steps: int) -> Iterator[Budget]:
    """Give the template that runs inside so many steps, in this thread alone."""
    budget = Budget(steps, steps)
    token = _BUDGET.set(budget)
    try:
        yield budget
    finally:
        _BUDGET.reset(token)


def pay(steps: int) -> None:
    """Take steps from the budget of the template that runs here.

    Raises:
        TooMuchError: there are not so many left.
    """
    budget = _BUDGET.get()
    budget.left -= steps
    if budget.left < 0:
        raise TooMuchError(f"it takes more than {budget.steps:,} steps")


def pay_text(characters: int) -> None:
    """Take the steps that so many characters cost."""
    pay(1 + characters // _CHARACTERS)


def size_of(value: object) -> int:
    """Return the characters and elements of a value; see `_size_and_depth`."""
    return _size_and_depth(value)[0]


def _size_and_depth(value: object) -> tuple[int, int]:
    """Return characters and elements of a value, and how deeply it is nested.

    What it holds twice counts twice, as it does for whoever writes or compares it.

    Raises:
        TooMuchError: more than what is left of the budget can pay for.
    """
    most = _BUDGET.get().left * _CHARACTERS
    size, depth = 0, 1
    waiting: list[tuple[object, int]] = [(value, 1)]
    while waiting:
        item, level = waiting.pop()
        size += 1
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, int):
            size += item.bit_length() // 3
        elif isinstance(item, range):
            size += _ELEMENT * len(item)
        elif isinstance(item, Collection):
            size += _ELEMENT * len(item)
            depth = max(depth, level)
            if size <= most:
                inner = chain(item, item.values()) if isinstance(item, Mapping) else item
                waiting += [(part, level + 1) for part in inner]
        if size > most or depth > _MOST_DEPTH:
            raise TooMuchError("it makes or compares values that are too large")
    return size, depth


def size_of_copy(value: object) -> int:
    """Return what a copy of a value takes: an element as much as some characters."""
    if isinstance(value, str):
        return len(value)
    return _CHARACTERS * len(value) if isinstance(value, list | tuple) else size_of(value)


def size_of_printed(form: str, arguments: object) -> int:
    """Return more characters than `form % arguments`, or as much of str.format, comes to."""
    widths = sum(int(digits) if len(digits) < 9 else 10**9 for digits in re.findall(r"\d+", form))
    items = arguments if isinstance(arguments, tuple) else (arguments,)
    size = sum(map(_magnitude, items)) if "*" in form else size_of(arguments)
    return len(form) + widths + (form.count("%") + 1) * size


def _size_made(value: object, arguments: Iterable[object]) -> int:
    """Return more characters than a filter or a method reads or makes, however slow it is."""
    return 4 * size_of(value) * (1 + sum(map(_magnitude, arguments)))


def _magnitude(value: object) -> int:
    """Return what an argument adds to what is made with it: a number is a width or a count."""
    return abs(value) if isinstance(value, int) else size_of(value)


def total(values: Iterable[object]) -> int:
    """Return the sizes of several values together."""
    return sum(map(size_of, values))


def pay_binop(operator: str, left: Value, right: Value) -> None:
    """Pay for one of + - * / // ** %.

    Raises:
        TooMuchError: it makes too much.
    """
    if isinstance(left, int | float) and isinstance(right, int | float):
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            if operator == "**":
                bits = left.bit_length() * max(right, 1)
            if bits > _MOST_BITS:
                raise TooMuchError("it makes numbers that are too large")
        pay(1)
    elif operator == "%" and isinstance(left, str):
        pay_text(size_of_printed(left, right))
    elif operator == "*":
        value, number = (left, right) if isinstance(right, int) else (right, left)
        pay_text(size_of_copy(value) * (max(number, 0) if isinstance(number, int) else 1))
    elif operator == "+":
        pay_text(size_of_copy(left) + size_of_copy(right))
    else:  # sets, or what is an error
        pay_text(total((left, right)))


def pay_call(
    function: Value, args: tuple[Value, ...], kwargs: Mapping[str, Value]
) -> tuple[Value, ...]:
    """Pay for a call that does more than run a macro; return its arguments, iterators collected.

    Raises:
        SecurityError: a method that no chat template needs.
        TooMuchError: it makes too much.
    """
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    is_text = isinstance(owner, str)
    if is_text or isinstance(function, types.BuiltinMethodType | types.MethodDescriptorType):
        known = _OF_TEXT if is_text else _OF_OTHERS
        if name not in known or owner is None or isinstance(owner, type):
            raise SecurityError(
                f"a chat template may not call {name!r} of a {type(owner).__name__}"
            )
    elif function is not dict and not isinstance(owner, runtime.LoopContext):
        return args
    args = tuple(map(collected, args))
    given = (*args, *kwargs.values())
    pay_text(_size_made(owner, given) if is_text else total((owner, *given)))
    return args


def pay_filter(name: str, value: Value, arguments: tuple[Value, ...]) -> Value:
    """Pay for a filter; return its value, which pays as it is read, or an iterator collected.

    Raises:
        TooMuchError: it makes too much.
    """
    if name in _ONE_BY_ONE:
        steps = 2 + total(arguments)
        return counted(value, steps) if value else value
    if name in _WHOLE | _SQUARE:
        value = collected(value)
    if name == "format":
        cost = size_of_printed(str(value), arguments)
    elif name in _WHOLE | _SQUARE:
        cost = _size_made(value, arguments)
        if name in _SQUARE:
            cost *= size_of(value)
        elif name == "tojson":
            cost *= _size_and_depth(value)[1]
    elif name == "round":
        cost = _CHARACTERS * sum(_magnitude(given) ** 2 for given in arguments)
    else:
        cost = total(arguments)
    pay_text(cost)
    return value


def collected(value: Value) -> Value:
    """Return a list of what an iterator gives, paid for; anything else as it is."""
    return list(counted(value, 1)) if isinstance(value, Iterator) else value


def counted(values: Iterable[Value], steps: int) -> Iterator[Value]:
    """Yield the values, each of which is paid for when it is taken."""
    for value in values:
        pay(steps)
        yield value


MOST_SOURCE: Final = 1 << 17
"""Characters of a template; the longest that are published have 20,000."""

# Filters that the tree is given; no template can write these names, as they have a space.
_STEPS, _COMPARED, _SLICED, _JOINED = " steps", " compared", " sliced", " joined"


def compile_template(source: str) -> jinja2.Template:
    """Compile a template that pays from the budget around its rendering.

    Raises:
        jinja2.TemplateSyntaxError: a text that is no template.
        TooMuchError: a text that is too long.
        Exception: whatever jinja2 and Python raise on what is nested too deeply.
    """
    if len(source) > MOST_SOURCE:
        raise TooMuchError(f"it has {len(source):,} characters, at most {MOST_SOURCE:,} are read")
    environment = _environment()
    tree = environment.parse(source)
    _charge(tree)
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """jinja2's hooks, each of which pays before it does what it did."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def call_binop(
        self, context: runtime.Context, operator: str, left: Value, right: Value
    ) -> Value:
        """Compute one of + - * / // ** %."""
        pay_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Value, __obj: Value, *args: Value, **kwargs: Value) -> Value:  # noqa: N805
        """Call a macro, a method or one of the functions."""
        pay(1 + len(args) + len(kwargs))
        args = pay_call(__obj, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def getitem(self, obj: Value, argument: Value) -> Value:
        """Look a key up; one that is neither text nor a number is hashed and printed whole."""
        if not isinstance(argument, str | int):
            pay_text(size_of(argument))
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Value) -> Callable[..., str] | None:
        """Wrap str.format and str.format_map, which then pay field by field."""
        if super().wrap_str_format(value) is None:
            return None
        text: str = value.__self__
        formatter = (
            _EscapeFormatter(self, escape=text.escape)
            if isinstance(text, Markup)
            else _Formatter(self)
        )

        def formatted(*args: Value, **kwargs: Value) -> str:
            if value.__name__ == "format_map":
                (kwargs,), args = args, ()
            pay_text(len(text))
            return type(text)(formatter.vformat(text, args, kwargs))

        return formatted

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what was written."""
        pieces = list(pieces)
        pay_text(len(pieces) + sum(map(len, pieces)))
        return "".join(pieces)


class _PaysFields:
    """A formatter that pays for every field."""

    def format_field(self, value: Value, format_spec: str) -> Value:
        """Return the text of a field."""
        pay_text(size_of_printed(format_spec, value))
        return super().format_field(value, format_spec)  # type: ignore[misc]

    def convert_field(self, value: Value, conversion: Value) -> Value:
        """Return the value as `!r`, `!s` or `!a` say."""
        pay_text(size_of(value))
        return super().convert_field(value, conversion)  # type: ignore[misc]


class _Formatter(_PaysFields, sandbox.SandboxedFormatter):
    pass


class _EscapeFormatter(_PaysFields, sandbox.SandboxedEscapeFormatter):
    pass


def _charge(node: nodes.Node) -> int:
    """Put payments into a tree, in place.

    Returns:
        The steps of running this node once, without the loops and macros in it.

    Raises:
        jinja2.TemplateSyntaxError: it reads other templates.
    """
    steps = 1
    for field, value in list(node.iter_fields()):
        inner = value if isinstance(value, list) else [value]
        found = sum(_charge(child) for child in inner if isinstance(child, nodes.Node))
        if field == "body" and isinstance(
            node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block
        ):
            value.insert(0, nodes.ExprStmt(_with_steps(nodes.Const(None), 1 + found)))
            found = 0
        if isinstance(value, list):
            value[:] = [_paid(child) if isinstance(child, nodes.Node) else child for child in value]
        elif isinstance(value, nodes.Node):
            setattr(node, field, _paid(value))
        steps += found
    if isinstance(node, nodes.For) and node.test is not None:
        node.test = _with_steps(node.test, 1 + len(list(node.test.find_all(nodes.Node))))
    return steps


def _paid(node: nodes.Node) -> nodes.Node:
    """Return what stands for an operation that jinja2 compiles past its hooks, else the node."""
    if isinstance(node, nodes.Include | nodes.Import | nodes.FromImport | nodes.Extends):
        raise jinja2.TemplateSyntaxError("a chat template reads no other files", node.lineno)
    if isinstance(node, nodes.Concat):
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)
    if isinstance(node, nodes.Compare):
        node.expr = _filtered(node.expr, _COMPARED)
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, _COMPARED)
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _filtered(node, _SLICED)
    elif isinstance(node, nodes.Pair) and not isinstance(node.key, nodes.Const):
        node.key = _filtered(node.key, _COMPARED)
    return node


def _with_steps(node: nodes.Node, steps: int) -> nodes.Filter:
    """Return the node with a payment of `steps` for it."""
    return _filtered(node, _STEPS, nodes.Const(steps))


def _filtered(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    value = cast("nodes.Expr", node)
    return nodes.Filter(value, name, list(args), [], None, None, lineno=node.lineno or 1)


def _paying(cost: Callable[[Value], int], *, collect: bool = False) -> Callable[..., Value]:
    """Return a filter that gives its value back when `cost` is paid for.

    As it takes the context, it is never computed while a template is compiled.
    """

    @jinja2.pass_context
    def paying(_context: object, value: Value) -> Value:
        value = collected(value) if collect else value
        pay_text(cost(value))
        return value

    return paying


@jinja2.pass_context
def _pay_steps(_context: object, value: object, steps: int) -> object:
    pay(steps)
    return value


@jinja2.pass_context
def _join(context: runtime.Context, parts: list[Value]) -> str:
    """Return what `~` makes."""
    pay_text(size_of(parts))
    join = runtime.markup_join if context.eval_ctx.autoescape else runtime.str_join
    return join(parts)


def _paying_filter(name: str, function: Callable[..., Value]) -> Callable[..., Value]:
    """Return a filter that pays first; what it gives one by one is paid for as it is taken."""

    @wraps(function)
    def paying(context: runtime.Context, value: Value, *args: Value, **kwargs: Value) -> Value:
        pay(2)
        value = pay_filter(name, value, (*args, *kwargs.values()))
        made = function(*_first_arguments(function, context), value, *args, **kwargs)
        # A list's own iterator: generators over generators would end in C's stack.
        return iter(list(counted(made, 2))) if isinstance(made, Iterator) else made

    return jinja2.pass_context(paying)


def _paying_test(function: Callable[..., Value]) -> Callable[..., Value]:
    @wraps(function)
    def paying(context: runtime.Context, value: Value, *args: Value) -> Value:
        pay(1)
        if args:
            args = tuple(map(collected, args))
            pay_text(total((value, *args)))
        return function(*_first_arguments(function, context), value, *args)

    return jinja2.pass_context(paying)


def _first_arguments(function: Callable[..., Value], context: runtime.Context) -> tuple[Value, ...]:
    """Return what jinja2 passes to a filter or a test before its value."""
    passed = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    if passed == "context":
        return (context,)
    if passed is None:
        return ()
    return (context.eval_ctx if passed == "eval_context" else context.environment,)


class _Generation(ext.Extension):
    """`{% generation %}`: where transformers marks answers; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012  the name and type that jinja2 asks for

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse the statements up to the end of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(utils.Namespace):
    """jinja2's `namespace`, closed to names that could lead out of the sandbox."""

    def __init__(self, /, *values: Value, **named: Value) -> None:
        super().__init__()
        for name, value in dict(*values, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a chat template may not store {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # not all that it holds


@cache
def _environment() -> _Sandbox:
    """Return what chat templates may use.

    Source: transformers' chat template rendering: sandbox, block trimming, `tojson` without HTML
    escapes, `raise_exception`, `strftime_now`.
    """
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, ext.loopcontrols],
        finalize=_paying(size_of),
        optimized=False,
    )
    environment.filters["tojson"] = _to_json
    environment.filters = {
        name: _paying_filter(name, function) for name, function in environment.filters.items()
    }
    environment.filters |= {
        _STEPS: _pay_steps,
        _COMPARED: _paying(size_of, collect=True),
        _SLICED: _paying(size_of_copy),
        _JOINED: _join,
    }
    environment.tests = {
        name: _paying_test(cast("Callable[..., Value]", function))
        for name, function in environment.tests.items()
    }
    del environment.globals["lipsum"]  # as many words as it is asked for
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    pay_text(size_of(message))
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    pay_text(256 * len(form))  # at most what the C library makes of it
    return datetime.now().astimezone().strftime(form)

"""Sandbox for chat templates of strangers: that of jinja2, with a price on every operation.

    text -> tree; loops and macros begin with a payment for what they hold, so do operations
            that jinja2 compiles past its own hooks
         -> code; nothing is computed while compiling
    run  -> each payment takes steps from a budget (sandbox_budget.py)

So time, memory and output are bounded by one number, the same on every machine, in the process and
the thread that asks: an honest template takes some thousand of a million steps.
Knows jinja2; must not know messages.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import cache, wraps
from typing import Final, NoReturn, cast

import jinja2
from jinja2 import ext, nodes, runtime, sandbox, utils
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from markupsafe import Markup

from lapilli.prompt import sandbox_budget
from lapilli.prompt.sandbox_budget import TooMuchError, Value, pay, pay_text, size_of

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
        sandbox_budget.pay_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Value, __obj: Value, *args: Value, **kwargs: Value) -> Value:  # noqa: N805
        """Call a macro, a method or one of the functions."""
        pay(1 + len(args) + len(kwargs))
        args = sandbox_budget.pay_call(__obj, args, kwargs)
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
        pay_text(sandbox_budget.size_of_printed(format_spec, value))
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
        value = sandbox_budget.collected(value) if collect else value
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
        value = sandbox_budget.pay_filter(name, value, (*args, *kwargs.values()))
        made = function(*_first_arguments(function, context), value, *args, **kwargs)
        # A list's own iterator: generators over generators would end in C's stack.
        return iter(list(sandbox_budget.counted(made, 2))) if isinstance(made, Iterator) else made

    return jinja2.pass_context(paying)


def _paying_test(function: Callable[..., Value]) -> Callable[..., Value]:
    @wraps(function)
    def paying(context: runtime.Context, value: Value, *args: Value) -> Value:
        pay(1)
        if args:
            args = tuple(map(sandbox_budget.collected, args))
            pay_text(sandbox_budget.total((value, *args)))
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
        _SLICED: _paying(sandbox_budget.size_of_copy),
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

"""What a chat template has to pay for, and from what; see sandbox.py.

A step is about a tenth of a microsecond, or 16 characters. Before something grows, it is paid for
what it will become: a product of sizes where nobody knows better.
Knows values; must not know templates.
"""

import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, Final

import jinja2
import jinja2.exceptions
import jinja2.runtime

CHARACTERS: Final = 16
"""Of a step."""
_ELEMENT: Final = 32  # characters that an element of a container counts as
_MOST_DEPTH: Final = 200  # of containers in containers: Python itself recurses without a check
_MOST_BITS: Final = 4096  # of a whole number
Value = Any  # whatever a template holds

# Filters and methods of text by what they cost; those that are not here cost a step.
_LINEAR: Final = frozenset(
    (
        *("capitalize", "dictsort", "e", "escape", "float", "forceescape", "groupby", "int"),
        *("list", "lower", "max", "min", "reverse", "safe", "sort", "string", "title", "trim"),
        *("unique", "upper", "urlencode", "wordcount", "filesizeformat"),
    )
)
_GROWING: Final = frozenset(
    ("batch", "center", "format", "indent", "join", "replace", "slice", "tojson", "truncate")
)
_SQUARE: Final = frozenset(("pprint", "striptags", "sum", "urlize", "wordwrap", "xmlattr"))
PAID_BY_SIZE: Final = _LINEAR | _GROWING | _SQUARE
LAZY: Final = frozenset(("map", "reject", "rejectattr", "select", "selectattr"))
_TEXT_LINEAR: Final = frozenset(
    (
        *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha"),
        *("isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable"),
        *("isspace", "istitle", "isupper", "lower", "partition", "removeprefix", "removesuffix"),
        *("split", "splitlines", "startswith", "swapcase", "title", "upper"),
    )
)
_TEXT_GROWING: Final = frozenset(
    (
        *("center", "expandtabs", "join", "ljust", "lstrip", "replace", "rfind", "rindex", "rjust"),
        *("rpartition", "rsplit", "rstrip", "strip", "zfill"),
    )
)
_OTHER_METHODS: Final = frozenset(
    ("copy", "count", "get", "index", "is_integer", "items", "keys", "values")
)


class TooMuchError(jinja2.TemplateRuntimeError):
    """A template that wants more than its budget."""


class Budget:
    """Steps that are left to a template."""

    __slots__ = ("_steps", "left")

    def __init__(self, steps: int) -> None:
        self._steps = self.left = steps

    def pay(self, steps: int) -> None:
        """Take steps away.

        Raises:
            TooMuchError: there are not so many.
        """
        self.left -= steps
        if self.left < 0:
            raise TooMuchError(f"it takes more than {self._steps:,} steps")

    def pay_text(self, characters: int) -> None:
        """Take the steps away that so many characters cost."""
        self.pay(1 + characters // CHARACTERS)


_BUDGET: ContextVar[Budget] = ContextVar("budget of a chat template")


@contextmanager
def budget_of(steps: int) -> Iterator[Budget]:
    """Give the template that runs inside so many steps, in this thread alone."""
    budget = Budget(steps)
    token = _BUDGET.set(budget)
    try:
        yield budget
    finally:
        _BUDGET.reset(token)


def pay(steps: int) -> None:
    """Take steps from the budget of the template that runs here."""
    _BUDGET.get().pay(steps)


def pay_text(characters: int) -> None:
    """Take what so many characters cost."""
    _BUDGET.get().pay_text(characters)


def size_of(value: object, most: int) -> tuple[int, int]:
    """Characters and elements of a value, and how deeply it is nested.

    What it holds twice counts twice, as it does for whoever writes or compares it.

    Raises:
        TooMuchError: more than `most`.
    """
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


def size_now(value: object) -> int:
    """Characters and elements of a value, which what is left of the budget can pay."""
    return size_of(value, _BUDGET.get().left * CHARACTERS)[0]


def product(value: object, arguments: Iterable[object]) -> int:
    """More characters than a filter or a method makes of a value and its arguments."""
    return size_now(value) * (1 + sum(map(magnitude, arguments)))


def magnitude(value: object) -> int:
    """What an argument adds to what is made with it: a number is a width or a count."""
    return abs(value) if isinstance(value, int) else size_now(value)


def printed(form: str, arguments: object) -> int:
    """More characters than `form % arguments`, or as much of str.format, comes to."""
    widths = sum(int(digits) if len(digits) < 9 else 10**9 for digits in re.findall(r"\d+", form))
    items = arguments if isinstance(arguments, tuple) else (arguments,)
    size = sum(map(magnitude, items)) if "*" in form else size_now(arguments)
    return len(form) + widths + (form.count("%") + 1) * size


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
        pay_text(printed(left, right))
    elif operator == "*":
        pair = (left, right) if isinstance(right, int) else (right, left)
        number = pair[1] if isinstance(pair[1], int) else 1
        pay_text(shallow(pair[0]) * max(number, 0))
    elif operator == "+":
        pay_text(shallow(left) + shallow(right))
    else:  # sets, or what is an error
        pay_text(size_now(left) + size_now(right))


def shallow(value: object) -> int:
    """What a copy of a value takes: an element as much as some characters."""
    if isinstance(value, str):
        return len(value)
    return CHARACTERS * len(value) if isinstance(value, list | tuple) else size_now(value)


def pay_call(
    function: Value, args: tuple[Value, ...], kwargs: Mapping[str, Value]
) -> tuple[Value, ...]:
    """Pay for a call that does more than run a macro; the arguments, iterators collected."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(owner, str):
        if name not in _TEXT_LINEAR | _TEXT_GROWING:
            raise _refused(owner, name)
        args = tuple(map(collected, args))
        given = (*args, *kwargs.values())
        is_growing = name in _TEXT_GROWING
        pay_text(product(owner, given) if is_growing else 4 * sum(map(size_now, (owner, *given))))
    elif isinstance(function, types.BuiltinMethodType | types.MethodDescriptorType):
        if name not in _OTHER_METHODS or isinstance(owner, type) or owner is None:
            raise _refused(owner, name)
        searched = owner if name in ("count", "index") else None
        pay_text(sum(map(size_now, (searched, *args))) + _copied(owner, name))
    elif function is dict or isinstance(owner, jinja2.runtime.LoopContext):
        args = tuple(map(collected, args))
        pay_text(sum(map(size_now, (*args, *kwargs.values()))))
    return args


def _copied(owner: Value, name: str) -> int:
    return CHARACTERS * len(owner) if name == "copy" else 0


def _refused(owner: object, name: str) -> jinja2.exceptions.SecurityError:
    return jinja2.exceptions.SecurityError(
        f"a chat template may not call {name!r} of a {type(owner).__name__}"
    )


def collected(value: Value) -> Value:
    """A list of what an iterator gives, paid for; anything else as it is."""
    return list(counted(value, 1)) if isinstance(value, Iterator) else value


def counted(values: Iterable[Value], steps: int) -> Iterator[Value]:
    """The values, each of which is paid for when it is taken."""
    paid = _BUDGET.get().pay
    for value in values:
        paid(steps)
        yield value


def pay_filter(name: str, value: Value, arguments: Sequence[Value]) -> None:
    """Pay for a filter of PAID_BY_SIZE.

    Raises:
        TooMuchError: it makes too much.
    """
    if name in _LINEAR:
        pay_text(8 * sum(map(size_now, (value, *arguments))))
    elif name == "format":
        pay_text(printed(str(value), tuple(arguments)))
    elif name == "tojson":
        depth = size_of(value, _BUDGET.get().left * CHARACTERS)[1]
        pay_text(product(value, arguments) * depth)
    elif name in _SQUARE:
        pay_text(size_now(value) * product(value, arguments))
    else:
        pay_text(product(value, arguments))

"""Costs of what a chat template does, and the budget of steps that pays for it; see sandbox.py.

A step is about a tenth of a microsecond, or 16 characters. What grows is paid for before it grows,
for the size that it will have: a product of sizes where nothing better is known.
Knows values; must not know templates.
"""

import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import jinja2
import jinja2.exceptions
import jinja2.runtime

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
            raise jinja2.exceptions.SecurityError(
                f"a chat template may not call {name!r} of a {type(owner).__name__}"
            )
    elif function is not dict and not isinstance(owner, jinja2.runtime.LoopContext):
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

"""Guard: what a thread works on for somebody is asked about before each part of it.

    guarded(check) -> tokenizer: check(text) before every text; scorer, embedder: check("") per pass

A server lets requests of strangers run this way: a text that is too long, and work that nobody
waits for any more, end here, whichever way they took. Without a guard everything is allowed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Check = Callable[[str], None]
"""Raises where a text may not be read, or where the work is not wanted any more."""

_CHECK: ContextVar[Check | None] = ContextVar("check", default=None)


@contextmanager
def guarded(check: Check) -> Iterator[None]:
    """Ask `check` about everything that this thread, or task, does inside of the block."""
    token = _CHECK.set(check)
    try:
        yield
    finally:
        _CHECK.reset(token)


def check_work(text: str = "") -> None:
    """Ask whether work may go on, and a text may be read; raises what the guard does."""
    check = _CHECK.get()
    if check is not None:
        check(text)

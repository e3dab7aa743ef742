"""beartype, but a function is looked at when it is first called: most are never called in one run.

Writing the checks of the 2,900 functions of lapilli takes five seconds, which every worker of
pytest would pay before its first test.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from beartype import beartype


def when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with its annotations checked, the check written at the first call."""
    checked: Callable[..., Any] | None = None

    @wraps(function)
    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if checked is None:
            checked = beartype(function)
        return checked(*args, **kwargs)

    return check
